"""Scripted experts. May import `envs.tabletop`, `envs.adapters` and `envs.backends`."""
