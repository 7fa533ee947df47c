"""Learning without resets: what practice adds to imitation, by which algorithm and whose reward."""
