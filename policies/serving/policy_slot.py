"""A policy behind the server, and its replacement by a newer checkpoint while clients stay connected."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.serving import wire
from policies.serving.layouts import Layout, ObservationReader
from vla.core.checkpoint import CONFIG
from vla.core.types import Observation, Policy, PolicySpec
from vla.processing.cameras.depth import depth_remarks
from vla.processing.pictures import black_picture, is_black
from vla.processing.preprocess import Preprocessor

Loader = Callable[[Path], Policy]
"""Folder -> its policy (`policies.load.load_policy`)."""
ASK = "ask"
"""Key of an observation: a question about it, which is answered instead of acting."""
_KEYS = "ask", "whole_chunk", "policy", "reset", "row"
"""Keys of an observation that the server reads."""
WHOLE_CHUNK = "whole_chunk"
"""Key of an observation: true requests all actions of the chunk, not only the first n_action_steps."""


class PolicySlot:
    """One served policy: its observation reader, its metadata, and the folder that is watched for newer checkpoints."""

    def __init__(
        self,
        policy: Policy,
        *,
        layout: Layout | None = None,
        metadata: Mapping[str, Any] | None = None,
        n_action_steps: int | None = None,
    ) -> None:
        """`policy.spec` says its actions and cameras, and the width that `state` must have (None leaves that check to
        the policy). `metadata`: sent to clients on connecting, in addition to `action_spec`, `cameras`, `proprio_dim`,
        `proprio_names`, `picture_size`, `depth` and `observation_keys`.

        `n_action_steps`: how many of a chunk's actions are sent to clients that do not ask for whole chunks; None: as
        the spec says. Stock openpi clients cannot request whole chunks, and some execute every action they receive, so
        they receive the first n_action_steps only: an ActionChunkBroker with a longer `action_horizon` then fails at
        once, instead of a robot silently executing actions that the policy was not meant to be run for.
        """
        spec, action = policy.spec, policy.spec.action_spec
        if action is None:
            raise ValueError("a policy whose spec has no action_spec cannot be served: clients need its action_spec")
        steps = n_action_steps or spec.n_action_steps
        if steps is not None and not 1 <= steps <= (spec.chunk_size or steps):
            raise ValueError(f"n_action_steps must be in 1..{spec.chunk_size or 'C'} (the chunk size), got {steps}")
        if spec.memory_frames and steps != spec.n_action_steps:
            raise ValueError(
                f"this policy remembers decisions {spec.n_action_steps} steps apart: leave out --n-action-steps {steps}"
            )
        self.policy, self.spec = policy, replace(spec, n_action_steps=steps)
        self.reader = ObservationReader(
            spec.cameras or (), proprio_dim=spec.proprio_dim, layout=layout, depth=bool(spec.depth)
        )
        self.metadata = {
            **(metadata or {}),
            **_declared(self.spec),
            "control_hz": action.control_hz,
            "action_spec": {
                "names": list(action.names),
                "low": list(action.low),
                "high": list(action.high),
                "control_hz": action.control_hz,
            },
            "cameras": list(spec.cameras or ()),
            **({} if spec.proprio_dim is None else {"proprio_dim": spec.proprio_dim}),
            **({} if spec.proprio_names is None else {"proprio_names": list(spec.proprio_names)}),
            **({} if spec.picture_size is None else {"picture_size": spec.picture_size}),
            **({"depth": True} if spec.depth else {}),
            **({"memory_frames": spec.memory_frames} if spec.memory_frames else {}),
            **({"episodes": True} if spec.episodic else {}),
            "observation_keys": self.reader.keys,
        }
        wire.pack(self.metadata)  # what cannot be sent is found out now
        self.folder: Path | None = None
        self._load: Loader | None = None
        self._stamp: object = None
        self._missed = 0
        self._wanted_steps = n_action_steps

    def sent(self, actions_CA: NDArray[np.float32], message: Mapping[Any, Any]) -> NDArray[np.float32]:
        """The part of a chunk (C, A) that is sent in answer to `message`. ValueError unless `whole_chunk` is a bool."""
        whole = message.get(WHOLE_CHUNK, False)
        if not isinstance(whole, bool):
            raise ValueError(f"{WHOLE_CHUNK}: expected true or false, got {type(whole).__name__}")
        return actions_CA if whole else actions_CA[: self.spec.n_action_steps]

    def told(self, confidence: float | None, obs: Observation, message: Mapping[str, Any]) -> dict[str, Any]:
        """The part of an answer about what came: how surely the policy sees what the prompt names, and warnings of what
        of the prompt is not read or means nothing, of black pictures, of depth without a measurement, of a state far
        from training's and of single values that nobody reads. What is not known is left out. No arrays: openpi's
        clients take those for actions."""
        told: dict[str, Any] = {}
        threshold = self.spec.grounding_threshold
        if confidence is not None and threshold is not None:
            told["grounding"] = {"confidence": confidence, "threshold": threshold, "below": confidence < threshold}
        reads = getattr(self.policy, "processor", None)  # what is not a checkpoint reads prompts in its own way
        lines = list(reads.remarks(obs.instruction[0])) if isinstance(reads, Preprocessor) else []
        lines += [black_picture(name) for name, picture in obs.images.items() if is_black(picture)]
        lines += depth_remarks(obs).values()
        lines += filter(None, [self.reader.unread(message, _KEYS)])
        if isinstance(reads, Preprocessor) and reads.config.proprio_dim == obs.proprio.shape[1]:
            lines += reads.far_states(obs.proprio).values()
        if lines:
            told["warnings"] = lines
        return told

    @staticmethod
    def of_folder(
        folder: str | os.PathLike[str],
        *,
        load: Loader,
        layout: Layout | None = None,
        n_action_steps: int | None = None,
    ) -> PolicySlot:
        """A slot with the policy that `load` reads from a folder; `refresh` reloads it. `n_action_steps` None: the
        policy's own."""
        folder = Path(folder)
        stamp = _stamp(folder)
        slot = PolicySlot(load(folder), layout=layout, metadata={"policy": folder.name}, n_action_steps=n_action_steps)
        slot.folder, slot._load, slot._stamp = folder, load, stamp
        return slot

    def lost(self) -> str:
        """Say once, at the second look in a row, that the folder holds no checkpoint any more; "" as a rule. At the
        first, it may just be replaced."""
        if self.folder is None or _stamp(self.folder) is not None:
            self._missed = 0
            return ""
        self._missed += 1
        told = f"{self.folder} holds no checkpoint any more: was it deleted, or moved?"
        return told if self._missed == 2 else ""

    def changed(self) -> bool:
        """True if the folder holds another checkpoint than the one served."""
        return self.folder is not None and _stamp(self.folder) not in (None, self._stamp)

    def refresh(self) -> None:
        """Load the folder's checkpoint and serve it from the next batch on; the old one stays if anything is wrong.

        ValueError or OSError for what cannot be loaded, TypeError for a policy that connected clients could not use.
        """
        if self.folder is None or self._load is None:
            return
        stamp = _stamp(self.folder)
        policy = self._load(self.folder)
        for what in ("action_spec", "cameras", "proprio_dim", "proprio_names", "depth", "memory_frames", "routes"):
            if getattr(self.spec, what) != getattr(policy.spec, what):
                self._stamp = stamp  # it will not become right by waiting
                raise TypeError(f"{self.folder}: the new policy has another {what}: restart the server to serve it")
        if policy.spec.episodic:
            self._stamp = stamp
            raise TypeError(
                f"{self.folder}: the new policy knows nothing of the episodes that clients are in, and such policies "
                "decide by what was before: restart the server to serve it"
            )
        steps, chunk_size = self._wanted_steps or policy.spec.n_action_steps, policy.spec.chunk_size
        if steps is not None and chunk_size is not None:
            steps = min(steps, chunk_size)
        self.policy, self.spec, self._stamp = policy, replace(policy.spec, n_action_steps=steps), stamp
        kept = {  # it may tell none, or not talk any more
            name: value for name, value in self.metadata.items() if name not in ("grounding", "talks")
        }
        self.metadata = kept | _declared(self.spec)


def _declared(spec: PolicySpec) -> dict[str, Any]:
    """Chunk sizes, the grounding threshold and whether it talks, for the metadata; what is not so is left out."""
    threshold = spec.grounding_threshold
    known = {
        "chunk_size": spec.chunk_size,
        "n_action_steps": spec.n_action_steps,
        "grounding": None if threshold is None else {"threshold": threshold},
        "talks": spec.talks or None,
    }
    return {name: value for name, value in known.items() if value is not None}


def by_name(given: Sequence[str]) -> dict[str, Path]:
    """["runs/a", "pick=runs/b"] -> {"a": .., "pick": ..}. ValueError for two of one name, or names no URL can hold."""
    found: dict[str, Path] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals or "/" in name or Path(entry).exists():  # a folder may be called lr=1e-3
            name, path = Path(entry).resolve().name, entry
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or name in ("healthz", "metrics"):
            raise ValueError(f"{name!r} cannot name a policy in an address: write NAME={path}")
        if name in found:
            raise ValueError(f"two policies are called '{name}': write NAME={path} for one of them")
        found[name] = Path(path)
    return found


def _stamp(folder: Path) -> object:
    """Changes when another checkpoint has been committed there: config.json holds the hash of every file."""
    try:
        return json.loads((folder / CONFIG).read_bytes())["checkpoint"]["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
