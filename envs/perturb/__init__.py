"""Ways in which test environments differ from training environments. May import `envs.tabletop`."""
