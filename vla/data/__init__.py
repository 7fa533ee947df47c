"""LeRobot datasets to training batches. May import `vla.model` and what it stands on."""
