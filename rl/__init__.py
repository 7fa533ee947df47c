"""Online refinement of a VLA by reinforcement learning: chunk-level PPO on the imitation model itself."""
