"""`vla experiment NAME`: several arms over several seeds. Each experiment's flags are its configuration's fields."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from bascule.agents import AGENTS
from bascule.commands.base import Command, check_file, check_numbers, stays
from bascule.commands.measuring.evaluate import tell_seeds
from envs.seeds import DEMO_BLOCK, TRAIN_SEED_LIMIT
from vla.core.checkpoint import weights_digest
from vla.core.config import unknown

_BOUNDS: dict[str, tuple[float, float]] = {
    "seeds": (0, TRAIN_SEED_LIMIT // DEMO_BLOCK - 1), "seed0": (0, 2**53), "demos": (1, 1_000_000), "steps": (1, 10**9),
    "logs": (1, 1_000_000), "corrected": (1, 999),
    "start_steps": (1, 10**9), "tuned_steps": (1, 10**9), "align_steps": (0, 10**9),
    "seconds": (1, 10**9), "batch_size": (1, 1_000_000),
    "frames": (1, 64), "talk_episodes": (1, 10_000_000), "episodes": (1, 10_000_000),
    "num_envs": (1, 100_000), "workers": (1, 1024), "control_steps": (1, 10**12),
    "validation_episodes": (1, 10_000_000), "logged_episodes": (1, 1_000_000), "offline_steps": (0, 10**9),
    "decisions": (1, 10**9),
}  # fmt: skip
"""The ranges of numbers, whichever experiment has them. Each of `seeds` has a block of demonstration scenes."""


@dataclass(frozen=True)
class Experiment(Command):
    """Run an experiment over several arms and seeds; `vla experiment --help` lists them."""

    out: Path = Path("runs/experiment")
    """Folder for the finished runs; repeating the command continues there."""
    json: Path | None = None
    """Write the result to this file too."""

    name: ClassVar[str] = ""
    """The experiment's; the class of an experiment has a field `config` beside it."""

    @classmethod
    def variant(cls, args: list[str]) -> tuple[type[Command], list[str]]:
        """The command of the experiment that the first argument names. ValueError where it names none; SystemExit
        after the list for `--help`."""
        from bascule.experiments.registry import EXPERIMENTS

        if not args or args[0] in ("-h", "--help"):
            width = max(map(len, EXPERIMENTS)) + 2
            lines = [f"  {name:<{width}}{entry.about}" for name, entry in EXPERIMENTS.items()]
            usage = "usage: vla experiment NAME [OPTIONS]    (vla experiment NAME --help explains them)"
            if not args:
                raise ValueError(f"NAME is required: one of {', '.join(EXPERIMENTS)}")
            print("\n".join([usage, "", str(cls.__doc__).partition(";")[0] + ".", "", *lines]))
            raise SystemExit(0)
        if args[0].startswith("-"):
            raise ValueError(f"NAME comes first: vla experiment NAME {args[0]} ...")
        if args[0] not in EXPERIMENTS:
            raise ValueError(unknown(args[0], EXPERIMENTS, "experiment"))
        return command_of(args[0]), args[1:]

    def run(self) -> None:
        """Run what is missing, print the table and write --json. ValueError for flags it does not take."""
        from bascule.experiments.registry import EXPERIMENTS

        config, perform = self.config, EXPERIMENTS[self.name].perform
        check_numbers(config, **{name: _BOUNDS[name] for name in vars(config) if name in _BOUNDS})
        _check_settings(config)
        check_file("--json", self.json)
        checkpoints = self._checkpoints()
        if (seed0 := getattr(config, "seed0", None)) is not None:
            tell_seeds(seed0, config.episodes)
        from policies.load import backbone_named
        from vla.core.config import save_json
        from vla.model.config import retirement
        from vla.runtime.console import format_rate, progress, say, stdout, table
        from vla.runtime.provenance import provenance

        if note := retirement(getattr(config, "backbone", "")):
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

    def _checkpoints(self) -> list[Path]:
        """The folders of the policies that are no scripted agents. ValueError for a suite or policies that do not
        exist, or for one policy as two training seeds, before any run begins."""
        from envs.registry import load_suite
        from policies.load import checkpoint

        load_suite(self.config.suite)
        from bascule.experiments.arms import arms_of

        agents = AGENTS if self.name in ("robustness", "words") else ()
        found = []
        for arm, policies in arms_of(getattr(self.config, "policy", ())).items():
            folders = [checkpoint(policy, agents) for policy in policies if policy not in agents]
            each = [weights_digest(folder) for folder in folders]
            if len(set(each)) < len(each):
                raise ValueError(
                    f"the policies of arm '{arm}' are the same: they would count as several training seeds"
                )
            found += folders
        return found

    def kept(self) -> str:
        """Finished runs are kept after Ctrl-C."""
        return stays(self.out, f"finished runs stay in {self.out}; the same command continues")


@cache
def command_of(name: str) -> type[Experiment]:
    """The command `vla experiment NAME`: --out and --json, and the fields of the experiment's configuration."""
    from bascule.experiments.registry import EXPERIMENTS

    entry = EXPERIMENTS[name]
    config = Annotated[entry.config, tyro.conf.OmitArgPrefixes]
    return make_dataclass(
        "Experiment", [("config", config, field(default_factory=entry.config))], bases=(Experiment,), frozen=True,
        namespace={"name": name, "__doc__": f"{entry.config.__doc__}"},
    )  # fmt: skip


def _check_settings(config: Any) -> None:
    """ValueError for a name or number that a list has twice, whose episodes would be counted as others of the same; and
    for settings of which the experiment says itself that they are none."""
    for name, values in vars(config).items():
        if isinstance(values, tuple) and len(set(values)) < len(values):
            twice = next(value for k, value in enumerate(values) if value in values[:k])
            raise ValueError(f"--{name.replace('_', '-')} names {twice} twice, and would count it twice: name it once")
    if hasattr(config, "problem") and (problem := config.problem()):
        raise ValueError(problem)


def _cell(counts: dict[str, Any], column: str) -> Any:
    """A column of an arm: a count that has an interval as a rate, everything else as it is."""
    from vla.runtime.console import format_rate

    interval = counts.get(f"{column}_wilson95")
    if interval is None:
        return "" if counts.get(column) is None else counts[column]
    return format_rate({"successes": counts[column], "episodes": counts["episodes"], "wilson95": interval})
