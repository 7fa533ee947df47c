"""Grounding scenes of Meta-World: moments of its tasks, and which of the simulator's positions their words name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from envs.adapters.metaworld_env import MetaworldWorlds
from envs.adapters.metaworld_suites import MetaworldSuite, phrasings_of
from envs.grounding.expert_scenes import PlayedSampler
from envs.grounding.scene_sampler import Question

_COLUMNS = {"first": slice(4, 7), "second": slice(11, 14), "goal": slice(36, 39)}
"""Where Meta-World's observation has the position of its first thing, of its second, and of the goal (m, world)."""
_Source = Literal["first", "second", "goal"]


@dataclass(frozen=True)
class Named:
    """The thing to which the hand goes first in a task, and the place where it takes it, as instructions name them."""

    thing: str
    place: str = ""
    """Nothing for what is only moved, turned or pressed."""
    at: _Source = "first"
    to: _Source = "goal"


_BUTTON, _HANDLE, _LOCK, _FAUCET = Named("the red button"), Named("the handle"), Named("the lock"), Named("the faucet")
_PUCK, _GOAL = Named("the puck", "the goal"), Named("the red ball", at="goal")
_STICK = Named("the stick", "the thermos", to="second")
NAMED: dict[str, Named] = {
    "assembly": Named("the wrench", "the peg"),
    "basketball": Named("the basketball", "the hoop"),
    "bin-picking": Named("the puck", "the blue bin"),
    "box-close": Named("the lid", "the box"),
    "button-press": _BUTTON, "button-press-topdown": _BUTTON, "button-press-topdown-wall": _BUTTON,
    "button-press-wall": _BUTTON,
    "coffee-button": Named("the button of the coffee machine"),
    "coffee-pull": Named("the mug"),
    "coffee-push": Named("the mug", "the coffee machine"),
    "dial-turn": Named("the dial"),
    "disassemble": Named("the wrench"),
    "door-close": _HANDLE, "door-lock": _LOCK, "door-open": _HANDLE, "door-unlock": _LOCK,
    "drawer-close": _HANDLE, "drawer-open": _HANDLE,
    "faucet-close": _FAUCET, "faucet-open": _FAUCET,
    "hammer": Named("the hammer", "the nail", to="second"),
    "hand-insert": Named("the hole", at="goal"),
    "handle-press": _HANDLE, "handle-press-side": _HANDLE, "handle-pull": _HANDLE, "handle-pull-side": _HANDLE,
    "lever-pull": Named("the lever"),
    "peg-insert-side": Named("the peg", "the hole"),
    "peg-unplug-side": Named("the peg"),
    "pick-out-of-hole": Named("the puck"),
    "pick-place": _PUCK, "pick-place-wall": _PUCK,
    "plate-slide": Named("the plate", "the cabinet"), "plate-slide-back": Named("the plate"),
    "plate-slide-back-side": Named("the plate"), "plate-slide-side": Named("the plate", "the cabinet"),
    "push": _PUCK, "push-back": Named("the block", "the goal"), "push-wall": _PUCK,
    "reach": _GOAL, "reach-wall": _GOAL,
    "shelf-place": Named("the block", "the shelf"),
    "soccer": Named("the ball", "the goal"),
    "stick-pull": _STICK, "stick-push": _STICK,
    "sweep": Named("the block"),
    "sweep-into": Named("the block", "the hole"),
    "window-close": _HANDLE, "window-open": _HANDLE,
}  # fmt: skip
"""By task."""


class MetaworldSampler(PlayedSampler):
    """Scenes of one Meta-World suite, its tasks in turn as its seeds have them."""

    suite: MetaworldSuite
    worlds: MetaworldWorlds
    centre_m = (0.0, 0.6, 0.0)
    surfaces = ("world", "tablelink", "RetainingWall")
    _STEPS = 25

    def grip(self) -> np.ndarray:
        """See `SceneSampler.grip`."""
        return self.worlds.grip(0)

    def _questions(self, rng: np.random.Generator) -> list[Question]:
        """See `PlayedSampler._questions`."""
        task = self.worlds.episodes[0].task
        named, words = NAMED[task], phrasings_of(task)["train"]
        state = self.worlds.privileged()[0].astype(np.float64)
        at = state[_COLUMNS[named.at]]
        to = state[_COLUMNS[named.to]] if named.place else None
        held = self.worlds.gripping(0)
        there = (named.thing, named.place) if named.place else (named.thing,)
        return [
            *(Question(words[k], "", at, to) for k in rng.integers(len(words), size=4)),
            Question(f"where is {named.thing}", "", at),
            Question(f"is {named.thing} in the gripper", "yes" if held else "no", at),
            Question("what is in the gripper", named.thing if held else "nothing"),
            Question("describe the table", " and ".join(there)),
        ]
