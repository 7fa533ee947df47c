"""`vla rl reset-free`: a task and its undo practised without resets, after learning from logs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bascule.commands.base import Command, check_numbers, from_flags, given, refuse_idle, stays
from bascule.commands.robots import arm_of, robot_of
from rl.configs.offline import AgentConfig, ResetFreeConfig
from vla.core.checkpoint import CONFIG
from vla.runtime.locks import refuse_used

_RUN, _AGENT = ResetFreeConfig(), AgentConfig()
_EPISODE_S = 15.0
_THINKS_S = 10.0
"""Longest hold in seconds before the control loop stops a robot: the agent learns meanwhile."""


@dataclass(frozen=True)
class ResetFree(Command):
    """Practise a task and its undo without resets, rewarded by a success classifier that is learnt from logs."""

    init: Path
    """Checkpoint of imitation to start from."""
    demos: Path
    """Folder of the demonstrations that it learnt from: the agent and the classifier learn from them, too."""
    embodiment: str | None = None
    """The robot to practise with, for a checkpoint trained for several; the result is a policy for this robot only."""
    suite: str = _RUN.suite
    """The suite to practise in."""
    forward: str = _RUN.pair[0]
    """The task, one of the suite's."""
    undo: str = _RUN.pair[1]
    """The task that undoes it; the two take turns."""
    out: Path = Path("runs/reset-free")
    """The folder of the run: OUT/policy is the policy, OUT/classifier says when a task is done."""
    algorithm: str = _AGENT.algorithm
    """cal-ql: conservative values, pushed down no further than what the data returned; cql: the same without that
    bound; awac: imitation weighted by advantages; rlpd: neither, half of every batch logged data;
    filtered: imitation of what was rewarded in the end."""
    reward: str = _RUN.reward
    """classifier: learnt from the logs; simulator: the simulator's word; shuffled: a classifier learnt from shuffled
    labels, a control that must fail."""
    classifier: tuple[Path, ...] = ()
    """Who rewards, instead of a classifier learnt from the logs: OUT/classifier of an earlier run, or two reward
    classifiers that LeRobot trained, that of the task and that of its undo (they read no instruction)."""
    decisions: int = _RUN.decisions
    """Chunks executed while practising, over all environments."""
    logged_episodes: int = _RUN.logged_episodes
    """Episodes of the initial policy that are logged with their outcomes before anything is learnt."""
    offline_steps: int = _RUN.offline_steps
    """Critic updates on demonstrations and logs before practising."""
    reset_every: int = _RUN.reset_every
    """Episodes of an environment between real resets, which are counted."""
    num_envs: int = _RUN.num_envs
    """Environments that play at the same time."""
    workers: int = 1
    """Processes that simulate."""
    episodes: int = 50
    """Scenes on which true success in each of the two tasks is measured: at the start, at the switch to online learning
    and at the end. They are for validation; `vla eval` reports on others."""
    seed: int = 0
    """Seed of scenes, exploration and fresh weights."""
    resume: bool = False
    """Continue the run in OUT, bit-exactly from its last scheduled reset; start it if there is none yet. With a robot
    it goes on from the last checkpoint, with things put back."""
    robot: str | None = None
    """Practise with one robot in real time, not in environments: a type of LeRobot's or MODULE:CLASS, as for `vla
    control`, and then --forward and --undo are instructions in words; or "simulated", the suite's. A person at the
    terminal puts things back, presses space when a task is done, and any other key to stop the robot."""
    robot_args: dict[str, str] = field(default_factory=dict)
    """Arguments of a LeRobot robot, as for `vla control`."""
    limits: tuple[str, ...] = ()
    """NAME:LOW:HIGH of a LeRobot robot's actions, as for `vla control`."""
    switches: tuple[str, ...] = ()
    """A LeRobot robot's on/off commands, e.g. gripper.pos."""
    hz: float | None = None
    """Rate in Hz at which the robot is commanded. Default: 50."""
    episode_s: float | None = None
    """Longest duration of a robot's episode in seconds. Default: the suite's, or 15."""
    velocity: dict[str, float] = field(default_factory=dict)
    """Largest speeds of a robot: component and action units per second."""
    acceleration: dict[str, float] = field(default_factory=dict)
    """Largest accelerations of a robot: component and action units per second squared."""
    workspace: tuple[str, ...] = ()
    """Ranges in which a robot's measured state must stay: NAME:LOW:HIGH."""
    estop_file: Path | None = None
    """Emergency stop of a robot: it is disconnected as soon as this file exists."""

    def run(self) -> None:
        """Practise, write OUT/policy and print how success went. ValueError for invalid arguments."""
        config = self._config()
        refuse_used(self.out / "last" / CONFIG, self.out, "a run", resume=self.resume)
        from bascule.catalogue import trained
        from envs.registry import load_suite
        from policies.load import chosen_embodiment

        init = trained(self.init)
        member = chosen_embodiment(init, self.embodiment)
        if self.robot in (None, "simulated"):
            suite = load_suite(self.suite)
            for task in config.pair:
                if task not in suite.tasks:
                    raise ValueError(f"suite {self.suite!r} has no task {task!r}; it has: {', '.join(suite.tasks)}")
        if not (self.demos / "meta" / "info.json").is_file():
            raise ValueError(f"--demos {self.demos} is not a folder of demonstrations: it has no meta/info.json")
        if self.robot in (None, "simulated"):
            from bascule.teachers import refuse_other_suite

            refuse_other_suite(self.demos, self.suite)
        import torch

        from vla.core.config import save_json
        from vla.model.model import VLA
        from vla.runtime.console import progress, say

        arm = arm_of(self) if self.robot != "simulated" else None
        vla = VLA.load(init, member=member)
        vla.members = {}  # the weights they share are refined for one of them
        torch.set_num_threads(1)  # small tensors: a second thread costs more than it saves
        judge = None
        if self.classifier:
            from bascule.practice.classifiers import judge_of, told_apart

            judge = judge_of(self.classifier, vla.config.backbone, vla.processor.config.cameras)
            config = replace(config, rewarded_by=told_apart(self.classifier))
        with ExitStack() as open_ones, progress("reset-free", config.decisions, unit="decisions") as update:
            learn = self._in_environments if self.robot is None else self._on_robot
            outcome = learn(
                vla, arm, config, open_ones, judge=judge, resume=self.resume,
                on_window=lambda row: update(row["decisions"], _told(row)),
            )  # fmt: skip
        save_json(self.out / "outcome.json", vars(outcome))
        self._report(outcome)
        resets = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in outcome.resets.items())
        say(f"episodes began with a reset or without: {resets}")
        say(f"policy in {self.out / 'policy'}")

    def _in_environments(self, vla: Any, arm: None, config: ResetFreeConfig, open_ones: ExitStack, **more: Any) -> Any:
        from envs import make_vec
        from envs.sim.render_options import drawn_for
        from rl.offline.session import learn_without_resets
        from vla.data.lerobot_dataset import load_dataset
        from vla.model.policy import VLAPolicy

        worlds = make_vec(self.suite, self.num_envs, num_workers=self.workers, **drawn_for(VLAPolicy(vla)))
        open_ones.callback(worlds.close)
        referee = self._referee(vla, config, open_ones)
        return learn_without_resets(vla, worlds, load_dataset(self.demos), config, self.out, evaluate=referee, **more)

    def _referee(self, vla: Any, config: ResetFreeConfig, open_ones: ExitStack) -> Any:
        """True success in environments of its own."""
        from envs import make_vec
        from envs.seeds import VALIDATION_SEED0
        from envs.sim.render_options import drawn_for
        from rl.offline.session import true_success
        from vla.model.policy import VLAPolicy

        referee = make_vec(self.suite, self.num_envs, num_workers=self.workers, **drawn_for(VLAPolicy(vla)))
        open_ones.callback(referee.close)
        return true_success(vla, referee, config.pair, range(VALIDATION_SEED0, VALIDATION_SEED0 + self.episodes))

    def _on_robot(self, vla: Any, arm: Any, config: ResetFreeConfig, open_ones: ExitStack, **more: Any) -> Any:
        from bascule.practice.attendants import Attendant, Itself, Person
        from bascule.practice.robot_world import RobotWorld
        from envs.registry import load_suite
        from envs.seeds import RL_TRAIN_SEEDS
        from policies.control.config import ControlConfig, check_estop_file, limits_by_name
        from policies.control.guards import GuardConfig
        from rl.offline.run import Draws
        from rl.offline.session import practise, refuse_unfit
        from vla.core.compatibility import require_same
        from vla.data.lerobot_dataset import load_dataset
        from vla.model.policy import VLAPolicy
        from vla.runtime.console import say

        refuse_unfit(vla)
        check_estop_file(self.estop_file)
        policy = VLAPolicy(vla, n_action_steps=config.n_action_steps)
        attendant: Attendant
        if self.robot == "simulated":
            robot = self._simulated(policy, config)
            attendant = Itself(robot)
        else:
            robot = robot_of(self, policy, arm, instruction=self.forward)
            attendant = Itself(robot) if hasattr(robot, "put_back") else Person(config.pair)
        open_ones.callback(robot.disconnect)
        require_same(policy, robot, where="robot", rates=False, ranges=False)
        guards = from_flags(
            GuardConfig, self, workspace=limits_by_name(self.workspace, "--workspace"), give_up_s=_THINKS_S
        )
        seconds = self.episode_s or (_EPISODE_S if self.robot != "simulated" else None)
        hz = policy.spec.action_spec.control_hz
        steps = load_suite(self.suite).horizon if seconds is None else max(1, round(seconds * hz))
        config = replace(config, horizon=steps)
        control = ControlConfig(
            policy_hz=hz, n_action_steps=config.n_action_steps, estop_file=self.estop_file, guards=guards
        )
        world = RobotWorld(robot, policy, attendant, control, reset_every=config.reset_every, horizon=config.horizon)
        open_ones.callback(world.close)
        return practise(
            vla, world, load_dataset(self.demos), config, self.out, draws=Draws(config.seed, RL_TRAIN_SEEDS),
            evaluate=self._referee(vla, config, open_ones) if config.evaluate_at else dict,
            on_logged=lambda count: say(f"{count} of {config.logged_episodes} episodes logged"), **more,
        )  # fmt: skip

    def _simulated(self, policy: Any, config: ResetFreeConfig) -> Any:
        from bascule.practice.simulated import SimulatedRobot
        from envs.make import worlds_class
        from envs.registry import load_suite
        from envs.sim.render_options import pictures_for

        return SimulatedRobot(
            self.suite, config.pair, control_hz=self.hz or 50.0, seed=self.seed, image_size=pictures_for(policy),
            proprio_names=worlds_class(load_suite(self.suite)).proprio_names,  # type: ignore[attr-defined]
        )  # fmt: skip

    def _config(self) -> ResetFreeConfig:
        """The run. ValueError for numbers and names that make none."""
        check_numbers(
            self, decisions=(1, 10**9), logged_episodes=(1, 10**6), offline_steps=(0, 10**9), num_envs=(1, 100_000),
            reset_every=(1, 10**6), workers=(1, 1024), episodes=(1, 10**6), seed=(0, 2**31),
        )  # fmt: skip
        if self.classifier and self.reward != _RUN.reward:
            raise ValueError(f"--classifier changes nothing with --reward {self.reward}: leave one of them out")
        if self.forward == self.undo:
            raise ValueError(f"--undo must undo --forward, and both are '{self.undo}': name two tasks")
        self._check_robot()
        config = replace(
            _RUN, pair=(self.forward, self.undo), agent=replace(_AGENT, algorithm=self.algorithm),
            **given(
                suite=self.suite, reward=self.reward, decisions=self.decisions, offline_steps=self.offline_steps,
                logged_episodes=self.logged_episodes, num_envs=self.num_envs, reset_every=self.reset_every,
                seed=self.seed,
            ),
        )  # fmt: skip
        if self.robot is not None:
            config = self._with_robot(config)
        if problem := config.problem():
            raise ValueError(problem)
        return config

    def _check_robot(self) -> None:
        """ValueError for flags of a robot where there is none, and the other way round."""
        check_numbers(self, hz=(0.1, 100_000), episode_s=(0.1, 1e6))
        described = ("robot_args", "limits", "switches")
        if self.robot is None:
            limited = ("hz", "episode_s", "velocity", "acceleration", "workspace", "estop_file")
            refuse_idle(self, "without --robot", *described, *limited)
        elif self.robot == "simulated":
            refuse_idle(self, "with the simulated robot", *described)
        else:
            where = f"with --robot {self.robot}: it is of simulated environments"
            refuse_idle(self, where, "suite", "num_envs", "workers", "episodes")
            for option, words, usual in (("forward", self.forward, _RUN.pair[0]), ("undo", self.undo, _RUN.pair[1])):
                if words == usual or not words.strip():
                    raise ValueError(f"--robot {self.robot} needs --{option}: say in words what the robot is to do")

    def _with_robot(self, config: ResetFreeConfig) -> ResetFreeConfig:
        """The run with one robot, which learns after every chunk, and is evaluated only where it is simulated."""
        simulated = self.robot == "simulated"
        return replace(
            config, num_envs=1, updates_per_decision=1.0, window=100, suite=self.suite if simulated else self.robot,
            evaluate_at=config.evaluate_at if simulated else (),
        )  # fmt: skip

    def _report(self, outcome: Any) -> None:
        from envs.evaluation.evaluate import Count
        from vla.runtime.console import format_rate, say, stdout, table

        if not outcome.evaluations:  # a robot's
            episodes, judged, said = (
                sum(row.get(name, 0) for row in outcome.windows) for name in ("episodes", "judged", "successes")
            )
            say(f"practised {episodes} episodes: {judged} done by the classifier's word, {said} by whoever watched")
            return
        rows = [
            (row["when"], row["decisions"], *(format_rate(Count(*count).to_dict()) for count in row["tasks"].values()))
            for row in outcome.evaluations
        ]
        stdout().print(table("true success", ("", "decisions", self.forward, self.undo), rows))

    def kept(self) -> str:
        """The last checkpoint is kept after Ctrl-C."""
        told = f"the last checkpoint stays in {self.out}; add --resume to continue"
        return stays(self.out / "last" / CONFIG, told)


def _told(row: dict[str, Any]) -> str:
    return f"{row.get('successes', 0)} of {row.get('episodes', 0)} done"
