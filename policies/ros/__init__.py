"""Robots that speak ROS, through rosbridge's websocket: no ROS is installed here."""
