"""The report page of a run and its charts. Imports `vla.core` and `vla.runtime` only."""
