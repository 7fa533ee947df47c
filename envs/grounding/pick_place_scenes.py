"""Grounding scenes of shapes and plates, as in the pick and place suites: objects and hand posed anywhere."""

from __future__ import annotations

import numpy as np

from envs.grounding.scene_sampler import PosingSampler, Question
from envs.perturb.perturbation import Perturbation
from envs.tabletop.episodes import WORKSPACE_X, WORKSPACE_Y, Episode
from envs.tabletop.goals import Goal, GoalKind
from envs.tabletop.language import KIND_WORDS, instruction, object_phrase, plate_phrase
from envs.tabletop.scene import COLORS, REST_HEIGHT_M
from envs.tabletop.shapes import PLATE_RADIUS_M, PLATE_THICKNESS_M
from envs.tabletop.suites import Suite
from vla.core.types import IMAGE_SIZE

_SUITE = Suite("grounding", "", "tabletop", ("pick", "place"), 3, 2, 1, 0)
_HALF_WIDTH_M = {"cube": 0.02, "can": 0.018, "brick": 0.014}


def _layout(rng: np.random.Generator, count: int, gaps: np.ndarray) -> np.ndarray | None:
    """(count, 2) positions whose pairwise distance exceeds the sum of their gaps, or None."""
    placed: list[np.ndarray] = []
    for k in range(count):
        for _ in range(60):
            p = np.array([rng.uniform(WORKSPACE_X[0] - 0.03, WORKSPACE_X[1] + 0.03),
                          rng.uniform(WORKSPACE_Y[0] - 0.03, WORKSPACE_Y[1] + 0.03)])  # fmt: skip
            if all(np.linalg.norm(p - q) > gaps[k] + gaps[j] for j, q in enumerate(placed)):
                placed.append(p)
                break
        else:
            return None
    return np.array(placed).reshape(-1, 2)


def _random_episode(rng: np.random.Generator, kinds: tuple[str, ...]) -> Episode:
    while True:
        count, plates = int(rng.integers(2, 5)), int(rng.choice([0, 1, 2], p=[0.35, 0.15, 0.5]))
        slots = rng.permutation(len(kinds))[:count]
        colors = rng.permutation(list(COLORS))[:count] if rng.random() < 0.7 else rng.choice(list(COLORS), count)
        if len({(c, kinds[s]) for c, s in zip(colors, slots, strict=True)}) < count:
            continue  # two red cubes: no phrase would name one of them
        plate_colors = rng.permutation(list(COLORS))[:plates]
        gaps = np.array([PLATE_RADIUS_M + 0.008] * plates + [0.036] * count)
        xy = _layout(rng, plates + count, gaps)
        if xy is None:
            continue
        yaws = rng.uniform(-0.9, 0.9, count)
        return Episode(
            seed=int(rng.integers(1 << 31)), task="pick", slots=tuple(int(s) for s in slots),
            colors=tuple(str(c) for c in colors),
            poses=tuple((float(x), float(y), float(w)) for (x, y), w in zip(xy[plates:], yaws, strict=True)),
            plate_colors=tuple(str(c) for c in plate_colors),
            plate_xy=tuple((float(x), float(y)) for x, y in xy[:plates]),
            target=int(slots[0]), plate=-1, instruction="", template="", swapped_instruction="",
            goals=(Goal(GoalKind.LIFT, int(slots[0])),),
        )  # fmt: skip


class PickPlaceSampler(PosingSampler):
    """Shapes and plates."""

    def __init__(
        self, image_size: int = IMAGE_SIZE, perturb: Perturbation | None = None, *, depth: bool = False
    ) -> None:
        super().__init__(_SUITE, image_size, perturb, depth=depth)

    def scene(self, rng: np.random.Generator) -> list[Question]:
        """See `SceneSampler.scene`."""
        episode, held, on = self.paint(rng)
        state = self.worlds.state
        # The front camera looks toward the robot: world +y is the image's right.
        asked = _questions(rng, episode, self.kinds, held, on, state.objects[0, :, 1])
        return [
            Question(
                prompt, answer,
                state.objects[0, slot].copy() if slot >= 0 else None,
                np.array([*episode.plate_xy[plate], PLATE_THICKNESS_M]) if plate >= 0 else None,
            )
            for prompt, answer, slot, plate in asked
        ]  # fmt: skip

    def paint(self, rng: np.random.Generator) -> tuple[Episode, int, dict[int, int]]:
        """Draw a scene; returns the episode, the held slot (-1: none) and {slot: plate it lies on}."""
        w, data = self.worlds, self.worlds.data[0]
        episode = _random_episode(rng, self.kinds)
        w.place(0, episode)
        on: dict[int, int] = {}
        addresses = {slot: w.index.object_qpos[slot] for slot in episode.slots}
        if episode.plate_colors and rng.random() < 0.45:  # one object lies on a plate
            slot, plate = int(rng.choice(episode.slots)), int(rng.integers(len(episode.plate_colors)))
            offset = rng.uniform(-0.025, 0.025, 2)
            height = REST_HEIGHT_M[self.kinds[slot]] + PLATE_THICKNESS_M
            data.qpos[addresses[slot] : addresses[slot] + 3] = [*(np.array(episode.plate_xy[plate]) + offset), height]
            on[slot] = plate
        held, mode = -1, rng.random()
        free = np.array([rng.uniform(0.38, 0.68), rng.uniform(-0.21, 0.21), rng.uniform(0.03, 0.30)])
        if mode < 0.30:
            goal, opening = free, 0.04 if rng.random() < 0.75 else rng.uniform(0.0, 0.04)
        elif mode < 0.70:  # around an object, as when about to grasp it
            slot = int(rng.choice(episode.slots))
            at = data.qpos[addresses[slot] : addresses[slot] + 3]
            spread = 0.03 if rng.random() < 0.5 else 0.008
            goal = at + np.array([*rng.normal(0, spread, 2), rng.uniform(0.0, 0.12)])
            opening = 0.04 if rng.random() < 0.85 else rng.uniform(0.015, 0.04)
        else:
            held = int(rng.choice(episode.slots))
            on.pop(held, None)
            goal = free
            if episode.plate_colors and rng.random() < 0.4:
                plate_xy = episode.plate_xy[rng.integers(len(episode.plate_colors))]
                goal = np.array([*(np.array(plate_xy) + rng.normal(0, 0.02, 2)), rng.uniform(0.04, 0.16)])
            opening = _HALF_WIDTH_M[self.kinds[held]]
        self.reach(np.maximum(goal, [0.3, -0.3, 0.012]), opening)
        if held >= 0:
            a = addresses[held]
            data.qpos[a : a + 3] = data.site_xpos[w.index.grip_site] + rng.normal(0, 0.004, 3)
            data.qpos[a + 3 : a + 7] = [1, 0, 0, 0] if self.kinds[held] != "brick" else [0.7071, 0, 0, 0.7071]
        self.look()
        return episode, held, on


def _questions(
    rng: np.random.Generator, episode: Episode, kinds: tuple[str, ...], held: int, on: dict[int, int], y: np.ndarray
) -> list[tuple[str, str, int, int]]:
    """(prompt, answer, object slot or -1, plate or -1) per question. `y` (K,) is each object's sideways position."""
    names = {s: (c, kinds[s]) for s, c in zip(episode.slots, episode.colors, strict=True)}

    def say(slot: int) -> str:
        # as held-out phrasings may call it: a question is no instruction
        return object_phrase(*names[slot], rng, "heldout")

    plates = len(episode.plate_colors)
    out: list[tuple[str, str, int, int]] = []
    for k in range(4):  # instructions: the prompt that the policy will see
        slot = int(rng.choice(episode.slots))
        if plates and k % 2:
            plate = int(rng.integers(plates))
            text, _ = instruction("place", names[slot], episode.plate_colors[plate], rng, "grounding")
            out.append((text, "", slot, plate))
        else:
            out.append((instruction("pick", names[slot], None, rng)[0], "", slot, -1))
    slot = int(rng.choice(episode.slots))
    out.append((f"where is {say(slot)}", "", slot, -1))
    slot = int(rng.choice(list(on))) if on and rng.random() < 0.5 else int(rng.choice(episode.slots))
    if plates and rng.random() < 0.6:
        plate = on[slot] if slot in on and rng.random() < 0.6 else int(rng.integers(plates))
        answer = "yes" if on.get(slot, -1) == plate else "no"
        out.append((f"is {say(slot)} on {plate_phrase(episode.plate_colors[plate], rng)}", answer, slot, plate))
    else:
        slot = held if held >= 0 and rng.random() < 0.5 else slot
        out.append((f"is {say(slot)} in the gripper", "yes" if slot == held else "no", slot, -1))
    if rng.random() < 0.5:
        answer = "nothing" if held < 0 else f"the {names[held][0]} {KIND_WORDS[names[held][1]][0]}"
        out.append(("what is in the gripper", answer, held, -1))
    else:
        side, slot = ("left", min(episode.slots, key=lambda s: y[s])) if rng.random() < 0.5 else (
            "right", max(episode.slots, key=lambda s: y[s]))  # fmt: skip
        answer = f"the {names[slot][0]} {KIND_WORDS[names[slot][1]][0]}"
        out.append((f"what is on the {side}", answer, slot, -1))
    order = sorted(episode.slots, key=lambda s: y[s])
    caption = " and ".join(f"the {names[s][0]} {KIND_WORDS[names[s][1]][0]}" for s in order)
    out.append(("describe the table", caption, -1, -1))
    return out
