"""One update: PPO, GRPO, filtered behaviour cloning. May import `rl.models` and `rl.storage`."""
