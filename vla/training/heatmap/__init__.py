"""Training of policies that answer by heat-maps: pre-training on named things, then on a few demonstrations."""
