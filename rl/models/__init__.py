"""Stochastic policy, critic and densities. May import `vla`."""
