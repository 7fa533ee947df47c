"""Learning on a robot: one robot as an environment that is not reset, with somebody beside it who puts things back."""
