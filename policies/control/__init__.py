"""A fixed-rate loop that drives a robot. May import `policies.serving` and `policies.chunking`."""
