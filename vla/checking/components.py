"""Components of state and action that are dead, saturated, or at odds with their namesakes or with other episodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vla.checking.commands import FACTORS, bare_name
from vla.checking.motion import OPPOSITE, EpisodeFacts, Pair
from vla.checking.scales import Following, Scale
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
_OFF_CENTRE = 0.2
"""Share of its range by which a component lies or starts off 0 where that tells of its unit."""
_LOOSE, _TIGHT = (1.25, 3.0), (1.25, 1.6)
"""By what the sizes' ratio may miss the factor, and the ranges' ratio: told by its place, and by its range alone."""
_AS_ROUGH = 4.0
"""Times by which roughness may differ between units: it knows none. What rests is noise, and far rougher."""
_CROSSED = 0.4
"""Correlation by which two exchanged names must fit better than the right ones."""
_BESIDE, _LONG_ENOUGH = 0.2, 15
"""Share of its range by which an episode's state may lie beside its action; frames from which its mean says so."""
_CLOSELY, _RELATED, _ENOUGH = 0.7, 0.6, 100
"""Correlations of an action with a state that is certainly its own and one that is, from so many frames on."""
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
        rough = np.array([e.rough[key][i] for e in used])
        means = np.array([e.means[key][i] for e in used])
        starts = np.array([e.starts[key][i] for e in used])
        for size, beside in ((starts, True), (means, True), (means, False)):
            odd, factor = _apart(ends[:, 1] - ends[:, 0], size, rough, beside=beside)
            # One episode about 0 may be a small motion in the same unit, unless its partner moves as far as ever.
            single = beside or _partner_says(key, name, used, odd, names_of)
            if factor and len(odd) and (single or min(len(odd), len(used) - len(odd)) > 1):
                found.append(_in_another_unit(key, name, used, odd, ends, factor))
                break
    return found


def _apart(
    spans: NDArray[np.float64], centre: NDArray[np.float64], rough: NDArray[np.float64], *, beside: bool
) -> tuple[NDArray[np.int64], float]:
    """Two groups of episodes that differ by what one unit differs from another: the fewer ones, and by how much; 0.0
    where there are none. `spans`, `centre`, `rough`: ranges of a component, where it lies or starts, its roughness;
    `beside`: it has to lie on one side of 0, and is told by that, which differs less between tasks than its range."""
    none = np.array([], np.int64), 0.0
    if beside and not ((np.abs(centre) > 0).all() and (np.sign(centre) == np.sign(centre[0])).all()):
        return none
    size = np.abs(centre) if beside else spans
    order = np.argsort(size)
    cut = int(np.diff(np.log(size[order])).argmax()) + 1
    few, many = order[:cut], order[cut:]
    ratio, wider = (float(np.median(part[many]) / np.median(part[few])) for part in (size, spans))
    factor = min(FACTORS, key=lambda f: abs(np.log(ratio / f)))
    miss, wide = _LOOSE if beside else _TIGHT
    alike = max(np.ptp(np.log(size[few])), np.ptp(np.log(size[many]))) <= np.log(1.6)
    alike &= abs(np.log(wider / factor)) <= np.log(wide)
    smooth = abs(np.log(np.median(rough[few]) / np.median(rough[many]))) <= np.log(_AS_ROUGH)
    # a component that lies near 0 in most episodes says nothing by where it lies
    off = not beside or np.median(size[many]) > _OFF_CENTRE * np.median(spans[many])
    shift = abs(np.median(centre[few]) * factor - np.median(centre[many])) / np.median(spans[many])
    if abs(np.log(ratio / factor)) > np.log(miss) or shift > 0.5 or not (alike and smooth and off):
        return none
    return (few if len(few) <= len(many) else many), factor


def _in_another_unit(
    key: str,
    name: str,
    used: Sequence[EpisodeFacts],
    odd: NDArray[np.int64],
    ends: NDArray[np.float64],
    factor: float,
) -> Finding:
    """The finding for a component (its `ends` in each episode) that is in another unit in the episodes `odd`."""
    numbers = tuple(sorted(used[at].number for at in odd))
    rest = np.setdiff1d(np.arange(len(used)), odd)
    low, high = (np.median(ends[those], axis=0) for those in (odd, rest))
    times = (high[1] - high[0]) / (low[1] - low[0])
    kind = "action" if key == ACTION else "state"
    text = (
        f"{kind} component '{name}' is in another unit in {listed(numbers)}, as it seems: it runs from "
        f"{low[0]:.3g} to {low[1]:.3g} there, in the others from {high[0]:.3g} to {high[1]:.3g}, "
        f"{max(times, 1 / times):.3g} times {'less' if times > 1 else 'more'} ({FACTORS[factor]}?); convert them"
    )
    return Finding("units_differ", "error", text, numbers, (f"{key} {name}",))


def _partner_says(
    key: str, name: str, episodes: Sequence[EpisodeFacts], odd: NDArray[np.int64], names: dict[str, tuple[str, ...]]
) -> bool:
    """True where the component of the same name in the other feature moves as far in all these episodes."""
    other = ACTION if key == PROPRIO else PROPRIO
    if name not in names[other] or not len(odd):
        return False
    i = names[other].index(name)
    spans = np.array([np.subtract(*episode.extremes[other][::-1])[i] for episode in episodes])
    rest = np.delete(spans, odd)
    return bool((spans > 0).all() and 1 / 2 < np.median(spans[odd]) / np.median(rest) < 2)


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
        if scale.gripper[i : i + 4].any():
            continue  # small displacements beside a gripper of -1 or 1
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


def exchanged_names(following: Following, scales: dict[str, Scale], names: dict[str, tuple[str, ...]]) -> list[Finding]:
    """Two components whose absolute actions the state follows under each other's names."""
    strength = following.correlation("absolute").max(0) if following.frames >= _ENOUGH else np.zeros((0, 0))
    moves = ~(scales[ACTION].constant | scales[ACTION].gripper | scales[ACTION].switch)
    at = {bare_name(name): j for j, name in enumerate(names[PROPRIO])}
    own = [(i, at[bare_name(name)]) for i, name in enumerate(names[ACTION]) if bare_name(name) in at and moves[i]]
    found = []
    for n, (i, j) in enumerate(own if strength.size else ()):
        for k, m in own[n + 1 :]:
            crossed, straight = min(strength[i, m], strength[k, j]), max(strength[i, j], strength[k, m])
            if crossed >= _CLOSELY and crossed - straight > _CROSSED:
                pair = f"'{names[PROPRIO][j]}' and '{names[PROPRIO][m]}'"
                text = (
                    f"{pair} seem to have exchanged their names in the state or in the actions: each one's action "
                    f"moves the other (correlation {crossed:.2f}, with its own name {straight:.2f} at most); mend the "
                    "names in meta/info.json"
                )
                parts = tuple(f"{PROPRIO} {names[PROPRIO][c]}" for c in (j, m))
                found.append(Finding("component_names", "warning", text, components=parts))
    return found


def offsets(
    pairs: list[Pair], episodes: Sequence[EpisodeFacts], scales: dict[str, Scale], names: dict[str, tuple[str, ...]]
) -> list[Finding]:
    """Components whose state lies beside its absolute action in some episodes, or in all."""
    found = []
    for pair in pairs:
        own, state = names[ACTION][pair.action], names[PROPRIO][pair.state]
        opens = (scales[ACTION].gripper | scales[ACTION].switch)[pair.action]
        wide = (scales[ACTION].span[pair.action], scales[PROPRIO].span[pair.state])
        if pair.kind != "absolute" or pair.strength < _RELATED or bare_name(own) != bare_name(state) or opens:
            continue
        used = [e for e in episodes if e.length >= _LONG_ENOUGH]
        if len(used) < 5 or not 0.5 < wide[0] / wide[1] < 2:
            continue
        beside = np.array([e.means[PROPRIO][pair.state] - e.means[ACTION][pair.action] for e in used])
        usual = float(np.median(beside))
        off = np.abs(beside - usual)
        odd = off > max(_BESIDE * min(wide), 5 * float(np.quantile(off, 0.6)))
        kind = f"state component '{state}' lies"
        if odd.any() and odd.mean() <= 0.4:
            numbers = tuple(e.number for e, yes in zip(used, odd, strict=True) if yes)
            text = (
                f"{kind} {beside[odd][0]:+.3g} beside its action in {listed(numbers)}, in the others {usual:+.3g}: was "
                "it zeroed anew? Add the difference there or leave these episodes out"
            )
            found.append(Finding("zero_differs", "warning", text, numbers, (f"{PROPRIO} {state}",)))
        elif abs(usual) > max(2 * _BESIDE * min(wide), 10 * float(np.quantile(off, 0.6))):
            text = (
                f"{kind} {usual:+.3g} beside the action of this name in all episodes, of a range of {min(wide):.3g}: "
                "are both counted from the same zero?"
            )
            found.append(Finding("zero_differs", "warning", text, components=(f"{PROPRIO} {state}",)))
    return found
