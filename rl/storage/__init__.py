"""What one update learns from: rollouts, episodes, demonstrations. May import `rl.models`."""
