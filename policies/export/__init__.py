"""Checkpoints as graphs for other runtimes. May import `vla`."""
