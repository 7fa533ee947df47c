"""Episodes that are unlike the others: idle, long or short, jerky, wild for a frame, recorded twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vla.checking.motion import IDLE_SECONDS, EpisodeFacts, Wild
from vla.data.findings import Finding, listed, numbered
from vla.data.lerobot_dataset import ACTION

IDLE_END_SECONDS = 1.0
"""Idle time at an episode's start or end that is told."""
_IDLE_SHARE = 0.25
"""Share of all frames that may be idle without a warning."""
_IDLE_NOTE = 0.05
_LENGTH = 3.0
"""Times the usual length of its task's episodes, or of one part of it, that is told; ..."""
_SPREADS = 4.0
"""... where it is also so many times the usual deviation."""
_JERK = 4.0
BY_RANGE = ("idle", "idle_ends", "no_motion", "jerk")
"""Codes of findings that measure motion by each component's range in the whole recording."""
_FEWEST = 5
"""Episodes from which one can be unlike the others."""


def episode_findings(
    episodes: Sequence[EpisodeFacts], tasks: Mapping[int, str], names: dict[str, tuple[str, ...]], fps: float
) -> list[Finding]:
    """All findings about single episodes. `tasks`: the task string of each."""
    return [
        *_one_frame(episodes),
        *_idle(episodes, fps),
        *_lengths(episodes, tasks, fps),
        *_jerky(episodes),
        *_wild(episodes, names),
        *_strays(episodes, names),
        *_wrapped(episodes, names),
        *_twice(episodes),
    ]


def _one_frame(episodes: Sequence[EpisodeFacts]) -> list[Finding]:
    short = [episode.number for episode in episodes if episode.length == 1]
    if not short:
        return []
    text = (
        f"{listed(short)} {'has' if len(short) == 1 else 'have'} one frame only: delete them with lerobot-edit-dataset"
    )
    return [Finding("one_frame", "warning", text, tuple(short))]


def _idle(episodes: Sequence[EpisodeFacts], fps: float) -> list[Finding]:
    frames, idle = sum(e.length for e in episodes), sum(e.idle[2] for e in episodes)
    found = []
    stuck = [e.number for e in episodes if e.length > IDLE_SECONDS * fps and e.idle[2] == e.length]
    if stuck:
        text = f"nothing moves in {listed(stuck)}, neither the state nor the actions: delete them"
        found.append(Finding("no_motion", "error", text, tuple(stuck)))
    limit = IDLE_END_SECONDS * fps
    ends = [e for e in episodes if e.number not in stuck and max(e.idle[:2]) >= limit]
    if ends:
        start, end = (sum(e.idle[which] for e in ends) for which in (0, 1))
        text = (
            f"{listed(e.number for e in ends)} {'starts or ends' if len(ends) == 1 else 'start or end'} with at least "
            f"{IDLE_END_SECONDS:g} s without motion ({start} frames at the start, {end} at the end): cut them off, or "
            "the policy learns to wait"
        )
        found.append(Finding("idle_ends", "warning", text, tuple(e.number for e in ends)))
    if frames and idle / frames >= _IDLE_NOTE:
        most = [e.number for e in episodes if e.idle[2] > _IDLE_SHARE * e.length]
        text = (
            f"{100 * idle / frames:.0f}% of the frames are idle: neither state nor action changes by 1% of its range "
            f"for {IDLE_SECONDS:g} s"
        )
        severity = "warning" if idle / frames >= _IDLE_SHARE else "note"
        if severity == "warning":
            text += "; remove the pauses, or the policy learns to wait"
        found.append(Finding("idle", severity, text, tuple(most)))
    return found


def _lengths(episodes: Sequence[EpisodeFacts], tasks: Mapping[int, str], fps: float) -> list[Finding]:
    """Episodes much longer or shorter than others of the same task, or than all where a task has few."""
    groups: dict[str, list[EpisodeFacts]] = {}
    for episode in episodes:
        groups.setdefault(tasks.get(episode.number, ""), []).append(episode)
    odd: dict[int, tuple[int, float]] = {}
    for group in groups.values():
        others = group if len(group) >= _FEWEST else episodes
        if len(others) < _FEWEST:
            continue
        logs = np.log([episode.length for episode in others])
        middle = float(np.median(logs))
        spread = max(1.4826 * float(np.median(np.abs(logs - middle))), 0.05)
        for episode in group:
            far = abs(np.log(episode.length) - middle)
            if episode.length > 1 and far > np.log(_LENGTH) and far > _SPREADS * spread:
                odd[episode.number] = (episode.length, float(np.exp(middle)))
    if not odd:
        return []
    numbers = sorted(odd)
    first = numbers[0]
    length, usual = odd[first]
    text = (
        f"{listed(numbers)} {_be(numbers)} much longer or shorter than others of the task (episode {first}: {length} "
        f"frames or {length / fps:.3g} s, usual are {usual:.0f}): look whether they succeeded"
    )
    return [Finding("length", "warning", text, tuple(numbers))]


def _jerky(episodes: Sequence[EpisodeFacts]) -> list[Finding]:
    known = {episode.number: episode.jerk for episode in episodes if np.isfinite(episode.jerk)}
    if len(known) < _FEWEST:
        return []
    usual = float(np.median(list(known.values())))
    odd = [number for number, jerk in known.items() if usual > 0 and jerk > _JERK * usual]
    if not odd:
        return []
    worst = max(known[number] for number in odd) / usual
    text = (
        f"{listed(odd)} {_be(odd)} jerky: the state's third difference is up to {worst:.1f} "
        "times the usual; look at them, noise or a hand that hesitates is imitated, too"
    )
    return [Finding("jerk", "warning", text, tuple(odd))]


def _wild(episodes: Sequence[EpisodeFacts], names: dict[str, tuple[str, ...]]) -> list[Finding]:
    found: list[tuple[int, Wild]] = [(episode.number, wild) for episode in episodes for wild in episode.wild]
    if not found:
        return []
    number, first = found[0]
    kind = "action" if first.feature == ACTION else "state"
    beside = " and ".join(f"{value:.4g}" for value in first.beside)
    text = (
        f"{numbered(len(found), 'single value')} far from the frame before and after (first: {kind} component "
        f"'{names[first.feature][first.component]}' is {first.value:.4g} at episode {number}, frame {first.frame}, "
        f"beside {beside}): a recording error? Delete the episode or mend the value"
    )
    parts = dict.fromkeys(f"{wild.feature} {names[wild.feature][wild.component]}" for _, wild in found)
    return [Finding("wild_frame", "warning", text, tuple(dict.fromkeys(n for n, _ in found)), tuple(parts))]


def _strays(episodes: Sequence[EpisodeFacts], names: dict[str, tuple[str, ...]]) -> list[Finding]:
    """Values that stand for none, as -999: one finding for each component and value."""
    found = []
    total = sum(episode.length for episode in episodes)
    for key, i, value in sorted({told for episode in episodes for told in episode.strays}):
        places = {e.number: e.strays[key, i, value] for e in episodes if len(e.strays[key, i, value])}
        if not places:
            continue
        count = sum(map(len, places.values()))
        number = next(iter(places))
        kind = "action" if key == ACTION else "state"
        text = (
            f"{kind} component '{names[key][i]}' is exactly {value:.6g} in {numbered(count, 'frame')} "
            f"({100 * count / total:.1f}%; first: episode {number}, frame {places[number][0]}), reached and left by a "
            "jump: a mark for no value? It is learnt as a value, and its range as the component's; mend these frames "
            "or leave the episodes out"
        )
        found.append(Finding("wild_frame", "warning", text, tuple(places), (f"{key} {names[key][i]}",)))
    return found


def _wrapped(episodes: Sequence[EpisodeFacts], names: dict[str, tuple[str, ...]]) -> list[Finding]:
    """Angles that jump from one end of a turn to the other."""
    where = {
        (key, i): [episode.number for episode in episodes if episode.wraps[key][i]]
        for key in names
        for i in range(len(names[key]))
        if any(episode.wraps[key][i] for episode in episodes)
    }
    if not where:
        return []
    numbers = sorted({number for those in where.values() for number in those})
    parts = tuple(f"{key} {names[key][i]}" for key, i in where)
    text = (
        f"{', '.join(parts)} {'jumps' if len(parts) == 1 else 'jump'} by a whole turn in {listed(numbers)}: between "
        "the ends of an angle a policy learns the opposite direction; record it without the jump, or as sine and cosine"
    )
    return [Finding("angle_wraps", "warning", text, tuple(numbers), parts)]


def _twice(episodes: Sequence[EpisodeFacts]) -> list[Finding]:
    groups: dict[bytes, list[EpisodeFacts]] = {}
    for episode in episodes:
        if episode.length > 1:
            groups.setdefault(episode.digest, []).append(episode)
    twins = [group for group in groups.values() if len(group) > 1]
    if not twins:
        return []
    text = (
        f"{' and '.join(listed(e.number for e in group) for group in twins[:3])} hold the same states and actions "
        f"frame by frame ({numbered(sum(len(group) - 1 for group in twins), 'copy').replace('copys', 'copies')}): "
        "delete all but one"
    )
    return [Finding("duplicate", "warning", text, tuple(sorted(e.number for group in twins for e in group)))]


def _be(numbers: Sequence[int]) -> str:
    return "is" if len(numbers) == 1 else "are"
