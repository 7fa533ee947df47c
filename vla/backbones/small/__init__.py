"""The embedded backbone `small`: its stem, its words and the model of both. May import `vla.backbones`."""
