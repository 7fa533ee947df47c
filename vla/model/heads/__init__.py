"""Action heads: the bridge's latent to actions, and the residual that online RL trains."""
