"""Parts that every simulated environment shares: cameras, culling, divergence checks. May import `envs.tabletop`."""
