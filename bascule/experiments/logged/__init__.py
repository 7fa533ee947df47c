"""Learning from a policy's own logged episodes, good and bad."""
