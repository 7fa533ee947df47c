"""Reports for people: the quickstart's page and its charts, and claims rendered as BENCHMARKS.md. Imports
`vla.core` and `vla.runtime` only."""
