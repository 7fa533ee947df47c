"""Configuration of the RL package: frozen dataclasses that import no torch, so that recipes load in no time."""
