"""Stable-Baselines3, residual SAC and gymnasium's classic tasks. May import the rest of `rl`."""
