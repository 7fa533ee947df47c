"""Recipes of online RL: functions returning a `RunnerConfig`. Look one up by name in `RECIPES`.

The budget is a number of updates (or control steps), so that a busy machine takes longer and learns as much; the time
limit is about four times what two idle CPU cores need. Recipes of which no such number is known have a budget of
seconds, and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from envs.seeds import RL_TRAIN_SEEDS
from rl.configs.learning import ActorConfig, CriticConfig, FilteredConfig, GRPOConfig, PPOConfig
from rl.configs.rewards import ShapingConfig
from rl.configs.run import CurriculumConfig, RunnerConfig
from rl.configs.teacher import DistillConfig, TeacherConfig, TeacherPPOConfig


def tabletop_pick() -> RunnerConfig:
    """Language-conditioned picking from an imitation policy at 40-80%, in minutes on two CPU cores.

    Its 60 updates are some 200,000 control steps: more than the 4-minute runs of BENCHMARKS.md, fewer than the longer.
    """
    return RunnerConfig(
        suite="tabletop-pick",
        num_envs=48,
        decisions_per_update=20,
        n_action_steps=4,
        max_updates=60,
        max_seconds=3600.0,
        eval_every=20,
        target_success=0.99,
        # Far less noise learns far less: with 0.7 of it 77% after 130k steps, where this has 94%
        # (docs/research-log.md).
        calibrate_scales=(1.0, 0.5),
        calibrate_keep=0.4,
        calibrate_episodes=48,
        actor=ActorConfig(motion_std=0.2, gripper_std=0.4, correlation=0.5, refiner_width=256),
        critic=CriticConfig(hidden=(256, 256)),
        ppo=PPOConfig(
            lr=6e-4,
            critic_lr=1e-3,
            # With all before the refiner computed once, epochs are nearly free; the KL stop decides how many are run.
            epochs=16,
            critic_epochs=20,
            minibatch_size=480,
            clip=0.2,
            kl_stop=0.08,
            anneal_updates=50,
            gamma=0.985,
            lam=0.9,
            # Success is counted within the horizon, and the critic sees the clock: running out of time is a failure,
            # and bootstrapping past it would tell the policy otherwise.
            time_limit="terminal",
            critic_warmup=2,
            max_grad_norm=0.5,
        ),
    )


def _guided(config: RunnerConfig, guide: DistillConfig) -> RunnerConfig:
    """Add distillation of a teacher; the reward then corrects details: less noise, smaller steps, less variance."""
    return replace(
        config,
        calibrate_scales=(),
        actor=replace(config.actor, motion_std=0.1, gripper_std=0.2, refiner_width=512),
        ppo=replace(
            config.ppo, lr=1e-4, kl_stop=0.04, average_decay=0.8, lam=0.5, critic_lam=0.95, critic_memory=8,
            critic_epochs=5,
        ),
        guide=guide,
    )  # fmt: skip


def tabletop_pick_guided() -> RunnerConfig:
    """Picking from one demonstration or more, with distillation of a privileged teacher; give --demos.

    The teacher reads state in the gripper's frame, imitates the demonstrations rotated about the vertical, too, and is
    then trained by PPO until it is good. Twenty demonstrations leave PPO nothing to do, one does.
    """
    # A demonstration in sixteen directions is learnt by heart in 1000 steps: then it knows one object's size only.
    teacher = TeacherConfig(origin="hand", turns=16, floor=0.1, steps=300)
    guide = DistillConfig(teacher=teacher, practice=_teacher_ppo(600_000), anneal_updates=45)
    # Twenty-four updates take six minutes on two idle cores; the quickstart's sixteen take four.
    return replace(_guided(tabletop_pick(), guide), max_updates=24, max_seconds=1440.0)


def tabletop_robust() -> RunnerConfig:
    """Picking in randomised environments, as `tabletop-pick-guided`; give --demos, randomised too.

    The teacher reads the simulator's state, so looks and noise reach the policy alone. Three of ten episodes are plain.
    Words come with noise, so that the policy goes where the backbone points in words that it has not heard, too.
    """
    # Of twelve runs that had eight minutes each, the median made 18 updates (16 to 24).
    return replace(
        tabletop_pick_guided(), randomise=("robust",), word_noise=1.0, max_updates=18, max_seconds=1920.0, eval_every=10
    )


def _teacher_ppo(env_steps: int) -> TeacherPPOConfig:
    """Teacher PPO with a loose KL stop: steps are cheap, so none is cut short before the teacher has moved."""
    practice = TeacherPPOConfig(env_steps=env_steps)
    return replace(practice, ppo=replace(practice.ppo, kl_stop=0.2))


def smoke() -> RunnerConfig:
    """Every branch in seconds: two updates of the critic, two of the policy. Learns nothing worth keeping."""
    return RunnerConfig(
        suite="tabletop-pick",
        num_envs=4,
        decisions_per_update=3,
        max_updates=4,
        eval_every=2,
        target_success=None,
        calibrate_scales=(1.0,),
        calibrate_episodes=4,
        ppo=PPOConfig(epochs=1, critic_epochs=1, minibatch_size=8, critic_warmup=2),
    )


def tabletop_pick_grpo() -> RunnerConfig:
    """Picking by GRPO: the other episodes of a group are the baseline, there is no critic."""
    return replace(
        tabletop_pick(),
        max_updates=None,  # an update is as many whole episodes as it needs
        max_env_steps=200_000,
        eval_every=4,
        method=GRPOConfig(
            lr=3e-4, epochs=8, minibatch_size=480, clip=0.2, clip_high=0.28, kl_stop=0.08, group_size=8,
            episodes_per_update=96, max_rounds=4,
        ),
    )  # fmt: skip


def tabletop_pick_filtered() -> RunnerConfig:
    """Picking by filtered behaviour cloning: imitation of the policy's own successes."""
    return replace(
        tabletop_pick(),
        max_updates=None,
        max_env_steps=200_000,
        eval_every=4,
        method=FilteredConfig(lr=3e-4, epochs=8, minibatch_size=480, episodes_per_update=96, max_rounds=4),
    )


def tabletop_pick_shaped() -> RunnerConfig:
    """Picking with a learnt process reward besides success."""
    return replace(tabletop_pick(), shaping=ShapingConfig())


def tabletop_pick_flow() -> RunnerConfig:
    """For a policy with a flow head: the head itself learns, as a chain of normals."""
    config = tabletop_pick()
    return replace(
        config,
        actor=replace(config.actor, refiner_width=0, trains="head", noise="flow"),
        ppo=replace(config.ppo, lr=1e-4, epochs=8),
    )


def tabletop_pick_tokens() -> RunnerConfig:
    """Picking by PPO over the tokens of a policy with `--head bins` or frequencies: one ratio a decision, VLA-RL's.

    A residual on the logits learns. The temperature is VLA-RL's; calibration lowers it where nearly all samples fail.
    """
    config = tabletop_pick()
    actor = replace(config.actor, noise="tokens", temperature=1.5, correlation=0.0)
    return replace(config, actor=actor, calibrate_scales=(1.0, 0.66, 0.33))


def tabletop_pick_decoupled() -> RunnerConfig:
    """Picking by PPO over tokens with a ratio for each of them and one value a decision: VL-DAC's."""
    config = tabletop_pick_tokens()
    return replace(config, ppo=replace(config.ppo, ratio="token"))


def multitask() -> RunnerConfig:
    """Many tasks in one policy, drawn by how they succeed; choose the suite with --suite, give --demos.

    With ten tasks each sees a tenth of every batch, and what the reward alone says of a step is mostly noise
    (docs/research-log.md). A teacher that has imitated the same demonstrations from the simulator's state says the
    rest.
    """
    config = _guided(tabletop_pick(), DistillConfig(minibatch_size=384, anneal_updates=280))
    return replace(
        config,
        suite="tabletop-mixed",
        # 45 minutes on one core: 525,000 to 585,000 control steps (BENCHMARKS.md)
        max_updates=150,
        max_seconds=10_800.0,
        eval_every=25,
        ppo=replace(config.ppo, anneal_updates=300, average_decay=0.9),
        curriculum=CurriculumConfig(rule="vla-rl", temperature=0.5, floor=0.3),
    )


def multitask_robust() -> RunnerConfig:
    """Many tasks in randomised environments, as `multitask`; give --demos, randomised too."""
    return replace(multitask(), randomise=("robust",), word_noise=1.0)


def multitask_few() -> RunnerConfig:
    """Many tasks from few demonstrations each: the teacher reads the gripper's frame and is trained by PPO first."""
    config = multitask()
    # Five demonstrations of each of ten tasks, teacher alone: 103 of 192 without the hand's view, 147 with it, 177
    # after 400 thousand control steps of practice. Three hundred in all are enough without either.
    teacher = TeacherConfig(origin="hand", floor=0.1, steps=300)
    assert config.guide is not None
    guide = replace(config.guide, teacher=teacher, practice=_teacher_ppo(800_000), anneal_updates=200)
    return replace(config, guide=guide, max_updates=125)  # the teacher's practice takes ten of the 45 minutes


def multitask_unguided() -> RunnerConfig:
    """Many tasks by the reward alone: no demonstrations are needed, and ten tasks learn next to nothing."""
    return replace(multitask(), guide=None)


def robosuite_lift() -> RunnerConfig:
    """robosuite's Lift from the imitation of ten demonstrations.

    A control step costs eight of the tabletop's: fewer environments, smaller batches, evaluations that are further
    apart. Its budget is an hour: runs ended at their target or by a shorter `--minutes`, so no number of updates is
    known.
    """
    config = tabletop_pick()
    return replace(
        config,
        suite="robosuite-lift",
        num_envs=24,
        decisions_per_update=25,
        max_updates=None,
        max_seconds=3600.0,
        eval_every=10,
        target_success=0.99,
        calibrate_scales=(),
        train_seeds=RL_TRAIN_SEEDS,
        actor=replace(config.actor, motion_std=0.15, gripper_std=0.4),
        ppo=replace(config.ppo, minibatch_size=300, anneal_updates=100),
    )


def robosuite_lift_guided() -> RunnerConfig:
    """robosuite's Lift with distillation of a privileged teacher that is trained by PPO first; give --demos.

    Its budget is an hour, as that of `robosuite-lift`; the target ended it after 13 to 16 minutes.
    """
    teacher = TeacherConfig(origin="hand", floor=0.02, steps=1000)
    guide = DistillConfig(teacher=teacher, practice=TeacherPPOConfig(env_steps=60_000), anneal_updates=45)
    return _guided(robosuite_lift(), guide)


RECIPES: dict[str, Callable[[], RunnerConfig]] = {
    "tabletop-pick": tabletop_pick,
    "tabletop-pick-grpo": tabletop_pick_grpo,
    "tabletop-pick-filtered": tabletop_pick_filtered,
    "tabletop-pick-shaped": tabletop_pick_shaped,
    "tabletop-pick-flow": tabletop_pick_flow,
    "tabletop-pick-tokens": tabletop_pick_tokens,
    "tabletop-pick-decoupled": tabletop_pick_decoupled,
    "tabletop-pick-guided": tabletop_pick_guided,
    "tabletop-robust": tabletop_robust,
    "multitask": multitask,
    "multitask-robust": multitask_robust,
    "multitask-few": multitask_few,
    "multitask-unguided": multitask_unguided,
    "robosuite-lift": robosuite_lift,
    "robosuite-lift-guided": robosuite_lift_guided,
    "smoke": smoke,
}
