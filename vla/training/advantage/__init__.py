"""Learning from episodes of mixed quality: a value model, labels, and a policy that is told them. RECAP's idea."""
