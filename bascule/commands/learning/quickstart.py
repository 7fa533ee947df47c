"""`vla quickstart`: demonstrations, imitation, online RL and serving in a row."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bascule.commands.base import Command, given, stays
from bascule.quickstart.config import QuickstartConfig
from vla.core.paths import quoted


@dataclass(frozen=True)
class Quickstart(Command):
    """Teach a policy from demonstrations, refine it by online RL, serve it; writes report.html."""

    out: Path = Path(QuickstartConfig.out)
    """The folder for everything that the run makes."""
    resume: bool = False
    """Continue the run in OUT with its first stage that is not done; start it if there is none yet."""
    suite: str | None = None
    """The suite to learn and to be measured in. Default: tabletop-pick."""
    recipe: str | None = None
    """tabletop; or tabletop-robust: randomised demonstrations and RL, measured in perturbed environments, too
    (15 minutes). Default: tabletop."""
    backbone: str | None = None
    """Another backbone than the recipe's: a name (`vla list backbones`) or a folder."""
    seed: int | None = None
    """Seed of demonstrations, weights and RL. Default: 0."""
    demos: int | None = None
    """Number of demonstrations. Default: 20, scarce on purpose: many leave RL little to do."""
    imitation_steps: int | None = None
    """Gradient steps of imitation. Default: 700; tabletop-robust: 800."""
    rl_updates: int | None = None
    """Updates of online RL. Default: 16 (four minutes on idle cores); tabletop-robust: 18 (eight minutes)."""
    rl_seconds: float | None = None
    """Limit of online RL's time. Default: 960; tabletop-robust: 1920; many tasks, robosuite: 240, no updates."""
    eval_episodes: int | None = None
    """Scenes on which each policy is measured. Default: 400."""
    control_episodes: int | None = None
    """Scenes of each control. Default: 200."""
    served_episodes: int | None = None
    """Scenes that are played through the policy server. Default: 12."""
    workers: int | None = None
    """Processes that simulate. Default: 2."""
    smoke: bool = False
    """Everything once, with tiny budgets: proves that it runs, teaches nothing."""

    def run(self) -> int | None:
        from bascule.quickstart.job import quickstart

        asked = {name: value for name, value in vars(self).items() if name != "resume" and value is not False}
        asked = given(**asked | {"out": str(self.out)})
        report = quickstart(QuickstartConfig(**asked), resume=self.resume, given=asked)
        if failed := [stage for stage in report["stages"] if stage["state"] == "failed"]:
            told = "; ".join(f"{stage['name']}: {stage['reason']}" for stage in failed)
            print(f"vla: error: {told}; vla quickstart --resume --out {quoted(self.out)} tries again", file=sys.stderr)
            return 1
        return None

    def kept(self) -> str:
        told = f"what finished stays in {self.out}; vla quickstart --resume --out {quoted(self.out)} goes on"
        return stays(self.out, told)
