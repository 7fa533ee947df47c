"""Commands that learn: pre-training, imitation, online RL, and all of them in a row."""
