"""Online refinement of a VLA by reinforcement learning: chunk-level PPO on the imitation model itself."""

from vla.core.waiting import sleep_while_waiting

sleep_while_waiting()  # before the modules of this package load torch
