"""Rendered scenes with questions, answers and points, for pre-training. May import experts and backends."""
