"""The application: command line, quickstart, benchmarks, experiments and reports. It may import every other package."""
