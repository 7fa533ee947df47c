"""Online refinement of a VLA by reinforcement learning: chunk-level PPO on the imitation model itself."""

from vla.core.waiting import limit_spinning

limit_spinning()  # before the modules of this package load torch
