"""Findings about a recording: what is wrong with it, where, and what to do. `vla train` warns of them and `vla check`
lists them, in the same words, which are made here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vla.processing.stats import faint_components, noise_alone, rare_components

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Gravest first. error: do not train on it so; warning: look at it before; note: good to know."""
_THROUGHOUT = 0.9
"""Share of an episode's frames that are a success from which that is the episode's label, not the moment it came."""
_NAMED = 8
"""Most episodes that one sentence names."""


@dataclass(frozen=True)
class Finding:
    """One thing about a recording, in one sentence with its figure and its remedy."""

    code: str
    """A name for programs, such as "camera_black"; listed in docs/train.md."""
    severity: Severity
    text: str
    episodes: tuple[int, ...] = ()
    """Numbers of the episodes concerned; empty for the whole recording."""
    components: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()


def listed(episodes: Iterable[int]) -> str:
    """Episodes for a sentence: "episode 3", "episodes 3, 5 and 12", or the first of many and how many more."""
    numbers = list(episodes)
    if len(numbers) == 1:
        return f"episode {numbers[0]}"
    if len(numbers) <= _NAMED:
        return f"episodes {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    return f"episodes {', '.join(map(str, numbers[:_NAMED]))} and {len(numbers) - _NAMED} more"


def numbered(count: int, thing: str) -> str:
    """ "1 warning", "2 warnings"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def still_vectors(frames: int, action: bool, state: bool) -> list[Finding]:
    """Findings for actions, or else a state, that are the same in all of `frames` frames."""
    if frames < 2:
        return []
    if action:
        text = f"feature 'action' is the same in all {frames} frames: there is nothing to imitate"
        return [Finding("action_still", "error", text)]
    if state:
        text = (
            f"feature 'observation.state' is the same in all {frames} frames, in which actions differ: a policy learns "
            "nothing of where the robot is; was the state recorded?"
        )
        return [Finding("state_still", "warning", text)]
    return []


def still_camera(camera: str, looked: int, one_colour: bool) -> Finding:
    """The finding for a camera that shows the same in all of the frames looked at."""
    kind = "one colour" if one_colour else "the same picture"
    text = (
        f"camera '{camera}' shows {kind} in all of {looked} frames looked at: a covered or frozen camera? Leave it out "
        "(vla train --cameras) or record it again"
    )
    return Finding("camera_still", "warning", text, cameras=(camera,))


def other_shape(camera: str, declared: Sequence[int], shown: Sequence[int]) -> list[Finding]:
    """A finding if a camera's pictures, (height, width), have another size than meta/info.json declares."""
    if tuple(declared) == tuple(shown):
        return []
    text = (
        f"camera '{camera}' has pictures of {shown[0]}x{shown[1]} pixels, meta/info.json declares "
        f"{declared[0]}x{declared[1]}: other tools may fail; correct its shape"
    )
    return [Finding("picture_shape", "warning", text, cameras=(camera,))]


def identical_cameras(one: str, other: str, where: str, episodes: tuple[int, ...] = ()) -> Finding:
    """The finding for two cameras that show the same pictures in `where`, such as "all episodes"."""
    text = (
        f"cameras '{one}' and '{other}' show the same pictures in {where}: one camera recorded twice? Leave one out "
        "(vla train --cameras) or record again"
    )
    return Finding("cameras_identical", "warning", text, episodes, cameras=(one, other))


def labelled_throughout(success_F: NDArray[np.bool_], episode_F: NDArray[np.int64]) -> list[int]:
    """Episodes (F numbers, one after the other) that count as a success in (nearly) all of their several frames, as a
    converter writes an episode's label: nobody has succeeded before anything was done."""
    numbers, starts, counts = np.unique(episode_F, return_index=True, return_counts=True)
    order = np.argsort(starts)
    shares = np.add.reduceat(success_F.astype(np.int64), starts[order]) / counts[order]
    spread = (shares >= _THROUGHOUT) & (counts[order] > 1)
    return numbers[order][spread].tolist()


def spread_successes(success_F: NDArray[np.bool_], episode_F: NDArray[np.int64]) -> list[Finding]:
    """A finding for successes of which nothing says when they came."""
    spread = labelled_throughout(success_F, episode_F)
    if not spread:
        return []
    text = (
        f"feature next.success is true all through {listed(spread)}: when they succeeded is not told, and `vla train "
        "--advantage` takes their last frames for it; where the moment is known, let it be true from there on"
    )
    return [Finding("success_spread", "note", text, tuple(spread))]


def rare_findings(feature: str, values_FX: NDArray[np.floating], names: Sequence[str]) -> list[Finding]:
    """A finding for each component that rarely leaves its resting value, so that extremes scale it."""
    return [
        Finding(
            "rarely_moves",
            "warning",
            f"{feature} component {clause}: it is scaled by its extremes; if those are recording errors, remove them",
            components=(f"{feature} {name}",),
        )
        for name, clause in rare_components(values_FX, names)
    ]


def faint_findings(feature: str, values_FX: NDArray[np.floating], names: Sequence[str]) -> list[Finding]:
    """Findings for state components that hardly move: those whose range is noise beside their value, of which nothing
    is learnt, and those whose range is tiny beside the others'."""
    values = np.asarray(values_FX, dtype=np.float64)
    low, high = values.min(0), values.max(0)
    found = []
    for i in np.flatnonzero(noise_alone(low, high) & (low < high)):
        text = (
            f"{feature} component '{names[i]}' stays within {low[i]:.6g}..{high[i]:.6g}, which is taken for the noise "
            "of one that does not move: nothing is learnt of it"
        )
        found.append(Finding("hardly_moves", "note", text, components=(f"{feature} {names[i]}",)))
    for name, clause in faint_components(values, names):
        text = (
            f"{feature} component {clause}: if that is noise, the policy reads it as large as any motion; record it "
            "as a constant, or see whether its unit is meant"
        )
        found.append(Finding("hardly_moves", "warning", text, components=(f"{feature} {name}",)))
    return found
