"""The privileged teacher and its distillation into the policy. May import every other part of `rl` but the runner."""
