"""Bascule's policies under LeRobot's interfaces: translation only. LeRobot finds the files here by their names."""
