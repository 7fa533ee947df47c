"""`vla experiment peers`: what users would train instead, on the same demonstrations and in the same environments."""
