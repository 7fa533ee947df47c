"""Speed benchmarks: simulation, model and serving. May import every package but `bascule.commands`."""
