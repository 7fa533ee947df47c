"""Grounding scenes of the suites that have goals: any moment of any task, worded as in training.

A scene is a moment of an episode of its suite: the drawer is at some position, an object may already be at its goal,
the arm is moving, about to grasp, carrying, or has released. Or it comes from a rollout of a noisy expert: objects are
pushed aside, tipped over or dropped halfway, as a policy meets them and no sampler would place them. The points the
policy has to look at are known either way: the subject of the instruction's first goal (the object, the drawer's
handle, the button) and its destination.
"""

from __future__ import annotations

import mujoco
import numpy as np

from envs.experts.goals import GoalExpert
from envs.grounding.expert_scenes import NoisyExpert
from envs.grounding.scene_sampler import PosingSampler, Question
from envs.perturb.perturbation import Perturbation
from envs.seeds import TRAIN_SEED_LIMIT
from envs.tabletop.episodes import Episode, goals_of, held_back_color, relations_of, sample_episode, tell
from envs.tabletop.goals import Goal, GoalKind
from envs.tabletop.language import KIND_WORDS, fixture_phrase, object_phrase
from envs.tabletop.layout import Layout
from envs.tabletop.scene import FINGER_OPEN_M, REST_HEIGHT_M, fixture_names, joint_names, place_names
from envs.tabletop.shapes import KINDS, LOW_KINDS
from envs.tabletop.suites import Suite
from envs.tabletop.tasks import Step, swapped
from vla.core.types import IMAGE_SIZE

_BELOW_TOP_M = 0.027
"""Distance from a tall object's top to where it is held, m (`envs.experts.goals`)."""
_ON = {"plate": "on", "zone": "on", "bowl": "in", "box": "in", "cabinet": "in"}
_PLACING = (GoalKind.ON, GoalKind.IN, GoalKind.PUSH)
_PLAYED = 0.5
"""Share of the scenes that come from rollouts instead of poses."""
_LONGEST_PLAY = 60


class GoalSampler(PosingSampler):
    """Scenes of one suite with goals."""

    def __init__(
        self,
        suite: Suite,
        image_size: int = IMAGE_SIZE,
        perturb: Perturbation | None = None,
        *,
        depth: bool = False,
    ) -> None:
        super().__init__(suite, image_size, perturb, depth=depth)
        scene = self.worlds.scene
        self.fixtures = [kind for _, kind in fixture_names(scene)]
        self.places = [kind for _, kind in place_names(scene)]
        self.joints = [kind for _, kind in joint_names(scene)]

    def scene(self, rng: np.random.Generator) -> list[Question]:
        """See `SceneSampler.scene`."""
        suite = self.worlds.suite
        task = suite.tasks[rng.integers(len(suite.tasks))]
        episode = sample_episode(suite, self.worlds.scene, int(rng.integers(TRAIN_SEED_LIMIT)), task=task)
        self.worlds.place(0, episode)
        told = self._instructions(rng, episode)
        # Played, a scene's things move; then an instruction that tells them by where they stand would be wrong.
        if not self.worlds.suite.task(episode.task).relation and rng.random() < _PLAYED:
            self._play(rng)
            there, held = self._lying(episode), self._held(episode)
        else:
            there = self._disturb(rng, episode)
            goal = told[0][1] if rng.random() < 0.7 else told[rng.integers(len(told))][1]
            held = self._pose(rng, episode, goal, there)
        if held >= 0:
            there.pop(held, None)
        self.look()
        return [
            *(Question(text, "", self._subject(goal), self._destination(goal)) for text, goal in told),
            self._where(rng, episode),
            self._yes_or_no(rng, episode, held, there),
            *self._what(rng, episode, held),
        ]

    # ------------------------------------------------------------------ what is asked for
    def _instructions(self, rng: np.random.Generator, episode: Episode) -> list[tuple[str, Goal]]:
        """Four instructions and the first goal of each: the episode's own, its opposite, and others of the suite."""
        plan = self.worlds.suite.task(episode.task)
        roles = dict(zip("ab", episode.slots, strict=False))
        if not plan.relation:
            told = [(self._tell(rng, episode, plan.steps, roles), episode.goals[0])]
            if self._allowed(episode, swapped(plan), roles):
                told.append((self._tell(rng, episode, swapped(plan), roles), episode.swapped_goals[0]))
            while len(told) < 4:
                told += self._other_task(rng, episode)
            return told
        fixtures = tuple([(*xy, 0.0) for xy in episode.plate_xy]) + episode.fixtures
        layout = Layout(tuple((x, y) for x, y, _ in episode.poses), fixtures)
        both = zip(relations_of(plan, layout, self.fixtures), (plan.steps, swapped(plan)), strict=True)
        return [
            (self._tell(rng, episode, steps, roles, relation), goals_of(steps, roles, self.worlds.scene)[0])
            for relation, steps in [*both] * 2
        ]

    def _other_task(self, rng: np.random.Generator, episode: Episode) -> list[tuple[str, Goal]]:
        """An instruction that this scene allows, or, by chance, none."""
        suite = self.worlds.suite
        plan = suite.task(suite.tasks[rng.integers(len(suite.tasks))])
        order = [int(slot) for slot in rng.permutation(episode.slots)]
        if plan.kind:
            order.sort(key=lambda slot: self.kinds[slot] != plan.kind)
        roles = dict(zip("ab", order, strict=False))
        if plan.relation or (plan.kind and self.kinds[order[0]] != plan.kind):
            return []
        if not self._allowed(episode, plan.steps, roles):
            return []
        return [(self._tell(rng, episode, plan.steps, roles), goals_of(plan.steps, roles, self.worlds.scene)[0])]

    def _allowed(self, episode: Episode, steps: tuple[Step, ...], roles: dict[str, int]) -> bool:
        """No step has its subject in the colour that is held back for it."""
        for step in steps:
            kind = self.kinds[roles[step.object]] if step.object else step.fixture
            color = self._color(episode, roles[step.object]) if step.object else self._fixture_colors(episode)[kind]
            if color == held_back_color(kind, step):
                return False
        return True

    def _tell(
        self,
        rng: np.random.Generator,
        episode: Episode,
        steps: tuple[Step, ...],
        roles: dict[str, int],
        relation: str = "",
    ) -> str:
        named = {role: (self._color(episode, slot), self.kinds[slot]) for role, slot in roles.items()}
        return tell(steps, named, self._fixture_colors(episode), rng, "grounding", relation=relation)[0]

    def _color(self, episode: Episode, slot: int) -> str:
        return episode.colors[episode.slots.index(slot)]

    def _fixture_colors(self, episode: Episode) -> dict[str, str]:
        return dict(zip(self.fixtures, (*episode.plate_colors, *episode.fixture_colors), strict=True))

    def _subject(self, goal: Goal) -> np.ndarray:
        """(3,) position to which the hand goes first, m."""
        state = self.worlds.state
        where = state.handles[0, goal.joint] if goal.kind >= GoalKind.OPEN else state.objects[0, goal.object]
        return where.copy()

    def _destination(self, goal: Goal) -> np.ndarray | None:
        """(3,) position to which the subject goes then, m, if that is a place."""
        state = self.worlds.state
        if goal.kind == GoalKind.STACK:
            return state.objects[0, goal.base] + np.array([0.0, 0.0, REST_HEIGHT_M[self.kinds[goal.base]]])
        return state.places[0, goal.place].copy() if goal.kind in _PLACING else None

    # ------------------------------------------------------------------ a moment that was played
    def _play(self, rng: np.random.Generator) -> None:
        """Let the expert act for a while, badly."""
        w, expert = self.worlds, GoalExpert(1, self.worlds.control)
        hand = NoisyExpert(rng, w.action_spec)
        w.render_images = False
        for _ in range(rng.integers(_LONGEST_PLAY)):
            w.step_chunk(hand(expert.act(w.observation())))
            if w.over[0]:
                break
        w.render_images = True

    def _lying(self, episode: Episode) -> dict[int, int]:
        """{slot: place it lies on or in}."""
        w, state, there = self.worlds, self.worlds.state, {}
        for slot in episode.slots:
            to_place = state.objects[0, slot] - state.places[0]
            inside = np.hypot(*to_place[:, :2].T) < w.index.place_radius
            low = to_place[:, 2] < REST_HEIGHT_M[self.kinds[slot]] + 0.012
            if (inside & low).any():
                there[slot] = int(np.argmax(inside & low))
        return there

    def _held(self, episode: Episode) -> int:
        """Slot of what is between the fingers and above where it stood, or -1."""
        state = self.worlds.state
        for slot in episode.slots:
            at = state.objects[0, slot]
            near = np.linalg.norm((at - state.grip[0])[:2]) < 0.02 and abs(at[2] - state.grip[0, 2]) < 0.05
            if near and state.finger_opening[0] < 0.9 and at[2] > REST_HEIGHT_M[self.kinds[slot]] + 0.02:
                return slot
        return -1

    # ------------------------------------------------------------------ a moment that was posed
    def _disturb(self, rng: np.random.Generator, episode: Episode) -> dict[int, int]:
        """Move the drawer, the button and a thing; returns {slot: place it lies on or in}."""
        w, data = self.worlds, self.worlds.data[0]
        for j, kind in enumerate(self.joints):
            if rng.random() < (0.5 if kind == "cabinet" else 0.1):
                data.qpos[w.index.joint_qpos[j]] = w.index.joint_travel[j] * rng.random()
        mujoco.mj_kinematics(w.model, data)
        w._read(0)
        if self.worlds.suite.task(episode.task).relation or rng.random() > 0.4:
            return {}  # moved, a thing would no longer stand where the instruction says
        slot, place = int(rng.choice(episode.slots)), int(rng.integers(len(self.places)))
        address = w.index.object_qpos[slot]
        others = [s for s in episode.slots if s != slot]
        if others and rng.random() < 0.2:  # on another thing
            base = w.state.objects[0, others[0]]
            height = REST_HEIGHT_M[self.kinds[others[0]]] + REST_HEIGHT_M[self.kinds[slot]]
            data.qpos[address : address + 3] = base + [*rng.uniform(-0.008, 0.008, 2), height]
            return {}
        kind = self.places[place]
        if kind == "cabinet":
            opening = w.state.joints[0, self.joints.index(kind)]
            if opening < 0.8 or self.kinds[slot] not in LOW_KINDS:
                return {}
        offset = rng.uniform(-0.35, 0.35, 2) * w.index.place_radius[place]
        data.qpos[address : address + 3] = w.state.places[0, place] + [*offset, REST_HEIGHT_M[self.kinds[slot]]]
        mujoco.mj_kinematics(w.model, data)
        w._read(0)
        return {slot: place}

    def _pose(self, rng: np.random.Generator, episode: Episode, goal: Goal, there: dict[int, int]) -> int:
        """Put the arm somewhere on the way to `goal`; returns the slot of what it holds, or -1."""
        subject, destination, mode = self._subject(goal), self._destination(goal), rng.random()
        free = np.array([rng.uniform(0.36, 0.68), rng.uniform(-0.22, 0.22), rng.uniform(0.03, 0.30)])
        around = np.array([*rng.normal(0, 0.03 if rng.random() < 0.5 else 0.008, 2), rng.uniform(0.0, 0.13)])
        articulated = goal.kind >= GoalKind.OPEN
        opening = FINGER_OPEN_M if rng.random() < 0.85 else rng.uniform(0.0, FINGER_OPEN_M)
        if mode < 0.2:
            at = free
        elif mode < 0.55:
            at = subject + around
            opening = 0.0 if goal.kind == GoalKind.PRESS and rng.random() < 0.7 else opening
        elif mode < 0.9 and articulated:
            at = subject + rng.normal(0, 0.005, 3)
            opening = 0.0 if goal.kind == GoalKind.PRESS else 0.02
        elif mode < 0.9:
            return self._carry(rng, goal, subject, destination, free)
        else:
            at = (free if destination is None else destination) + around
        self._reach(at, opening)
        return -1

    def _reach(self, at: np.ndarray, opening_m: float) -> None:
        self.reach(np.maximum(at, [0.3, -0.3, 0.012]), opening_m)

    def _carry(
        self,
        rng: np.random.Generator,
        goal: Goal,
        subject: np.ndarray,
        destination: np.ndarray | None,
        free: np.ndarray,
    ) -> int:
        """The hand holds the goal's object: where it stood, on the way, or over its destination."""
        w, data = self.worlds, self.worlds.data[0]
        slot, along = goal.object, rng.random()
        kind = self.kinds[slot]
        rest = REST_HEIGHT_M[kind]
        if goal.kind == GoalKind.PUSH and destination is not None:
            at = subject + rng.random() * (destination - subject)
            at = np.array([*(at[:2] + rng.normal(0, 0.004, 2)), rest + rng.uniform(0.0, 0.008)])
        elif along < 0.3:
            at = np.array([*subject[:2], subject[2] + rng.uniform(0.0, 0.1)])
        elif along < 0.75 and destination is not None:
            at = destination + [*rng.normal(0, 0.02, 2), rest + rng.uniform(0.0, 0.12)]
        else:
            at = free + [0.0, 0.0, rest]
        low, high = _width(kind)
        raised = max(0.0, rest - _BELOW_TOP_M)
        self._reach(at + [0.0, 0.0, raised], (high - low) / 2)
        grip = data.site_xpos[w.index.grip_site]
        a, yaw = w.index.object_qpos[slot], rng.normal(0, 0.05)
        data.qpos[a : a + 3] = grip + [-(high + low) / 2, 0.0, -raised] + rng.normal(0, 0.003, 3)
        data.qpos[a + 3 : a + 7] = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        return slot

    # ------------------------------------------------------------------ what else is asked
    def _say(self, rng: np.random.Generator, episode: Episode, slot: int) -> str:
        if self.worlds.suite.task(episode.task).relation:  # all of one colour and kind: only one is named
            return "it"
        # as held-out phrasings may call it: a question is no instruction
        return object_phrase(self._color(episode, slot), self.kinds[slot], rng, "heldout")

    def _where(self, rng: np.random.Generator, episode: Episode) -> Question:
        state = self.worlds.state
        if rng.random() < 0.6 and not self.worlds.suite.task(episode.task).relation:
            slot = int(rng.choice(episode.slots))
            return Question(f"where is {self._say(rng, episode, slot)}", "", state.objects[0, slot].copy())
        kind = self.fixtures[rng.integers(len(self.fixtures))]
        named = fixture_phrase(self._fixture_colors(episode)[kind], kind, rng)
        if kind in self.joints:
            return Question(f"where is {named}", "", state.handles[0, self.joints.index(kind)].copy())
        return Question(f"where is {named}", "", state.places[0, self.places.index(kind)].copy())

    def _yes_or_no(self, rng: np.random.Generator, episode: Episode, held: int, there: dict[int, int]) -> Question:
        state, colors = self.worlds.state, self._fixture_colors(episode)
        choice = rng.random()
        if "cabinet" in self.joints and choice < 0.35:
            opening = state.joints[0, self.joints.index("cabinet")]
            return Question(f"is {fixture_phrase(colors['cabinet'], 'cabinet', rng)} open", _yes(opening > 0.5))
        if self.worlds.suite.task(episode.task).relation:
            return Question("is the gripper open", _yes(held < 0 and state.finger_opening[0] > 0.5))
        slot = int(rng.choice(episode.slots))
        if choice < 0.7:
            slot = next(iter(there), slot) if rng.random() < 0.6 else slot
            place = int(rng.integers(len(self.places)))
            place = there[slot] if slot in there and rng.random() < 0.7 else place
            kind = self.places[place]
            text = f"is {self._say(rng, episode, slot)} {_ON[kind]} {fixture_phrase(colors[kind], kind, rng)}"
            where = state.objects[0, slot].copy(), state.places[0, place].copy()
            return Question(text, _yes(there.get(slot, -1) == place), *where)
        slot = held if held >= 0 and rng.random() < 0.5 else slot
        return Question(
            f"is {self._say(rng, episode, slot)} in the gripper", _yes(slot == held), state.objects[0, slot].copy()
        )

    def _what(self, rng: np.random.Generator, episode: Episode, held: int) -> list[Question]:
        """Questions about what is held or at a side, and a description of the table."""
        names = {s: f"the {self._color(episode, s)} {KIND_WORDS[self.kinds[s]][0]}" for s in episode.slots}
        order = sorted(episode.slots, key=lambda slot: self.worlds.state.objects[0, slot, 1])
        caption = Question("describe the table", " and ".join(names[slot] for slot in order))
        if rng.random() < 0.5:
            return [Question("what is in the gripper", names.get(held, "nothing")), caption]
        side, slot = ("left", order[0]) if rng.random() < 0.5 else ("right", order[-1])
        return [Question(f"what is on the {side}", names[slot]), caption]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _width(kind: str) -> tuple[float, float]:
    """Half length of an object along its local x axis, m, where the fingers close."""
    parts = [part for part in KINDS[kind].parts if part.solid]
    return min(p.pos[0] - p.size[0] for p in parts), max(p.pos[0] + p.size[0] for p in parts)
