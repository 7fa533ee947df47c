"""One process of a team, started by test_parallel.py (and able to be started by torchrun).

python one_of_several.py OUT
"""

import sys
import types
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORLDS = 8
DECISIONS = 4


def learner_on(num_envs, team, model):
    import torch

    from rl.algorithms.ppo import PPO
    from rl.configs.learning import PPOConfig
    from rl.models.critic import Critic
    from rl.models.vla_network import make_actor
    from tests.rl.toy import SPEC, PointReach

    actor, env = make_actor(model, SPEC.names), PointReach(num_envs)
    # processes start apart: what the first one holds must become everyone's
    torch.manual_seed(team.rank)
    critic = Critic(env.privileged_dim, env.proprio_dim)
    config = PPOConfig(
        epochs=1, critic_epochs=1, minibatch_size=10_000, critic_warmup=0, kl_stop=1e9, max_grad_norm=1e9
    )  # a clipped gradient would hide its size
    return PPO(actor, critic, config, generator=torch.Generator().manual_seed(0), team=team), env


def filled_buffer(num_envs, learner, env, team):
    import torch

    from rl.rollout.step_collector import Collector
    from rl.storage.rollout_buffer import RolloutBuffer

    worlds = Collector(
        learner.actor, env, generator=torch.Generator().manual_seed(5 + team.rank), train_seeds=(0, 1000),
        share=(team.rank, team.size),
    )  # fmt: skip
    buffer = RolloutBuffer(DECISIONS, num_envs)
    worlds.collect(buffer)
    return buffer


def after(learner):
    """Gradients of the one step, and what it made."""
    grads = {f"grad.{i}": p.grad for i, p in enumerate(learner.policy_parameters)}
    critic = {f"critic_grad.{n}": p.grad for n, p in learner.critic.named_parameters()}
    return {name: t.clone() for name, t in (grads | critic | learner.tensors()).items()}


def method_of(name):
    from rl.configs.learning import FilteredConfig, GRPOConfig

    return {
        "ppo": None,
        "guided": None,
        "grpo": GRPOConfig(lr=1e-3, epochs=2, minibatch_size=64, group_size=4, episodes_per_update=12, max_rounds=2),
        "filtered": FilteredConfig(lr=1e-3, epochs=2, minibatch_size=64, episodes_per_update=8, max_rounds=2),
    }[name]


def whole_run(out, method, team, *, max_updates, resume=False, folder=None):
    from rl.configs.teacher import DistillConfig, TeacherConfig, TeacherPPOConfig
    from rl.runner import Runner
    from tests.rl.toy import PointReach, ToyVLA, config, demos
    from vla.core.checkpoint import load_tensors

    model = ToyVLA()
    model.load_state_dict(load_tensors(out / "cloned.safetensors"))
    settings = config(max_updates=max_updates, num_envs=2 * WORLDS, calibrate_scales=(1.0, 0.5), calibrate_episodes=16)
    settings = replace(settings, method=method_of(method), max_env_steps=100_000)
    if method == "guided":
        teacher = TeacherConfig(count=1, width=32, steps=50)
        practice = TeacherPPOConfig(env_steps=1000, decisions_per_update=4)
        guide = DistillConfig(teacher=teacher, practice=practice, steps=5, minibatch_size=32, memory=40)
        settings = replace(settings, guide=guide)
    runner = Runner(
        model, PointReach(settings.num_envs // team.size), settings, out / (folder or method), team=team, demos=demos(),
        evaluate=lambda policy: (3 + team.rank, 10),
    )  # fmt: skip
    return runner, runner.run(resume=resume)


def main(out):
    import torch

    from tests.rl.toy import ToyVLA
    from vla.core.checkpoint import load_tensors, save_tensors
    from vla.runtime.distributed import Team, assemble

    out, team = Path(out), assemble(shard=False)
    torch.set_num_threads(1)
    model = ToyVLA()
    model.load_state_dict(load_tensors(out / "cloned.safetensors"))
    learner, env = learner_on(WORLDS, team, model)
    save_tensors(out / f"start-{team.rank}.safetensors", learner.tensors(), {})
    buffer = filled_buffer(WORLDS, learner, env, team)
    learner.update(buffer)
    rows = {name: buffer.flat(name) for name in buffer._rows}
    features = {f"features.{name}": t for name, t in buffer.stored_inputs.tensors().items()}
    save_tensors(out / f"rows-{team.rank}.safetensors", rows | features, {})
    save_tensors(out / f"after-{team.rank}.safetensors", after(learner), {})
    if team.rank == 0:  # on its own, for a resume in another process
        whole_run(out, "ppo", Team(), max_updates=2, folder="elsewhere")
    for method in ("ppo", "grpo", "filtered", "guided"):
        whole_run(out, method, team, max_updates=2)
        runner, result = whole_run(out, method, team, max_updates=4, resume=True)
        save_tensors(out / f"{method}-{team.rank}.safetensors", runner.learner.tensors(), {})
        assert result.evaluations[0] == (0, 7, 20), result.evaluations


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    package = types.ModuleType("tests")  # some installed package may be called so as well
    package.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = package
    main(*sys.argv[1:])
