"""Cameras: their names, depth and calibration, and where they stand."""
