"""Filling a buffer from environments. May import every part of `rl` named before."""
