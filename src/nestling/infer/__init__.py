"""Running any member of a family from one copy of the weights; evaluation and serving build on it."""
