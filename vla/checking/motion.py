"""Second pass over a recording's vectors: what each episode is like, by the scales of the whole recording."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from vla.checking.scales import LAGS, TURNS, Scale, correlation, correlations, jump_limit, stray_frames
from vla.data.lerobot_dataset import ACTION, PROPRIO

IDLE_SECONDS = 0.5
"""Nothing must move for so long to count as idle; ..."""
IDLE_SHARE = 0.01
"""... that is, no component by more than this share of its range."""
_WILD_SHARE = 0.25
"""Share of a component's range by which a single frame must leave its neighbours; ..."""
_WILD_STEPS = 6.0
"""... and so many times the usual change between frames."""
_TURNS = (360.0, 2 * np.pi)
"""A whole turn in degrees and in radians."""
_TURN_SLACK = 0.1
"""Share of a turn by which an angle may move between frames, and still be said to wrap."""
_UNIT = 0.02
"""By how much the squares of a quaternion may miss 1."""
OPPOSITE = 0.9
"""Cosine between a quaternion and the opposite of another one, from which they differ in their sign alone."""
_HELD_FRAMES, _HELD_SECONDS = 12, 0.5
"""A component that holds a value exactly for so many frames and so long, although it should move, measures no more."""
_HELD_MOVES = 0.2
"""Share of its range by which an action must move meanwhile."""
_MOVED = 0.05
"""Share of a component's range that counts as motion between two pictures."""


@dataclass(frozen=True)
class Pair:
    """An action component and the state component that follows it."""

    action: int
    state: int
    kind: Literal["absolute", "relative"]
    lag: int
    """Frames after which the state answers best."""
    strength: float
    """The correlation there, with its sign."""


@dataclass(frozen=True)
class Wild:
    """A frame whose value leaves both its neighbours."""

    feature: str
    component: int
    frame: int
    value: float
    beside: tuple[float, ...]
    """The values of the frames before and after."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """The signs of an episode's quaternion; q and -q are the same rotation."""

    flips: int
    """Times that it turns to nearly its opposite between two frames."""
    first: NDArray[np.float64]
    """(4,) its value in the first frame."""


@dataclass(frozen=True, eq=False)
class EpisodeFacts:
    """One episode in figures."""

    number: int
    length: int
    digest: bytes
    """Hash of state and actions."""
    idle: tuple[int, int, int]
    """Idle frames at the start, at the end, and in all."""
    jerk: float
    """Mean third difference of the state, in ranges per frame cubed; NaN for an episode of fewer than 4 frames."""
    extremes: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    """Feature -> (least, most) of each component."""
    means: dict[str, NDArray[np.float64]]
    """Feature -> mean of each component."""
    starts: dict[str, NDArray[np.float64]]
    """Feature -> each component in the first frame."""
    at_extremes: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    """Feature -> frames at the whole recording's least and most value."""
    follows: NDArray[np.float64]
    """(lags, pairs): how the state follows the actions in this episode."""
    opens: NDArray[np.float64]
    """(grippers,): correlation of each gripper's state with its command, at the best delay up to half a second."""
    wild: tuple[Wild, ...]
    strays: dict[tuple[str, int, float], NDArray[np.int64]]
    """(feature, component, value that stands for none) -> its frames."""
    rough: dict[str, NDArray[np.float64]]
    """Feature -> mean square of each component's steps over its variance; 0 where it stands still."""
    wraps: dict[str, NDArray[np.int64]]
    """Feature -> how often each component jumps by a whole turn, as an angle that starts anew at 360 degrees."""
    held: dict[int, tuple[int, int]]
    """State component -> first frame and number of frames of the longest time in which it is exactly the same although
    it came there by a jump, or the action that it follows moves."""
    rotations: dict[str, dict[int, Rotation]]
    """Feature -> first component of a quaternion -> its signs."""
    profile: NDArray[np.float64]
    """(points, A): the actions at evenly spread times."""
    looked: NDArray[np.int64]
    """Frames whose pictures are looked at."""
    moved: NDArray[np.bool_]
    """True where the state moved between one of these and the next."""


def facts_of(
    number: int,
    values: dict[str, NDArray[np.float64]],
    scales: dict[str, Scale],
    pairs: list[Pair],
    grippers: list[tuple[int, int]],
    *,
    fps: float,
    pictures: int,
) -> EpisodeFacts:
    """One episode's figures. `values`: feature -> (T, D), finite; `grippers`: (action, state) components; `pictures`:
    how many are looked at."""
    state, action = values[PROPRIO], values[ACTION]
    length = len(state)
    scaled = np.concatenate([values[key] / scales[key].span for key in (PROPRIO, ACTION)], axis=1)
    still = idle_frames(scaled, max(2, round(IDLE_SECONDS * fps)))
    moving = np.flatnonzero(~still)
    ends = (int(moving[0]), int(length - 1 - moving[-1])) if len(moving) else (length, 0)
    looked = np.unique(np.linspace(0, length - 1, max(pictures, 1)).astype(np.int64))
    stations = state[looked] / scales[PROPRIO].span
    drawn = np.linspace(0, length - 1, 20).astype(np.int64)
    return EpisodeFacts(
        number=number,
        length=length,
        digest=hashlib.blake2b(scaled.astype(np.float32).tobytes(), digest_size=16).digest(),
        idle=(*ends, int(still.sum())),
        jerk=_jerk(state, scales[PROPRIO]),
        extremes={key: (part.min(0), part.max(0)) for key, part in values.items()},
        means={key: part.mean(0) for key, part in values.items()},
        starts={key: part[0] for key, part in values.items()},
        at_extremes={
            key: ((part == scales[key].least).sum(0), (part == scales[key].most).sum(0)) for key, part in values.items()
        },
        follows=_follows(action, state, pairs),
        opens=np.array([_opens(action[:, i], state[:, j], round(fps / 2)) for i, j in grippers]),
        wild=tuple(w for key, part in values.items() for w in _wild(key, part, scales[key])),
        strays={
            (key, i, value): np.flatnonzero(
                stray_frames(part[:, i], value, scales[key].span[i], scales[key].step[i])[0]
            )
            for key, part in values.items()
            for i, those in scales[key].strays.items()
            for value in those
        },
        rough={key: _rough(part) for key, part in values.items()},
        wraps={key: _wraps(part, scales[key]) for key, part in values.items()},
        held=_held(state, action, scales, pairs, max(_HELD_FRAMES, round(_HELD_SECONDS * fps))),
        rotations={key: _rotations(part) for key, part in values.items()},
        profile=action[drawn],
        looked=looked,
        moved=(np.abs(np.diff(stations, axis=0)) > _MOVED).any(1),
    )


def idle_frames(scaled: NDArray[np.float64], window: int) -> NDArray[np.bool_]:
    """(T,) True for the frames of every stretch of `window` frames in which no component (T, D) moves noticeably."""
    length = len(scaled)
    if length < 2:
        return np.zeros(length, bool)
    window = min(window, length)
    stretches = sliding_window_view(scaled, window, axis=0)
    still = ((stretches.max(-1) - stretches.min(-1)) <= IDLE_SHARE).all(1)
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, np.flatnonzero(still), 1)
    np.add.at(edges, np.flatnonzero(still) + window, -1)
    return edges[:-1].cumsum() > 0


def _jerk(state: NDArray[np.float64], scale: Scale) -> float:
    used = ~(scale.constant | scale.switch)
    if len(state) < 4 or not used.any():
        return float("nan")
    jolts = np.abs(np.diff(state[:, used], 3, axis=0) / scale.span[used]).mean(1)
    return float(jolts[jolts <= np.quantile(jolts, 0.9)].mean())  # a single wild frame is told as such


def _rough(values: NDArray[np.float64]) -> NDArray[np.float64]:
    steps = np.square(np.diff(values, axis=0)).mean(0) if len(values) > 1 else np.zeros(values.shape[1])
    variance = values.var(0)
    return np.divide(steps, variance, out=np.zeros_like(steps), where=variance > 0)


def _follows(action: NDArray[np.float64], state: NDArray[np.float64], pairs: list[Pair]) -> NDArray[np.float64]:
    out = np.zeros((len(LAGS), len(pairs)))
    if len(action) < 4 or not pairs:
        return out
    sums = correlations(action[:, [p.action for p in pairs]], state[:, [p.state for p in pairs]])
    for at, pair in enumerate(pairs):
        out[:, at] = correlation(sums, pair.kind)[:, at, at]
    return out


def _opens(command: NDArray[np.float64], state: NDArray[np.float64], most: int) -> float:
    """The correlation of greatest size between a command and a state up to `most` frames later; 0 if one stands."""
    found = [0.0]
    for lag in range(1, min(most, len(command) // 2) + 1):
        a, s = command[:-lag] - command[:-lag].mean(), state[lag:] - state[lag:].mean()
        size = float(np.linalg.norm(a) * np.linalg.norm(s))
        found.append(float(a @ s) / size if size > 1e-9 else 0.0)
    return max(found, key=abs)


def _wraps(values: NDArray[np.float64], scale: Scale) -> NDArray[np.int64]:
    """(D,) jumps of a whole turn between frames, of components that stay within one turn."""
    count = np.zeros(values.shape[1], np.int64)
    if len(values) < 4:
        return count
    step = np.diff(values, axis=0)
    for turn in _TURNS:
        angle = ~(scale.switch | scale.gripper) & (scale.most - scale.least <= 1.02 * turn)
        jump = np.abs(np.abs(step) - turn) < _TURN_SLACK * turn
        calm = np.abs(step) < _TURN_SLACK * turn
        before, after = np.vstack([calm[:1] | jump[:1], calm[:-1]]), np.vstack([calm[1:], calm[-1:] | jump[-1:]])
        count += np.where(angle, (jump & before & after).sum(0), 0)
    return count


def _held(
    state: NDArray[np.float64], action: NDArray[np.float64], scales: dict[str, Scale], pairs: list[Pair], least: int
) -> dict[int, tuple[int, int]]:
    """See `EpisodeFacts.held`; `least`: the fewest frames."""
    found: dict[int, tuple[int, int]] = {}
    scale = scales[PROPRIO]
    for i in np.flatnonzero(~(scale.constant | scale.switch | scale.gripper)).tolist():
        same = np.concatenate([[False], state[1:, i] == state[:-1, i], [False]])
        starts, stops = np.flatnonzero(same[1:] & ~same[:-1]), np.flatnonzero(same[:-1] & ~same[1:]) + 1
        limit, long = jump_limit(scale.span[i], scale.step[i]), stops - starts >= least
        for start, stop in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
            value = state[start, i]
            around = [abs(state[at, i] - value) for at in (start - 1, stop) if 0 <= at < len(state)]
            # a joint that is held at its end by the robot stands still, too
            ends = value in (scale.least[i], scale.most[i])
            follows = any(
                np.ptp(action[start:stop, pair.action]) > _HELD_MOVES * scales[ACTION].span[pair.action]
                for pair in pairs
                if pair.state == i
            )
            jumps = any(limit < way and all(abs(way / turn - 1) > 0.1 for turn in TURNS) for way in around)
            if (jumps or follows and not ends) and stop - start > found.get(i, (0, 0))[1]:
                found[i] = start, stop - start
    return found


def _rotations(values: NDArray[np.float64]) -> dict[int, Rotation]:
    """First component -> signs of all that may be quaternions: four in a row whose squares sum up to 1 in every
    frame."""
    if values.shape[1] < 4:
        return {}
    found = {}
    lengths = (sliding_window_view(values, 4, axis=1) ** 2).sum(-1)
    for i in np.flatnonzero((np.abs(lengths - 1) < _UNIT).all(0)).tolist():
        part = values[:, i : i + 4]
        flips = int(((part[1:] * part[:-1]).sum(1) < -OPPOSITE).sum())
        found[i] = Rotation(flips, part[0])
    return found


def _wild(key: str, values: NDArray[np.float64], scale: Scale) -> list[Wild]:
    """Single frames that leave both neighbours, also the first and the last frame."""
    if len(values) < 4:
        return []
    step = np.diff(values, axis=0)
    limit = np.maximum(_WILD_SHARE * scale.span, _WILD_STEPS * scale.step)
    limit = np.where(scale.gripper, np.maximum(limit, 1.5 * scale.span), limit)  # a gripper snaps
    limit = np.where(scale.switch | scale.constant, np.inf, limit)
    far = np.abs(step) > limit
    back = far[:-1] & far[1:] & (np.sign(step[:-1]) != np.sign(step[1:]))
    back &= np.abs(step[:-1] + step[1:]) < 0.5 * np.minimum(np.abs(step[:-1]), np.abs(step[1:]))
    places = [(int(frame) + 1, int(i)) for frame, i in np.argwhere(back)]
    calm = (np.abs(step) < limit / 4) & ~scale.gripper  # a gripper may well begin or end by opening
    places += [(0, int(i)) for i in np.flatnonzero(far[0] & calm[1] & calm[2])]
    places += [(len(values) - 1, int(i)) for i in np.flatnonzero(far[-1] & calm[-2] & calm[-3])]
    around = lambda frame: [other for other in (frame - 1, frame + 1) if 0 <= other < len(values)]  # noqa: E731
    return [
        Wild(key, i, frame, values[frame, i], tuple(values[around(frame), i].tolist()))
        for frame, i in sorted(places)
        if not np.isin(values[[frame, *around(frame)], i], scale.strays.get(i, ())).any()
    ]
