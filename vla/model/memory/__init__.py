"""Memory: decisions that a policy keeps of an episode, and how it looks at them again."""
