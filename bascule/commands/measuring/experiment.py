"""`vla experiment`: several arms over several seeds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from bascule.agents import AGENTS
from bascule.commands.base import Command, check_file, check_numbers, given, stays
from bascule.commands.measuring.evaluate import tell_seeds
from vla.core.config import lookup


@dataclass(frozen=True)
class Experiment(Command):
    """Run experiments: ablation, bridgevla, distil, l2m, latency, memory, peers, rl, robustness, talk, words, xyz."""

    name: Positional[str]
    """ablation: variants of bridge attention; bridgevla: heat-maps beside chunks, from three demonstrations of a task;
    distil: students of a privileged teacher; l2m: tasks learnt one after another, and what is left of those learnt
    before; latency: delayed answers of the policy; memory: policies that remember, by which decisions they look at
    again; peers: LeRobot's ACT and Diffusion on the same demonstrations within the same budgets; rl: variants of online
    RL; robustness: perturbed environments; talk: policies that answer questions while they act; words: sentences that
    no training text has, and such that name nothing in sight; xyz: places in the robot's frame before cameras that
    stand elsewhere."""
    out: Path = Path("runs/experiment")
    """Folder for the finished runs; repeating the command continues there."""
    json: Path | None = None
    """Write the result to this file too."""
    arms: tuple[str, ...] | None = None
    """The variants to compare. Default: the experiment's own."""
    policy: tuple[Path, ...] | None = None
    """latency, robustness, words: checkpoints to evaluate. robustness, words: ARM=CHECKPOINT, once a training seed, for
    the policies of one arm."""
    axes: tuple[str, ...] | None = None
    """robustness: axes of `vla eval --perturb`; by default all."""
    conditions: tuple[str, ...] | None = None
    """latency: the delays; by default 0 to 300 ms, jitter, stalls and drops. robustness: severities from 0 to 1.
    peers: the budgets, of seconds, steps; by default both."""
    suite: str | None = None
    """bridgevla, l2m, latency, memory, peers, robustness, talk, words, xyz: the suite to evaluate in."""
    known_tasks: tuple[str, ...] | None = None
    """l2m: tasks of the suite that the policy learns first, together; by default the first half."""
    new_tasks: tuple[str, ...] | None = None
    """l2m: tasks that it learns later, in this order; by default the others."""
    seeds: tuple[int, ...] | None = None
    """ablation, bridgevla, distil, l2m, memory, peers, rl, talk, xyz: seeds of the training runs; each has
    demonstrations of its own."""
    seed0: int | None = None
    """latency: seed of the first scene; by default the suite's first evaluation seed."""
    demos: int | None = None
    """ablation, distil, memory, peers, rl, talk, xyz: number of demonstrations; bridgevla, l2m: of each task."""
    backbone: str | None = None
    """ablation, bridgevla, distil, l2m, memory, peers, rl, talk, xyz: backbone of our policies, see `vla list
    backbones`. Default: small."""
    recipe: str | None = None
    """peers: recipe of our imitation. Default: tabletop-few."""
    seconds: int | None = None
    """peers: budget of every arm in seconds of learning, which one core computes; on a GPU by the wall's clock."""
    steps: int | None = None
    """ablation, distil, memory, rl, talk, xyz: gradient steps of imitation; l2m: of the known tasks, and five times
    those of a new one; peers: budget of every arm; bridgevla: of the chunk policy."""
    batch_size: int | None = None
    """peers: frames of a gradient step, of LeRobot's policies and, at equal steps, of all."""
    align_steps: int | None = None
    """distil: the first of these steps, in which students are aligned with their teacher."""
    frames: int | None = None
    """memory: how many earlier decisions a policy looks at."""
    cameras: tuple[str, ...] | None = None
    """xyz: the cameras that the policies read. Default: front, the one that stands elsewhere."""
    episodes: int | None = None
    """Evaluation scenes, the same for all arms; l2m: of each task."""
    num_envs: int | None = None
    """Environments that play at the same time."""
    workers: int | None = None
    """Worker processes that step the environments."""
    control_steps: int | None = None
    """rl: budget of every arm in control steps, summed over all environments."""

    def run(self) -> None:
        """Run what is missing, print the table and write --json. ValueError for flags it does not take."""
        from bascule.experiments.registry import EXPERIMENTS

        make, perform = lookup(self.name, EXPERIMENTS, "experiment")
        check_numbers(
            self, seeds=(0, 2**31), seed0=(0, 2**53), demos=(1, 1_000_000), steps=(1, 10**9), align_steps=(0, 10**9),
            seconds=(1, 10**9), batch_size=(1, 1_000_000), frames=(1, 64),
            episodes=(1, 10_000_000), num_envs=(1, 100_000), workers=(1, 1024), control_steps=(1, 10**12),
        )  # fmt: skip
        check_file("--json", self.json)
        config = self._config(make)
        checkpoints = self._checkpoints()
        if self.seed0 is not None:
            tell_seeds(self.seed0, getattr(config, "episodes", 1))
        from policies.load import backbone_named
        from vla.core.config import save_json
        from vla.model.config import retirement
        from vla.runtime.console import format_rate, progress, say, stdout, table
        from vla.runtime.provenance import provenance

        if note := retirement(self.backbone or ""):
            say(f"note: {note}")
        with progress(self.name, unit="runs") as update:
            result = perform(config, self.out, lambda done, total, what: update(done, what, total=total))
        backbone = getattr(config, "backbone", "") or "; ".join(dict.fromkeys(map(backbone_named, checkpoints)))
        result |= provenance() | {"backbone": backbone}
        more = result.pop("columns")
        rows = [
            (arm, format_rate(counts), *(_cell(counts, name) for name in more))
            for arm, counts in result["arms"].items()
        ]
        title = f"{self.name}, seeds {', '.join(map(str, result['seeds']))}"
        stdout().print(table(title, ("arm", "success, Wilson 95%", *(name.replace("_", " ") for name in more)), rows))
        if self.json is not None:
            save_json(self.json, result)

    def _config(self, make: type[Any]) -> Any:
        """The experiment's configuration, from the flags given. ValueError for one that it does not take."""
        values = given(**{name: value for name, value in vars(self).items() if name not in ("name", "out", "json")})
        known = {field.name for field in fields(make)}
        if foreign := [name for name in values if name not in known]:
            raise ValueError(f"this experiment has no --{foreign[0].replace('_', '-')}")
        return make(**values)

    def _checkpoints(self) -> list[Path]:
        """The folders of the policies that are no scripted agents. ValueError for a suite or policies that do not
        exist, before any run begins."""
        from envs.registry import load_suite
        from policies.load import checkpoint

        if self.suite is not None:
            load_suite(self.suite)
        policies = list(map(str, self.policy or ()))
        if self.name in ("robustness", "words"):
            from bascule.experiments.arms import arms_of

            policies = [policy for arm in arms_of(policies).values() for policy in arm]
        agents = AGENTS if self.name in ("robustness", "words") else ()
        return [checkpoint(policy, agents) for policy in policies if policy not in agents]

    def kept(self) -> str:
        """Finished runs are kept after Ctrl-C."""
        return stays(self.out, f"finished runs stay in {self.out}; the same command continues")


def _cell(counts: dict[str, Any], column: str) -> Any:
    """A column of an arm: a count that has an interval as a rate, everything else as it is."""
    from vla.runtime.console import format_rate

    interval = counts.get(f"{column}_wilson95")
    if interval is None:
        return counts.get(column, "")
    return format_rate({"successes": counts[column], "episodes": counts["episodes"], "wilson95": interval})
