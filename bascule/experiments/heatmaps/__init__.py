"""Experiments with policies that answer by heat-maps."""
