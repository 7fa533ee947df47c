"""Raw observations to model inputs and actions back, the only place that normalises. May import `vla.core`."""
