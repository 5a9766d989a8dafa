"""The forward: nemotron_h in one file, its chunked scan, and the views and masks that make a sub-model of it."""
