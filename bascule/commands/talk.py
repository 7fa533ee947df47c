"""`vla talk-data`: questions about episodes, to learn to talk from; `vla ask`: one question to a policy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from bascule.commands.base import Command, check_numbers, refuse_idle
from vla.model.config import DEFAULT_PIXELS


@dataclass(frozen=True)
class TalkData(Command):
    """Play episodes and ask about moments of them, with the simulator's answers, for `vla train --talk`."""

    suites: Annotated[Positional[tuple[str, ...]], arg(metavar="SUITE")] = ("tabletop-pick", "tabletop-ten")
    """Tabletop suites to play, in turn; a name given twice has twice the share."""
    out: Path = Path("runs/talk-data")
    """The folder to write."""
    episodes: int = 1600
    """Number of episodes; three moments of each are asked about."""
    seed0: int = 0
    """Seed of the first scene; the next ones follow. Training uses seeds below 1,000,000."""
    wording: Literal["train", "heldout"] = "train"
    """How questions are worded: as in training, or in the wordings that are kept for tests."""
    workers: int = 2
    """Processes that play."""
    image_size: int = DEFAULT_PIXELS
    """Height and width of the pictures in pixels: what the policy's backbone reads."""
    randomise: tuple[str, ...] = ()
    """Domain randomisation, as of `vla demos`: light, medium or strong, and AXIS=FROM:TO to change a mix."""

    def run(self) -> None:
        """Play the episodes and write the set to `out`. ValueError for a suite that cannot be asked about."""
        check_numbers(self, episodes=(1, 10_000_000), seed0=(0, 2**52), workers=(1, 1024), image_size=(16, 4096))
        from envs.grounding.generate import labelled_randomisation
        from envs.grounding.talk_data import MOMENTS, check_askable, generate_talk
        from vla.runtime.console import progress

        check_askable(self.suites)
        with progress("episodes", self.episodes) as update:
            generate_talk(
                self.suites,
                self.episodes,
                self.out,
                seed0=self.seed0,
                num_workers=self.workers,
                image_size=self.image_size,
                wording=self.wording,
                perturb=labelled_randomisation(self.randomise),
                on_progress=lambda done, total: update(done),
            )
        print(f"{MOMENTS * self.episodes} moments in {self.out}: for vla train --talk {self.out}")

    def kept(self) -> str:
        """Nothing is kept after Ctrl-C."""
        return "nothing: the folder appears when it is complete"


@dataclass(frozen=True)
class Ask(Command):
    """Ask a policy that talks (`vla train --talk`) about a simulated scene in which it acts."""

    policy: Positional[str]
    """A checkpoint folder, or the address of a server: ws://HOST:PORT of a `vla serve`."""
    questions: Annotated[Positional[tuple[str, ...]], arg(metavar="QUESTION")]
    """One or more questions, each in quotes: "what are you doing?" "where is the bowl?"."""
    suite: str = "tabletop-pick"
    """The suite of the scene."""
    seed: int = 5_000_000
    """Seed of the scene."""
    decisions: int = 0
    """Let the policy act for so many decisions first; it stops where the episode ends."""
    task: str | None = None
    """The instruction. Default: the scene's own."""
    embodiment: str | None = None
    """The robot, for a policy trained for several."""
    api_key: str | None = None
    """The server's key. Default: $BASCULE_API_KEY."""

    def run(self) -> None:
        """Play, ask, and print a line for each answer. ValueError for a policy that cannot talk."""
        check_numbers(self, seed=(0, 2**53), decisions=(0, 100_000))
        if "://" in self.policy:
            refuse_idle(self, "with a server: it is of `vla serve`, which loads the policy", "embodiment")
        else:
            refuse_idle(self, f"with {self.policy}, which is no server", "api_key")
        if not self.questions:
            raise ValueError('say what to ask, in quotes: "what are you doing?"')
        from dataclasses import replace

        from envs.make import worlds_class
        from envs.registry import load_suite
        from envs.sim.render_options import RenderOptions, drawn_for
        from vla.core.compatibility import fitted
        from vla.core.types import executed
        from vla.language.talking import CANNOT, ask, checked_question
        from vla.runtime.console import say

        for question in self.questions:
            checked_question(question)
        suite = load_suite(self.suite)
        policy = self._policy()
        if not policy.spec.talks:
            raise ValueError(CANNOT)
        worlds = worlds_class(suite)(suite, 1, render=RenderOptions(**drawn_for(policy)))
        acts = fitted(policy, worlds, say=say)
        policy.reset()
        obs = worlds.reset(seeds=[self.seed])

        def told(obs: Any) -> Any:
            return obs if self.task is None else replace(obs, instruction=[self.task])

        for decided in range(self.decisions):
            if worlds.over[0]:
                say(f"the episode was over after {decided} of {self.decisions} decisions: this is its end")
                break
            obs = worlds.step_chunk(executed(acts.spec, acts.act(told(obs)))).obs
        print(f"instruction: {told(obs).instruction[0]}")
        for question in self.questions:
            answer = ask(acts, told(obs), [question])[0]
            print(f"{question} {answer.text} ({answer.confidence:.2f})")

    def _policy(self) -> Any:
        if "://" in self.policy:
            from policies.serving.client import PolicyClient

            return PolicyClient(self.policy, api_key=self.api_key or os.environ.get("BASCULE_API_KEY"))
        from policies.load import checkpoint, load_policy

        return load_policy(checkpoint(Path(self.policy)), self.embodiment)
