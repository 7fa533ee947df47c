"""Experiments about where things are: cameras in other places, depth and calibration."""
