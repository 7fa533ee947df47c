"""Runtime services of a run: processes, terminal, logs, videos, provenance. May import `vla.core`."""
