"""A verdict on a recording: findings, with their figures and remedies, of `vla check`. May import `vla.data`."""
