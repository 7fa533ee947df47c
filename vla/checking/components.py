"""Components of state and action that are dead, saturated, or no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
_WHOLE = 20
"""Frames below which an episode says nothing about a component that does not move."""


def component_findings(
    episodes: Sequence[EpisodeFacts], scales: dict[str, Scale], names: dict[str, tuple[str, ...]]
) -> list[Finding]:
    """All findings about single components."""
    frames = sum(episode.length for episode in episodes)
    if frames < 2:
        return []
    still = {key: bool(scale.constant.all()) for key, scale in scales.items()}
    found = still_vectors(frames, still[ACTION], still[PROPRIO])
    for key in (PROPRIO, ACTION):
        if not still[key]:
            found += _constant(key, frames, scales, names) + _dead_in_some(key, episodes, scales, names)
        found += _saturated(key, episodes, scales[key], names[key])
        found += _flipped(key, episodes, scales[key], names[key])
    return found


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
