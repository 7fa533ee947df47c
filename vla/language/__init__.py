"""How people say things: paraphrases of instructions, for training only; and what a policy that talks is asked."""
