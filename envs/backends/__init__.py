"""N environments as one `VecEnv`, in CPU processes or on a GPU. May import every part of `envs` above but the
adapters' own suites."""
