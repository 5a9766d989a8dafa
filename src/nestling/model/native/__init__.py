"""Mamba-2, attention, products and losses in C++ for the CPU; what they compute is written down outside (model/)."""
