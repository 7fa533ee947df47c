"""A test cell: franky-sim's FR3 behind libfranka's own protocol, at the table of the tabletop suites."""
