"""The meaning of a seed in our own suites: scene, task, instruction, success. Steps no physics; imports `vla.core`
only."""
