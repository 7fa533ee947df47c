"""Grounding scenes of LIBERO: moments of its tasks, and where the things are that a sentence may name.

Runs in LIBERO's own environment: nothing here may need what that lacks.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from envs.adapters.libero_env import LiberoWorlds
from envs.adapters.libero_suites import GOAL_DIM, GOAL_KINDS, LiberoSuite
from envs.grounding.expert_scenes import PlayedSampler
from envs.grounding.scene_sampler import Question
from vla.core.types import IMAGE_SIZE

_CARRY = re.compile(r"pick up the (.+) and (place it .+)")
"""The form of most of LIBERO's sentences. Any other thing may be asked for in it, too."""
_OF_A_THING = {GOAL_KINDS["on"], GOAL_KINDS["in"]}


class LiberoSampler(PlayedSampler):
    """Scenes of one LIBERO suite, its tasks in turn as its seeds have them."""

    suite: LiberoSuite
    worlds: LiberoWorlds
    surfaces = ()
    _NEW_EPISODE, _STEPS = 0.25, 12

    def __init__(self, suite: LiberoSuite, image_size: int = IMAGE_SIZE) -> None:
        super().__init__(suite, image_size, worlds=LiberoWorlds)

    @property
    def centre_m(self) -> tuple[float, float, float]:  # type: ignore[override]
        """See `SceneSampler`: floor, coffee table and kitchen table are at heights of their own."""
        return self.worlds.ground(0)

    def grip(self) -> np.ndarray:
        """See `SceneSampler.grip`."""
        return self.worlds.proprio()[0, :3].astype(np.float64)

    def _questions(self, rng: np.random.Generator) -> list[Question]:
        """See `PlayedSampler._questions`."""
        told, things = self.worlds.episodes[0].instruction, self.worlds.things(0)
        common = Counter(name for name, _, _ in things)
        at = {name: position for name, position, _ in things if common[name] == 1}
        held = next((name for name, _, holds in things if holds), None)
        thing, place = self._goal()
        names = [str(name) for name in rng.permutation(list(at))]
        carry = _CARRY.fullmatch(told)

        def ask_for(name: str) -> Question:
            itself = place is not None and np.linalg.norm(at[name][:2] - place[:2]) < 0.02  # as a basket
            if carry is None or place is None or itself:
                return Question(f"pick up the {name}", "", at[name])
            return Question(f"pick up the {name} and {carry[2]}", "", at[name], place)

        asked = [Question(told, "", thing, place), *(ask_for(name) for name in names[:3])]
        asked += [asked[k % len(asked)] for k in range(4 - len(asked))]  # few things have a name of their own
        named = names[-1] if names else things[0][0]
        doubtful = held if held is not None and rng.random() < 0.5 else named
        left_to_right = sorted(things, key=lambda one: self.project(one[1])[0, 0])
        return [
            *asked,
            Question(f"where is the {named}", "", at[named]) if named in at else asked[0],
            Question(f"is the {doubtful} in the gripper", "yes" if doubtful == held else "no", at.get(doubtful)),
            Question("what is in the gripper", "nothing" if held is None else f"the {held}"),
            Question("describe the table", " and ".join(f"the {name}" for name, _, _ in left_to_right)),
        ]

    def _goal(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The thing of the first goal that is not met yet and its place, (3,) in the world frame, m. None where no goal
        has a thing."""
        goals = self.worlds.privileged()[0, 1:].reshape(-1, GOAL_DIM).astype(np.float64)
        of_things = sorted((goal for goal in goals if goal[0] in _OF_A_THING), key=lambda goal: bool(goal[1]))
        return (of_things[0][2:5], of_things[0][5:8]) if of_things else (None, None)
