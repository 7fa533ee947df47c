"""Commands that measure: success in simulation, speed, experiments."""
