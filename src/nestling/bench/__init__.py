"""The speed table: every hot path against what users would pick instead, on the same work, in turns, in one run."""
