"""`vla experiment franka`: policies in the test cell, through libfranka."""
