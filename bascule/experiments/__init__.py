"""Experiments: several arms over several seeds, in one table. May import every package but `bascule.commands`."""
