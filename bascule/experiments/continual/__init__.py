"""New tasks for a trained policy, one after another: what it learns, and what it forgets."""
