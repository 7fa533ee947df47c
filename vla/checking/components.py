"""Components of state and action that are dead, saturated, or no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vla.checking.motion import OPPOSITE, EpisodeFacts
from vla.checking.scales import Scale
from vla.data.findings import Finding, listed, still_vectors
from vla.data.lerobot_dataset import ACTION, PROPRIO

_SATURATED = {PROPRIO: 0.25, ACTION: 0.5}
"""Share of the frames at one extreme value from which a component counts as saturated. Relative actions are often at
full speed, a state hardly ever."""
_MENTIONED = 0.1
"""Share from which a saturated action is worth a note."""
_MOVES = 0.2
"""Share of its range by which an action must move an encoder that is alive."""
UNITS = ("units_differ", "gripper_range")
"""Codes that tell of another unit in some episodes."""
_FACTORS = {180 / np.pi: "radians beside degrees", 100.0: "shares beside percent", 255.0: "shares beside 0 to 255",
            1000.0: "metres beside millimetres"}  # fmt: skip
_OFF_CENTRE = 0.2
"""Share of its range by which a component's mean lies off 0 where that, too, tells of its unit."""
_LOOSE, _TIGHT = (1.5, 3.0), (1.25, 1.6)
"""By what the ranges' ratio may miss the factor, and how far the ranges of one unit may differ; with and without a mean
off 0."""
_AS_ROUGH = 4.0
"""Times by which roughness may differ between units: it knows none. What rests is noise, and far rougher."""
_WHOLE = 20
"""Frames below which an episode says nothing about a component that does not move."""


def component_findings(
    episodes: Sequence[EpisodeFacts],
    scales: dict[str, Scale],
    names: dict[str, tuple[str, ...]],
    told: set[str] | frozenset[str] = frozenset(),
) -> list[Finding]:
    """All findings about single components. `told`: "feature name" of those whose units have been told of."""
    frames = sum(episode.length for episode in episodes)
    if frames < 2:
        return []
    still = {key: bool(scale.constant.all()) for key, scale in scales.items()}
    found = still_vectors(frames, still[ACTION], still[PROPRIO])
    for key in (PROPRIO, ACTION):
        if not still[key]:
            found += _constant(key, frames, scales, names) + _dead_in_some(key, episodes, scales, names)
        found += _saturated(key, episodes, scales[key], names[key])
        found += _stopped(episodes, scales[key], names[key], told=found) if key == PROPRIO else []
        found += _flipped(key, episodes, scales[key], names[key])
        found += _other_unit(key, episodes, scales[key], names, told)
    return found


def _other_unit(
    key: str,
    episodes: Sequence[EpisodeFacts],
    scale: Scale,
    names_of: dict[str, tuple[str, ...]],
    told: set[str] | frozenset[str],
) -> list[Finding]:
    """Components that are in another unit in some episodes than in the others, each by itself."""
    found = []
    for i, name in enumerate(names_of[key]):
        used = [e for e in episodes if e.length >= _WHOLE and e.rough[key][i] > 0]
        if len(used) < 4 or scale.constant[i] or i in scale.strays or any(part.startswith(key) for part in told):
            continue
        ends = np.array([[e.extremes[key][end][i] for end in (0, 1)] for e in used])
        spans, means = ends[:, 1] - ends[:, 0], np.array([e.means[key][i] for e in used])
        rough = np.array([e.rough[key][i] for e in used])
        order = np.argsort(spans)
        cut = int(np.diff(np.log(spans[order])).argmax()) + 1
        few, many = order[:cut], order[cut:]
        ratio = float(np.median(spans[many]) / np.median(spans[few]))
        factor = min(_FACTORS, key=lambda f: abs(np.log(ratio / f)))
        shift = abs(np.median(means[few]) * factor - np.median(means[many])) / np.median(spans[many])
        aside = bool((np.abs(means) > _OFF_CENTRE * spans).all() and (np.sign(means) == np.sign(means[0])).all())
        miss, wide = _LOOSE if aside else _TIGHT
        alike = max(np.ptp(np.log(spans[few])), np.ptp(np.log(spans[many]))) <= np.log(wide)
        smooth = abs(np.log(np.median(rough[few]) / np.median(rough[many]))) <= np.log(_AS_ROUGH)
        # One episode about 0 may be a small motion in the same unit, unless what it follows (or commands) says more.
        enough = min(len(few), len(many)) >= (1 if aside or _alone(key, name, used, few, many, names_of) else 2)
        if abs(np.log(ratio / factor)) > np.log(miss) or shift > 0.5 or not (alike and smooth and enough):
            continue
        odd = few if len(few) <= len(many) else many
        numbers = sorted(used[at].number for at in odd)
        rest = few if odd is many else many
        low, high = (np.median(ends[those], axis=0) for those in (odd, rest))
        kind = "action" if key == ACTION else "state"
        text = (
            f"{kind} component '{name}' is in another unit in {listed(numbers)}, as it seems: it runs from "
            f"{low[0]:.3g} to {low[1]:.3g} there, in the others from {high[0]:.3g} to {high[1]:.3g}, {ratio:.3g} times "
            f"{'less' if odd is few else 'more'} ({_FACTORS[factor]}?); convert them"
        )
        found.append(Finding("units_differ", "error", text, tuple(numbers), (f"{key} {name}",)))
    return found


def _alone(
    key: str,
    name: str,
    episodes: Sequence[EpisodeFacts],
    few: NDArray[np.int64],
    many: NDArray[np.int64],
    names: dict[str, tuple[str, ...]],
) -> bool:
    """True where the component of the same name in the other feature moves as far in all these episodes."""
    other = ACTION if key == PROPRIO else PROPRIO
    if name not in names[other]:
        return False
    i = names[other].index(name)
    spans = np.array([np.subtract(*episode.extremes[other][::-1])[i] for episode in episodes])
    return bool((spans > 0).all() and 1 / 2 < np.median(spans[few]) / np.median(spans[many]) < 2)


def _constant(key: str, frames: int, scales: dict[str, Scale], names: dict[str, tuple[str, ...]]) -> list[Finding]:
    """A state component that stands still although its action moves is dead; else one that never changes is told."""
    moving = {name for name, still in zip(names[ACTION], scales[ACTION].constant, strict=True) if not still}
    found = []
    rest = []
    for i in np.flatnonzero(scales[key].constant):
        name = names[key][i]
        if key == PROPRIO and name in moving:
            text = (
                f"state component '{name}' is {scales[key].median[i]:.6g} in all {frames} frames although the action "
                "of the same name moves: a dead sensor? Record it again, or remove the component"
            )
            found.append(Finding("component_dead", "warning", text, components=(f"{key} {name}",)))
        else:
            rest.append(name)
    if rest:
        text = f"feature '{key}' never changes in {', '.join(rest)} ({frames} frames): nothing is learnt of it"
        found.append(Finding("component_constant", "note", text, components=tuple(f"{key} {name}" for name in rest)))
    return found


def _dead_in_some(
    key: str, episodes: Sequence[EpisodeFacts], scales: dict[str, Scale], names: dict[str, tuple[str, ...]]
) -> list[Finding]:
    """State components that stand still in a few episodes although the action of their name moves."""
    found = []
    for i, name in enumerate(names[key]) if key == PROPRIO else ():
        if scales[key].constant[i] or scales[key].switch[i] or name not in names[ACTION]:
            continue
        at = names[ACTION].index(name)
        least = _MOVES * scales[ACTION].span[at]
        looked = [e for e in episodes if e.length >= _WHOLE and np.subtract(*e.extremes[ACTION][::-1])[at] > least]
        dead = [e.number for e in looked if e.extremes[key][0][i] == e.extremes[key][1][i]]
        if dead and 2 * len(dead) < len(looked):
            text = (
                f"state component '{name}' does not change in {listed(dead)} although the action of the same name "
                f"moves, and does in the other {len(looked) - len(dead)}: did the sensor fail? Leave these episodes out"
            )
            found.append(Finding("component_dead", "warning", text, tuple(dead), (f"{key} {name}",)))
    return found


def _stopped(
    episodes: Sequence[EpisodeFacts], scale: Scale, names: Sequence[str], told: Sequence[Finding]
) -> list[Finding]:
    """State components that stop measuring within an episode; one finding where all of them do at once."""
    dead = {(number, part) for finding in told if finding.code == "component_dead"
            for number in finding.episodes for part in finding.components}  # fmt: skip
    moving = np.flatnonzero(~(scale.constant | scale.switch | scale.gripper)).tolist()
    places: dict[tuple[int, ...], dict[int, tuple[int, int]]] = {}
    for episode in episodes:
        held = {i: run for i, run in episode.held.items() if (episode.number, f"{PROPRIO} {names[i]}") not in dead}
        if len(moving) > 1 and len(held) == len(moving):
            places.setdefault(tuple(moving), {})[episode.number] = min(held.values(), key=lambda run: run[1])
            continue
        for i, run in held.items():
            places.setdefault((i,), {})[episode.number] = run
    found = []
    for those, runs in places.items():
        number, (first, count) = next(iter(runs.items()))
        what = f"state component '{names[those[0]]}' holds" if len(those) == 1 else "all components of the state hold"
        text = (
            f"{what} exactly one value for {count} frames from frame {first} of episode {number}"
            f"{f' (and in {listed(tuple(runs)[1:])})' if len(runs) > 1 else ''}, reached by a jump or while the action "
            "goes on moving: did a sensor fail? Leave these episodes out"
        )
        parts = tuple(f"{PROPRIO} {names[i]}" for i in those)
        found.append(Finding("component_dead", "warning", text, tuple(runs), parts))
    return found


def _flipped(key: str, episodes: Sequence[EpisodeFacts], scale: Scale, names: Sequence[str]) -> list[Finding]:
    """Quaternions that change their sign between frames, or from episode to episode."""
    found = []
    for i in sorted(set.intersection(*(set(episode.rotations[key]) for episode in episodes))):
        if (scale.constant | scale.switch)[i : i + 4].sum() > 2:
            continue  # a gripper of -1 or 1 beside what stands still
        signs = {episode.number: episode.rotations[key][i] for episode in episodes}
        usual = next(iter(signs.values())).first
        within = [number for number, rotation in signs.items() if rotation.flips]
        apart = [number for number, rotation in signs.items() if rotation.first @ usual < -OPPOSITE]
        if not within and not apart:
            continue
        those = ", ".join(f"'{name}'" for name in names[i : i + 4])
        kind = "action" if key == ACTION else "state"
        flips = sum(rotation.flips for rotation in signs.values())
        where = f"{flips} times between frames in {listed(within)}" if within else f"from episode to {listed(apart)}"
        text = (
            f"{kind} components {those} are a quaternion whose sign flips {where}: q and -q are the same rotation, and "
            "what is learnt lies between; give it the sign nearest to the frame before, and the same at every start"
        )
        numbers = tuple(sorted({*within, *apart}))
        parts = tuple(f"{key} {name}" for name in names[i : i + 4])
        found.append(Finding("rotation_sign", "warning", text, numbers, parts))
    return found


def _saturated(key: str, episodes: Sequence[EpisodeFacts], scale: Scale, names: Sequence[str]) -> list[Finding]:
    """Components that are at their greatest or least value in a large share of the frames."""
    frames = sum(episode.length for episode in episodes)
    found, mentioned = [], []
    for i, name in enumerate(names):
        if scale.switch[i] or scale.constant[i] or scale.gripper[i]:
            continue
        counts = [sum(int(episode.at_extremes[key][end][i]) for episode in episodes) for end in (0, 1)]
        end = int(np.argmax(counts))
        share = counts[end] / frames
        extreme = (scale.least, scale.most)[end][i]
        kind = "action" if key == ACTION else "state"
        if share >= _SATURATED[key]:
            text = (
                f"{kind} component '{name}' is exactly {extreme:.4g}, its {('least', 'greatest')[end]} value, in "
                f"{100 * share:.0f}% of the frames: it is cut off there; record it with a wider range"
            )
            found.append(Finding("saturated", "warning", text, components=(f"{key} {name}",)))
        elif key == ACTION and share >= _MENTIONED:
            mentioned.append(f"'{name}' {100 * share:.0f}%")
    if mentioned:
        text = f"actions are at their greatest or least value in a share of the frames: {', '.join(mentioned)}"
        found.append(Finding("full_speed", "note", text))
    return found
