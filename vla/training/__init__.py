"""Imitation and pre-training loops, with their recipes. May import every other part of `vla`."""
