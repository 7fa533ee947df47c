"""Imported by LeRobot's tools when they start. Registers what `policies.lerobot` and `policies.robots` define."""

from policies.lerobot.configuration_bascule import BasculeConfig

__all__ = ["BasculeConfig"]
