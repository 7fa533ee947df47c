"""robosuite and Meta-World behind the `VecEnv` contract. May import `envs.sim`, `envs.perturb` and `envs.tabletop`."""
