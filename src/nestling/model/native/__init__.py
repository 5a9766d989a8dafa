"""The scan and the convolution of Mamba-2 in C++ for the CPU; what they compute is written down in model/scan.py."""
