"""PPO over action tokens."""
