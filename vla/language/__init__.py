"""How people say things: paraphrases of instructions, for training only."""
