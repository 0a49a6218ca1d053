"""Weights held as integers: which checkpoints store them so, how they are read, and how others are rounded on load."""
