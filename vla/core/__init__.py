"""Contracts that every package stands on: types, configuration, checkpoints. Imports no torch and no other part of
Bascule."""
