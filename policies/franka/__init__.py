"""A Franka arm (FR3, Panda) through libfranka: LeRobot's robot type `franka`, over the package franky-control."""
