"""What a run needs around it: processes, terminal, logs, videos, provenance. May import `vla.core`."""
