"""Released VLA-Adapter policies: their bridge as published, and their weights read into it."""
