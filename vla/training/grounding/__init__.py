"""Pre-training a backbone on questions about rendered scenes: where things are, and whether they are there."""
