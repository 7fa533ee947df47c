"""`vla experiment distil`: learning from a privileged teacher, with and without its parts."""
