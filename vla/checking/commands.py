"""How actions and state belong together: absolute or relative, delay, sense, range and units."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vla.checking.motion import EpisodeFacts, Pair
from vla.checking.scales import LAGS, Following, Scale
from vla.data.findings import Finding, listed, numbered
from vla.data.lerobot_dataset import ACTION, PROPRIO

_RELATED = 0.5
"""Correlation from which a state component counts as following an action."""
_NAMESAKE = 0.3
"""The same for one of the action's own name."""
_STRANGERS = 0.8
"""The same for absolute actions of another name."""
_CLEAR = 0.6
"""Correlation from which a note names the two."""
_LATE_SECONDS = 0.35
_MARGIN = 0.1
"""Correlation that another delay than none must gain, unless it halves what is missing to 1."""
_EXACT = 0.1
"""Share of what is missing to 1 without a delay, below which another delay fits exactly; ..."""
_DOUBT = 0.7
"""... and below which an earlier state leaves in doubt that it answers at all."""
_SHIFTED = 3
"""Frames by which an episode's delay must differ from the others'."""
_GAIN = 0.2
"""Correlation that this must gain."""
_DEGREES = (40.0, 80.0)
"""Ratios that are taken for degrees over radians, 57.3."""
FACTORS = {180 / np.pi: "radians beside degrees", 100.0: "shares beside percent", 255.0: "shares beside 0 to 255",
           1000.0: "metres beside millimetres"}  # fmt: skip
"""By what one unit differs from another."""
_OPPOSITE = 0.7
"""Correlation with the other episodes' course below minus which a gripper counts as upside down."""
_CHANCE = 3.5
"""Correlations below this over the root of the number of frames are chance."""
_LEAST_FRAMES = 100
"""Frames from which actions and state can be said to belong together."""
_FEWEST = 3
"""Episodes from which one can be odd among others."""


def find_pairs(following: Following, scales: dict[str, Scale], names: dict[str, tuple[str, ...]]) -> list[Pair]:
    """For each action component the state component that follows it, where one does."""
    if following.frames < _LEAST_FRAMES:
        return []
    kinds = {kind: following.correlation(kind) for kind in ("absolute", "relative")}
    # A state that moves against absolute targets is a controller's error shrinking; a gripper's sense is free.
    two_way = scales[ACTION].switch | scales[ACTION].gripper
    kinds["absolute"] = np.where(two_way[None, :, None], kinds["absolute"], np.maximum(kinds["absolute"], 0))
    # So is one that moves before them, unless it is the very joint.
    plain = (np.array(LAGS)[:, None, None] >= 0) & (two_way[None, :, None] | (kinds["absolute"] >= _STRANGERS))
    strangers = {**kinds, "absolute": kinds["absolute"] * plain}
    pairs = []
    for i, name in enumerate(names[ACTION]):
        same = [j for j, other in enumerate(names[PROPRIO]) if bare_name(other) == bare_name(name)]
        alike = np.flatnonzero(scales[PROPRIO].gripper == scales[ACTION].gripper[i]).tolist()
        for parts, columns, least in ((kinds, same, _NAMESAKE), (strangers, alike, _RELATED)):
            found = [_best(kind, part, i, j) for kind, part in parts.items() for j in columns]
            best = max(found, key=lambda pair: abs(pair.strength), default=None)
            if best is not None and abs(best.strength) >= least:
                pairs.append(best)
                break
    return pairs


def command_findings(
    pairs: list[Pair],
    following: Following,
    episodes: Sequence[EpisodeFacts],
    scales: dict[str, Scale],
    names: dict[str, tuple[str, ...]],
    fps: float,
) -> list[Finding]:
    """All findings about actions beside the state."""
    if not episodes:
        return []
    found = _reading(pairs, names) + _crosswise(pairs, names)
    # A gripper's few changes say little of when the state answers; they count where nothing else does.
    steady = [pair for pair in pairs if not (scales[ACTION].gripper | scales[ACTION].switch)[pair.action]]
    usual, curve, sure = _delay(steady or pairs, following)
    if usual is not None:
        found += (_late(usual, fps) if sure else []) + _shifted(usual, curve, episodes, fps)
    found += _senses(pairs, episodes, scales, names)
    found += _grippers(episodes, scales[ACTION], names[ACTION]) + _units(episodes, scales, names)
    return found + _unit_of_pairs(pairs, scales, names)


def bare_name(name: str) -> str:
    """A component's name without what says of which kind it is."""
    return re.sub(
        r"[^a-z0-9]+|\b(pos|position|action|state|command|cmd|target|observation)\b", "", name.lower().replace("_", " ")
    )


def _best(kind: str, correlation: NDArray[np.float64], i: int, j: int) -> Pair:
    at = int(np.abs(correlation[:, i, j]).argmax())
    return Pair(i, j, kind, LAGS[at], float(correlation[at, i, j]))  # type: ignore[arg-type]


def _reading(pairs: list[Pair], names: dict[str, tuple[str, ...]]) -> list[Finding]:
    """Notes on whether actions are targets or changes, and on those that the state answers with the opposite."""
    kinds: dict[str, list[str]] = {}
    for pair in pairs:
        if abs(pair.strength) < _CLEAR:
            continue
        kind = "reversed" if pair.kind == "absolute" and pair.strength < 0 else pair.kind
        kinds.setdefault(kind, []).append(f"{names[ACTION][pair.action]} -> {names[PROPRIO][pair.state]}")
    words = {
        "absolute": "actions look absolute (the state goes where they say)",
        "relative": "actions look relative (the state changes by them)",
        "reversed": "actions look absolute and reversed (the state is low where they are high)",
    }
    return [
        Finding(f"actions_{kind}", "note", f"{words[kind]}: {', '.join(those)}")
        for kind, those in sorted(kinds.items())
    ]


def _crosswise(pairs: list[Pair], names: dict[str, tuple[str, ...]]) -> list[Finding]:
    """A warning where actions named by an axis ("dx") move the state along another one ("grip_y") of several."""
    said = []
    for pair in pairs:
        own, moved = names[ACTION][pair.action], names[PROPRIO][pair.state]
        meant = moved[:-1] + own[-1:]
        other = {own[-1:], moved[-1:]} <= set("xyz") and own[-1:] != moved[-1:]
        if other and abs(pair.strength) >= _CLEAR and meant in names[PROPRIO]:
            said.append((own, moved, meant))
    if len(said) < 2:
        return []
    (own, moved, meant), several = said[0], ", ".join(repr(own) for own, _, _ in said)
    text = (
        f"the actions {several} move the hand along other axes than they are named by ('{own}' moves '{moved}', not "
        f"'{meant}'): are the names in meta/info.json in the order of the columns?"
    )
    return [Finding("component_names", "warning", text, components=tuple(f"{ACTION} {own}" for own, _, _ in said))]


def _delay(pairs: list[Pair], following: Following) -> tuple[int | None, NDArray[np.float64], bool]:
    """The frames after which the state answers, over all clear pairs; None where there is none. Then the mean
    correlation at each delay, and False where the state may as well come before its action."""
    clear = [pair for pair in pairs if abs(pair.strength) >= _RELATED]
    if not clear:
        return None, np.zeros(len(LAGS)), False
    curves = [np.abs(following.correlation(pair.kind)[:, pair.action, pair.state]) for pair in clear]
    curve = np.mean(curves, axis=0)
    best, at_once = int(curve.argmax()), LAGS.index(0)
    met = np.mean([np.abs(following.met(pair.kind)[:, pair.action, pair.state]) for pair in clear], axis=0)
    usual, missing = float(met[at_once]), np.maximum(1 - met, 1e-9)
    if curve[best] - usual < _MARGIN and 1 - curve[best] > 0.5 * (1 - usual):
        best = at_once  # slow motion fits at any delay, ...
        closest = int(missing.argmin())
        if missing[closest] < _EXACT * np.delete(missing, closest).min():
            best = closest  # ... but exactly at one alone
    early = missing[:at_once].min() < _DOUBT * missing[at_once:].min()
    return LAGS[best], curve, LAGS[best] < 0 or not early


def _late(usual: int, fps: float) -> list[Finding]:
    if usual < 0:
        early = numbered(-usual, "frame")
        text = (
            f"actions tell of motion that is over: the state changes {early} before the action that fits it "
            f"({-usual / fps:.2g} s); record the command that is sent after the observation, or move the actions "
            f"{early} back"
        )
        return [Finding("actions_late", "error", text)]
    if usual > max(2, _LATE_SECONDS * fps):
        text = (
            f"the state answers an action only {usual + 1} frames later ({(usual + 1) / fps:.2g} s): are actions and "
            "state of one frame recorded at the same time? A policy will act as early"
        )
        return [Finding("delay", "warning", text)]
    when = "in the next frame" if usual == 0 else f"{usual + 1} frames later ({(usual + 1) / fps:.2g} s)"
    return [Finding("delay_usual", "note", f"the state answers an action {when}")]


def _shifted(usual: int, curve: NDArray[np.float64], episodes: Sequence[EpisodeFacts], fps: float) -> list[Finding]:
    """Episodes in which another delay fits clearly better than the recording's."""
    at, odd = LAGS.index(usual), {}
    for episode in episodes if len(episodes) >= _FEWEST else ():
        own = np.abs(episode.follows).mean(1) if episode.follows.size else np.zeros(len(LAGS))
        best = int(own.argmax())
        if abs(best - at) >= _SHIFTED and own[best] >= _clear(episode) and own[best] - own[at] >= _GAIN:
            odd[episode.number] = LAGS[best] + 1
    if not odd:
        return []
    text = (
        f"in {listed(odd)} the state answers actions after {', '.join(map(str, sorted(set(odd.values()))))} frames, in "
        f"the others after {usual + 1}: actions and observations were recorded out of step; leave these episodes out"
    )
    return [Finding("delay_differs", "warning", text, tuple(odd))]


def _senses(
    pairs: list[Pair], episodes: Sequence[EpisodeFacts], scales: dict[str, Scale], names: dict[str, tuple[str, ...]]
) -> list[Finding]:
    """Components whose state moves against the action in some episodes and with it in the others."""
    opens = scales[ACTION].gripper | scales[ACTION].switch
    found = []
    for at, pair in enumerate(pairs):
        if not opens[pair.action]:
            own = {e.number: _certain(e, e.follows[LAGS.index(pair.lag), at]) for e in episodes}
            found += _against(pair.action, pair.state, own, "sign_differs", names)
    for at, (i, j) in enumerate(gripper_pairs(scales, names)):
        own = {episode.number: _certain(episode, episode.opens[at]) for episode in episodes}
        found += _against(i, j, own, "gripper_polarity", names)
    told = {i for i, _ in gripper_pairs(scales, names)}
    for i in np.flatnonzero(opens) if len(episodes) >= _FEWEST else ():
        if i not in told:
            found += _upside_down(names[ACTION][i], episodes, int(i))
    return found


def _clear(episode: EpisodeFacts) -> float:
    """The correlation from which this episode says something."""
    return max(_RELATED, _CHANCE / np.sqrt(episode.length))


def _certain(episode: EpisodeFacts, correlation: float) -> float:
    """The correlation, or 0 where it may be chance."""
    return correlation if abs(correlation) >= _clear(episode) else 0.0


def gripper_pairs(scales: dict[str, Scale], names: dict[str, tuple[str, ...]]) -> list[tuple[int, int]]:
    """(action, state) of every gripper that the state tells of: of its own name, or else the first of any."""
    states = np.flatnonzero(scales[PROPRIO].gripper & ~scales[PROPRIO].constant).tolist()
    pairs = []
    for i in np.flatnonzero((scales[ACTION].gripper | scales[ACTION].switch) & ~scales[ACTION].constant).tolist():
        own = [j for j in states if bare_name(names[PROPRIO][j]) == bare_name(names[ACTION][i])]
        if own or states:
            pairs.append((i, (own or states)[0]))
    return pairs


def _against(i: int, j: int, own: dict[int, float], code: str, names: dict[str, tuple[str, ...]]) -> list[Finding]:
    """A finding where a few episodes' correlation of action i and state j has the other sign than most episodes'."""
    clear = {number: value for number, value in own.items() if abs(value) >= _RELATED}
    sense = np.sign(np.median(list(clear.values()))) if clear else 0.0
    against = [number for number, value in clear.items() if value * sense < 0]
    if len(clear) < _FEWEST or not against:
        return []
    text = (
        f"action component '{names[ACTION][i]}' moves '{names[PROPRIO][j]}' the other way in {listed(against)} than in "
        f"the other {len(clear) - len(against)}: reverse its sign there or leave these episodes out"
    )
    return [Finding(code, "error", text, tuple(against), (f"{ACTION} {names[ACTION][i]}",))]


def _upside_down(name: str, episodes: Sequence[EpisodeFacts], i: int) -> list[Finding]:
    """Episodes in which a gripper that no state tells of does the opposite of what it does in the others."""
    profiles = np.array([episode.profile[:, i] for episode in episodes])
    usual = np.median(profiles, axis=0)
    centred = profiles - profiles.mean(1, keepdims=True)
    size = np.linalg.norm(centred, axis=1) * np.linalg.norm(usual - usual.mean())
    alike = np.divide(centred @ (usual - usual.mean()), size, out=np.zeros(len(size)), where=size > 1e-9)
    against = [episode.number for episode, value in zip(episodes, alike, strict=True) if value < -_OPPOSITE]
    if not against or (alike > _OPPOSITE).sum() < 2 * len(against):
        return []
    text = (
        f"action component '{name}' does in {listed(against)} the opposite of what it does in the others: reverse its "
        "sense there or leave these episodes out"
    )
    return [Finding("gripper_polarity", "warning", text, tuple(against), (f"{ACTION} {name}",))]


def _grippers(episodes: Sequence[EpisodeFacts], scale: Scale, names: Sequence[str]) -> list[Finding]:
    """Switches and grippers whose values have another range in some episodes."""
    found = []
    for i, name in enumerate(names):
        if not (scale.gripper[i] or scale.switch[i]) or scale.constant[i]:
            continue
        used = {e.number: (e.extremes[ACTION][0][i], e.extremes[ACTION][1][i]) for e in episodes}
        used = {number: ends for number, ends in used.items() if ends[1] - ends[0] > 1e-6}
        if len(used) < _FEWEST:
            continue
        usual = np.median(np.array(list(used.values())), axis=0)
        wide = usual[1] - usual[0]
        odd = {}
        for number, (low, high) in used.items():
            switched = _unit(low, high) and _unit(*usual) and max(abs(low - usual[0]), abs(high - usual[1])) > 0.3
            if switched or high - low > 5 * wide or (_unit(low, high) and wide > 5):
                odd[number] = (low, high)
        if odd:
            low, high = next(iter(odd.values()))
            text = (
                f"action component '{name}' runs from {low:g} to {high:g} in {listed(odd)}, in the others from "
                f"{usual[0]:g} to {usual[1]:g}: bring them to one range"
            )
            found.append(Finding("gripper_range", "error", text, tuple(odd), (f"{ACTION} {name}",)))
    return found


def _unit(low: float, high: float) -> bool:
    """True for a range of 0 to 1 or -1 to 1, or nearly. A part of a wider one says nothing: not every task opens
    wide."""
    return abs(high - 1) < 0.05 and min(abs(low), abs(low + 1)) < 0.05


def _units(
    episodes: Sequence[EpisodeFacts], scales: dict[str, Scale], names: dict[str, tuple[str, ...]]
) -> list[Finding]:
    """Episodes whose values are some 57 times the others', or a 57th: degrees among radians."""
    if len(episodes) < _FEWEST:
        return []
    found, told = [], set()
    for key, scale in scales.items():
        used = np.flatnonzero(~(scale.switch | scale.constant | scale.gripper))
        reach = np.array([np.maximum(*map(np.abs, e.extremes[key]))[used] for e in episodes])
        if len(used) < 2:
            continue
        for words, low, high, usual in (
            ("degrees, the others in radians", *_DEGREES, 0.5),
            ("radians, the others in degrees", 1 / _DEGREES[1], 1 / _DEGREES[0], 0.5),
            # where half of the episodes are in each, the median lies between the two
            ("radians, the others in degrees", 1 / _DEGREES[1], 1 / _DEGREES[0], 0.75),
        ):
            ratio = reach / np.maximum(np.quantile(reach, usual, axis=0), 1e-9)
            hits = (ratio > low) & (ratio < high)
            odd = [e.number for e, share in zip(episodes, hits.mean(1), strict=True) if share >= 0.5]
            if odd and key not in told:
                told.add(key)
                some = used[hits[[e.number in odd for e in episodes]].any(0)]
                text = (
                    f"feature '{key}' is in {words}, as it seems, in {listed(odd)}: its values differ by "
                    f"{np.median(ratio[hits]):.3g} times; convert them"
                )
                parts = tuple(f"{key} {names[key][i]}" for i in some)
                found.append(Finding("units_differ", "error", text, tuple(odd), parts))
    return found


def _unit_of_pairs(pairs: list[Pair], scales: dict[str, Scale], names: dict[str, tuple[str, ...]]) -> list[Finding]:
    """Absolute actions in degrees beside a state in radians, or the other way round; and single components whose
    action is in another unit than the state of the same name."""
    absolute = [pair for pair in pairs if pair.kind == "absolute" and not scales[ACTION].gripper[pair.action]]
    ratios = [scales[ACTION].span[pair.action] / scales[PROPRIO].span[pair.state] for pair in absolute]
    ratio = float(np.median(ratios)) if len(ratios) >= 2 else 1.0
    for words, times in (("actions in degrees and the state in radians", ratio), ("actions in radians and the state in "
                         "degrees", 1 / ratio)):  # fmt: skip
        if _DEGREES[0] < times < _DEGREES[1]:
            text = f"absolute {words}, as it seems: their ranges differ by {times:.3g} times; record both in one unit"
            return [Finding("units_mixed", "warning", text)]
    moving = [(pair.action, pair.state, tuple(FACTORS)) for pair in absolute if abs(pair.strength) >= _CLEAR]
    # Nobody says in which unit a gripper's command is, but 0 to 1 and 0 to 100 are one opening.
    found = []
    for i, j, factors in moving + [(i, j, (100.0,)) for i, j in gripper_pairs(scales, names)]:
        own, state = names[ACTION][i], names[PROPRIO][j]
        wide = scales[ACTION].span[i], scales[PROPRIO].span[j]
        times = max(wide) / min(wide)
        if bare_name(own) != bare_name(state) or min(abs(np.log(times / f)) for f in factors) > np.log(1.4):
            continue
        text = (
            f"action component '{own}' and the state of this name differ by {times:.3g} times in their range "
            f"({wide[0]:.3g} and {wide[1]:.3g}), as two units do: record both in one"
        )
        found.append(Finding("units_mixed", "warning", text, components=(f"{ACTION} {own}", f"{PROPRIO} {state}")))
    return found
