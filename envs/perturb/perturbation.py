"""Perturbations: twelve ways in which episodes differ from plain ones, each a severity from 0 to 1.

The first eight axes are LIBERO-plus's questions (Fei et al. 2025). Every draw is a pure function of the episode's seed,
the axis and the severity; a larger severity goes further in the same direction, and 0 leaves every number as it was. A
severity may also be a range to draw from: domain randomisation (Tobin et al. 2017), for demonstrations or RL. Such
training has draws of its own (`draws="train"`), so that a test does not show what was trained on.

Everything here is an array or an episode, so that every backend can apply it, through `envs.perturb.episode_source`.
How scenes look is `envs.perturb.appearance`, what sensors report `envs.perturb.sensors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import mujoco
import numpy as np
from numpy.typing import NDArray

from envs.perturb.distractors import MAX_DISTRACTORS, scatter
from envs.perturb.rewording import reword
from envs.seeds import Stream
from envs.tabletop.episodes import WORKSPACE_X, WORKSPACE_Y, Episode
from envs.tabletop.initial_state import Start
from envs.tabletop.scene import SceneIndex
from vla.core.config import lookup, unknown
from vla.language.paraphrase import others_than_named, paraphrase

Severity = float | tuple[float, float]
"""0 (as trained) .. 1, or the range from which every episode draws its own."""

_STRETCH, _SHIFT_M, _YAW = 0.35, 0.03, 0.4
_JOINTS_RAD = np.array([0.35, 0.25, 0.25, 0.25, 0.25, 0.3, 0.4])
_START_X, _START_Y, _START_Z = (0.36, 0.70), 0.25, 0.13
"""Bounds of the hand's first position, m."""


@dataclass(frozen=True)
class Perturbation:
    """Severity per axis of the differences between perturbed and plain episodes."""

    camera: Severity = 0.0
    """The fixed camera orbits its view point (34 degrees, 15% in distance); a mounted one is turned and moved."""
    light: Severity = 0.0
    """Direction (50 degrees), brightness and tint of the lights."""
    texture: Severity = 0.0
    """Colour and pattern of table and floor; hues of objects, within their names."""
    distractors: Severity = 0.0
    """Up to five things of shapes and sizes that no instruction names."""
    layout: Severity = 0.0
    """Things stand up to 35% further apart than in any demonstration, and are turned by as much more."""
    robot: Severity = 0.0
    """The arm starts up to 0.4 rad per joint from its home."""
    instruction: Severity = 0.0
    """Words and forms that no phrasing of the suites has."""
    noise: Severity = 0.0
    """On images (standard deviation 30 of 255) and proprioception (0.01 in its units)."""
    materials: Severity = 0.0
    """The table is of wood, cloth, marble or printed cloth."""
    shadows: Severity = 0.0
    """Things and arm cast shadows, long ones: the sun stands up to 40 degrees lower. CPU backend only."""
    motion: Severity = 0.0
    """Cameras shake (3.5% of the picture's side) and blur what moves (6%)."""
    compression: Severity = 0.0
    """Pictures went through JPEG, at quality 8 in the end."""
    draws: Literal["test", "train"] = "test"
    """From which looks: `train` has patterns, colours, light directions and camera orbits that no test has, and words
    of `vla.language.paraphrase`, which are none of the tests' either."""
    plain: float = 0.0
    """Share of the episodes that no axis changes, so that training sees the plain environment, too."""
    azimuths: tuple[float, ...] = ()
    """Degrees by which the fixed cameras are turned about the vertical through their view point: an episode has one of
    these, and no other. Which ones are for training and which for a test is for the caller to say."""

    def problem(self) -> str | None:
        """A sentence about an impossible severity, or None."""
        if self.draws not in ("test", "train"):
            return f"perturbation draws must be test or train, got {self.draws!r}"
        for axis in AXES:
            if isinstance(value := getattr(self, axis), tuple | list) and len(value) != 2:
                return f"perturbation {axis} must be a severity or its two ends, got {value}"
            low, high = self.range_of(axis)
            if 0.0 <= high < low <= 1.0:
                return f"perturbation {axis} must go from its lower to its higher end: {axis}={high:g}:{low:g}"
            if not 0.0 <= low <= high <= 1.0:
                return f"perturbation {axis} must lie in 0..1, got {getattr(self, axis)}"
        if not all(-180.0 <= azimuth <= 180.0 for azimuth in self.azimuths):
            return f"the cameras' azimuths must lie in -180..180 degrees, got {_listed(self.azimuths)}"
        if not 0.0 <= self.plain < 1.0:
            return f"the share of plain episodes must be at least 0 and less than 1, got plain={self.plain:g}"
        if self.draws == "train" and (kept := next((axis for axis in _TEST_ONLY if self.on(axis)), None)):
            return f"the axis {kept} is for tests only: leave it out of the randomisation"
        return None

    def range_of(self, axis: str) -> tuple[float, float]:
        """Least and largest severity of an axis."""
        value = getattr(self, axis)
        return (float(value[0]), float(value[1])) if isinstance(value, tuple | list) else (float(value), float(value))

    def on(self, axis: str) -> bool:
        """True if any episode is perturbed along `axis`."""
        return self.range_of(axis)[1] > 0.0

    def severity(self, axis: str, seed: int) -> float:
        """The severity of axis `axis` in the episode that `seed` means."""
        low, high = self.range_of(axis)
        if self.plain > 0.0 and high > 0.0 and self._is_plain(seed):
            return 0.0
        if low == high:
            return low
        rng = np.random.default_rng([seed, Stream.PERTURB_SEVERITY, AXES.index(axis)])
        return float(rng.uniform(low, high))

    def azimuth(self, seed: int) -> float:
        """Degrees by which the fixed cameras are turned in the episode that `seed` means; 0 without `azimuths`."""
        if not self.azimuths or (self.plain > 0.0 and self._is_plain(seed)):
            return 0.0
        rng = np.random.default_rng([seed, Stream.PERTURB, _AZIMUTH_DRAW])
        return float(self.azimuths[rng.integers(len(self.azimuths))])

    def _is_plain(self, seed: int) -> bool:
        return bool(np.random.default_rng([seed, Stream.PERTURB_SEVERITY, _PLAIN_DRAW]).uniform() < self.plain)

    def any(self) -> bool:
        """True if any axis is active, or cameras are turned."""
        return bool(self.azimuths) or any(self.on(axis) for axis in AXES)

    def words(self) -> str:
        """The active axes as `parse` reads them, "camera=0.5 light=0:1"; training's draws are said in front."""
        ranges = [(axis, *self.range_of(axis)) for axis in AXES if self.on(axis)]
        named = [f"{axis}={low:g}" + (f":{high:g}" if high > low else "") for axis, low, high in ranges]
        named += [f"{_AZIMUTHS}={_listed(self.azimuths)}"] if self.azimuths else []
        named += [f"{_PLAIN}={self.plain:g}"] if named and self.plain > 0.0 else []
        return " ".join(["randomise", *named] if named and self.draws == "train" else named)


_PLAIN, _AZIMUTHS = "plain", "azimuths"
_PLAIN_DRAW, _AZIMUTH_DRAW = 1000, 1001
"""Numbers of their random streams, beyond those of the axes."""
AXES: tuple[str, ...] = tuple(
    field.name for field in fields(Perturbation) if field.name not in ("draws", _PLAIN, _AZIMUTHS)
)
_TEST_ONLY = ("materials", "shadows")
"""Axes that training never randomises, so that they can be tested."""
MIXES: dict[str, dict[str, Severity]] = {
    "light": {"camera": (0.0, 0.3), "light": (0.0, 0.5), "texture": (0.0, 0.5), "noise": (0.0, 0.3)},
    "medium": {
        "camera": (0.0, 0.7), "light": (0.0, 1.0), "texture": (0.0, 1.0), "distractors": (0.0, 0.6),
        "robot": (0.0, 0.5), "layout": (0.0, 0.5), "noise": (0.0, 0.5), "instruction": (0.0, 1.0),
    },
    "strong": {
        "camera": (0.0, 1.0), "light": (0.0, 1.0), "texture": (0.5, 1.0), "distractors": (0.0, 1.0),
        "robot": (0.0, 1.0), "layout": (0.0, 1.0), "noise": (0.0, 1.0), "motion": (0.0, 0.7),
        "compression": (0.0, 0.7), "instruction": (0.0, 1.0),
    },
    # Camera motion and compression are left out: together they cost a fifth of a control step's time.
    "robust": {
        "camera": (0.0, 1.0), "light": (0.0, 1.0), "texture": (0.0, 1.0), "distractors": (0.0, 1.0),
        "robot": (0.0, 1.0), "layout": (0.0, 1.0), "noise": (0.0, 1.0), "instruction": (0.0, 1.0), "plain": 0.3,
    },
}  # fmt: skip
"""Named mixes for training, each with the share of plain episodes if there are any."""


def parse(words: Iterable[str]) -> Perturbation:
    """ "camera=0.5", "light=0:1", "azimuths=-20,0,20" -> Perturbation. ValueError with the nearest axis, or what a
    severity may be."""
    values: dict[str, Severity] = {}
    words, azimuths = _turned_cameras(words)
    for word in words:
        axis, _, text = word.partition("=")
        if axis not in AXES:
            raise ValueError(unknown(axis, AXES, "perturbation"))
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if axis in values:
            raise ValueError(f"perturbation {axis} is given twice: give one of them")
        if len(numbers) not in (1, 2):
            raise ValueError(f"perturbation {word!r} must be {axis}=SEVERITY or {axis}=FROM:TO, from 0 to 1")
        values[axis] = numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
    perturbation = Perturbation(**values, azimuths=azimuths)
    if problem := perturbation.problem():
        raise ValueError(problem)
    return perturbation


def randomisation(words: Iterable[str]) -> Perturbation:
    """ "medium", or axes as `parse` reads them, or a mix and axes that replace the mix's: training's draws. "plain=0.3"
    besides leaves that share of the episodes as they are.

    ValueError with the nearest name.
    """
    words, azimuths = _turned_cameras(words)
    shares = [word for word in words if word.partition("=")[0] == _PLAIN]
    words = [word for word in words if word not in shares]
    mixes, axes = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if len(mixes) > 1:
        raise ValueError(f"'{mixes[0]}' and '{mixes[1]}' are both mixes of randomisation: give one of them")
    severities: dict[str, Severity] = {}
    for mix in mixes:
        severities |= lookup(mix, MIXES, "mix of randomisation")
    named = parse(axes)
    severities |= {word.partition("=")[0]: getattr(named, word.partition("=")[0]) for word in axes}
    if shares:
        severities[_PLAIN] = _share(shares)
    chosen = Perturbation(**severities, draws="train", azimuths=azimuths)
    if problem := chosen.problem():
        raise ValueError(problem)
    if shares and not chosen.any():
        raise ValueError(f"{shares[0]} is a share of nothing: name what the other episodes have, such as robust, too")
    return chosen


def _turned_cameras(words: Iterable[str]) -> tuple[list[str], tuple[float, ...]]:
    """The other words, and the numbers of "azimuths=-20,0,20"; none without it."""
    words = list(words)
    given = [word for word in words if word.partition("=")[0] == _AZIMUTHS]
    if len(given) > 1:
        raise ValueError(f"the cameras' {_AZIMUTHS} are given twice: give one list of them")
    try:
        found = tuple(float(part) for word in given for part in word.partition("=")[2].split(","))
    except ValueError:
        raise ValueError(f"{given[0]!r} must be {_AZIMUTHS}=DEGREES, several with commas between them") from None
    return [word for word in words if word not in given], found


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _share(words: list[str]) -> float:
    """The number in ["plain=0.3"]. ValueError for anything else."""
    if len(words) > 1:
        raise ValueError(f"the share of {_PLAIN} episodes is given twice: give one of them")
    try:
        return float(words[0].partition("=")[2])
    except ValueError:
        raise ValueError(f"{words[0]!r} must be {_PLAIN}=SHARE, from 0 to 1") from None


def axis_rng(seed: int, axis: str, *more: int) -> np.random.Generator:
    """The random stream of an axis in the episode that `seed` means; `more`: a part of it."""
    return np.random.default_rng([seed, Stream.PERTURB, AXES.index(axis), *more])


# ---------------------------------------------------------------------- the episode
def perturb_episode(perturbation: Perturbation, episode: Episode, things: Sequence[str] = ()) -> Episode:
    """The episode with its layout stretched and its instruction reworded. `things`: names of all objects in sight, "the
    red cube"; then one may be called by its kind or its colour alone."""
    if (s := perturbation.severity("layout", episode.seed)) > 0:
        episode = _stretched(episode, s)
    s = perturbation.severity("instruction", episode.seed)
    if s > 0 and perturbation.draws == "train":
        if axis_rng(episode.seed, "instruction", 1).uniform() < s:
            said, named = (
                paraphrase(text, axis_rng(episode.seed, "instruction"), others=others_than_named(text, things))
                for text in (episode.instruction, episode.swapped_instruction)
            )
            episode = replace(episode, instruction=said, swapped_instruction=named)
    elif s > 0:
        words = [AXES.index("instruction"), Stream.PERTURB, episode.seed]
        episode = replace(
            episode,
            instruction=reword(episode.instruction, words, s),
            swapped_instruction=reword(episode.swapped_instruction, words, s),
        )
    return episode


def _stretched(episode: Episode, s: float) -> Episode:
    """Positions scaled about the workspace's centre: nothing comes closer to anything, and left stays left. Fixtures
    need room of their own, so a scene with fixtures is only shifted, as a whole."""
    rng = axis_rng(episode.seed, "layout")
    centre = np.array([np.mean(WORKSPACE_X), np.mean(WORKSPACE_Y)])
    scale = 1.0 + _STRETCH * s * (not episode.fixtures)
    shift = s * _SHIFT_M * rng.uniform(-1, 1, 2) * bool(episode.fixtures)

    def moved(x: float, y: float) -> tuple[float, float]:
        at = centre + scale * (np.array([x, y]) - centre) + shift
        return float(at[0]), float(at[1])

    turn = 1.0 + _YAW * s
    return replace(
        episode,
        poses=tuple((*moved(x, y), yaw * turn) for x, y, yaw in episode.poses),
        plate_xy=tuple(moved(x, y) for x, y in episode.plate_xy),
        fixtures=tuple((*moved(x, y), yaw) for x, y, yaw in episode.fixtures),
    )


# ---------------------------------------------------------------------- first state
def perturb_start(
    perturbation: Perturbation, start: Start, episode: Episode, model: mujoco.MjModel, index: SceneIndex
) -> Start:
    """The first state with the arm elsewhere and distractors on the table. `model`: compiled after
    `appearance.edit_spec`."""
    seed = episode.seed
    if (s := perturbation.severity("robot", seed)) > 0:
        qpos = start.qpos.copy()
        qpos[index.arm_qpos] += s * _arm_offset(start, model, index, axis_rng(seed, "robot"))
        start = replace(start, qpos=qpos)
    if perturbation.on("distractors"):
        count = round(MAX_DISTRACTORS * perturbation.severity("distractors", seed))
        start = scatter(start, episode, model, index, count, axis_rng(seed, "distractors"))
    return start


def _arm_offset(
    start: Start, model: mujoco.MjModel, index: SceneIndex, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(7,) rad of severity 1: the first draw that leaves the hand above everything and within the workspace."""
    data = mujoco.MjData(model)
    for offset in _JOINTS_RAD * rng.uniform(-1, 1, (200, 7)):
        data.qpos[:] = start.qpos
        data.qpos[index.arm_qpos] += offset
        mujoco.mj_kinematics(model, data)
        x, y, z = data.site_xpos[index.grip_site]
        if _START_X[0] < x < _START_X[1] and abs(y) < _START_Y and z > _START_Z:
            return offset
    return np.zeros(7)
