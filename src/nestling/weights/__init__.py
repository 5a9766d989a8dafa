"""Checkpoints as byte rows with an item size: read, write, permute, slice. No torch."""
