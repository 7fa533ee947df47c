"""From action chunks to actions, and from one chunk to the next. May import `vla`."""
