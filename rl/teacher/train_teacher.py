"""The teacher's phase of a run: imitation of the demonstrations, then PPO where that is not good enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rl.configs.run import RunnerConfig
from rl.configs.teacher import TeacherPPOConfig
from rl.rollout.curriculum import make_curriculum
from rl.rollout.step_collector import Collector, successes
from rl.teacher.state_teacher import Teacher, TeacherPolicy, fit_teacher
from rl.teacher.teacher_ppo import rendering_disabled, train_teacher_ppo
from vla.processing.processor import Processor
from vla.runtime.distributed import Team

if TYPE_CHECKING:
    from vla.data.lerobot_dataset import DemoSet


def train_teacher(
    demos: DemoSet,
    processor: Processor,
    collector: Collector,
    config: RunnerConfig,
    *,
    team: Team,
    seconds: Callable[[], float],
    on_update: Callable[[dict[str, float]], None] | None = None,
) -> tuple[Teacher, dict[str, Any]]:
    """Return the frozen teacher of a run with a `guide`, and a report of its success on training scenes.

    The PPO's control steps are added to `collector`'s. `seconds()` is the run's wall clock so far. ValueError if the
    demonstrations lack the simulator's state, or hold another number of it than the worlds.
    """
    env, actor, guide = collector.env, collector.actor, config.guide
    assert guide is not None, "the run has no teacher"
    known = demos.privileged
    if known is not None and known.shape[1] != env.privileged_dim:
        raise ValueError(
            f"the demonstrations hold {known.shape[1]} numbers of the simulator's state, the worlds of "
            f"{config.suite} have {env.privileged_dim}: give demonstrations of this suite"
        )
    teacher = fit_teacher(demos, processor, actor.chunk_size, guide.teacher, plane=env.plane, seed=config.seed)
    teacher.to(actor.device)

    def evaluate() -> dict[str, int]:
        rounds = [collector.next_seeds(env.num_envs) for _ in range(max(1, 96 // config.num_envs))]
        policy = TeacherPolicy(teacher, actor, env.action_spec, collector.n_action_steps)
        return {"successes": successes(policy, env, rounds, team), "episodes": len(rounds) * config.num_envs}

    def out_of_budget(control_steps: int) -> bool:
        late = config.max_seconds is not None and seconds() >= ppo.share * config.max_seconds
        if team.any(late):
            report["cut_short"] = True  # by the clock, so another machine would have trained it further
            return True
        limited = config.max_env_steps is not None
        return limited and team.total(float(control_steps))[0] >= ppo.share * config.max_env_steps

    ppo: TeacherPPOConfig | None = guide.practice
    report: dict[str, Any] = {"demonstrations": len(demos.episodes)}
    with rendering_disabled(env):
        reached = imitation = evaluate()
        if ppo is not None and (ppo.enough is None or _rate(reached) < ppo.enough):
            before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
            steps = train_teacher_ppo(
                teacher,
                processor,
                env,
                ppo,
                train_seeds=config.train_seeds,
                n_action_steps=collector.n_action_steps,
                curriculum=make_curriculum(config.curriculum, env, config.seed, team.rank),
                seed=config.seed,
                team=team,
                success_rate=lambda: _rate(evaluate()),
                out_of_budget=out_of_budget,
                on_update=on_update,
            )
            collector.env_steps += steps  # teacher training counts towards env_steps
            report |= {"imitation": imitation, "control_steps": int(team.total(float(steps))[0])}
            reached = evaluate()
            if _rate(reached) < _rate(imitation):  # the reward taught it nothing: keep the imitation
                teacher.load_state_dict(before)
                reached = imitation
    collector.forget_worlds()
    return teacher, report | reached


def _rate(played: dict[str, int]) -> float:
    return played["successes"] / played["episodes"]
