"""Buffers that one update learns from: rollouts and episodes. May import `rl.models`."""
