"""The main job: demonstrations, imitation, online RL and a served policy, in stages that resume. Not for commands."""
