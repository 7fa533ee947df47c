"""A person at the controls beside the policy: teleoperators, who takes over when, the keys of the terminal."""
