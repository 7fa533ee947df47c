"""Learning from a small expert: alignment with its latents, then tuning through its decoder."""
