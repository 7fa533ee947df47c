"""Learnt rewards. May import `rl.models` and `rl.storage`."""
