"""Which run this is: the policy and the demonstrations that a resumed run must have in common with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vla.core.checkpoint import weights_digest
from vla.core.config import load_json, save_json
from vla.data.dataset_meta import set_digest
from vla.data.lerobot_dataset import DemoSet
from vla.model.model import VLA
from vla.training.train_config import LanguageConfig, TalkConfig, TrainConfig

_BEGINNING = "begun-with.json"
"""The file of a run with --init that tells which policy that was."""
_LOOKED_AT = 64
"""Frames, spread over the recording, whose pictures tell it from another one."""
_THIN = slice(2, None, 8)
"""Rows and columns of depth maps that tell recordings apart."""


def check_policy(cfg: TrainConfig, vla: VLA) -> None:
    """ValueError where the policy is not one of this run's configuration."""
    if vla.config.chunk_size != cfg.model.chunk_size:
        raise ValueError(
            f"the policy has chunk_size={vla.config.chunk_size}, this run is set to {cfg.model.chunk_size}: resume it "
            f"as it was begun (--chunk-size {vla.config.chunk_size}), or begin another run (--out)"
        )
    for name in ("freeze_backbone", "lora", "modulators"):
        given, wanted = getattr(vla.config, name), getattr(cfg.model, name)
        if given != wanted:
            raise ValueError(
                f"the policy has {name}={given}, this run is set to {wanted}: resume it as it was begun (the same "
                "--tune; from Python, loaded with merge=False), or begin another run (--out)"
            )


def note_beginning(out: Path, init: Path | None, known: Sequence[Path], *, resuming: bool) -> None:
    """Keep in `out` which policy the run begins with (`init`), which only its weights would tell, and what that is
    shown to know already. ValueError where it is resumed with others."""
    file, begun = out / _BEGINNING, "resume it as it was begun, or begin another run (--out)"
    if init is None:
        if not resuming:
            file.unlink(missing_ok=True)  # of a run that ended before it had learnt anything
        return
    names = sorted(path.resolve().name for path in known)
    now = {"init": weights_digest(init), "known": names}
    if not resuming:
        save_json(file, now)
    elif not file.is_file():
        raise ValueError(f"{out} was begun without --init: {begun}")
    else:
        before = load_json(file)
        for flag in ("init", "known") if names else ("init",):
            if before.get(flag) != now[flag]:
                raise ValueError(f"{out} was begun with another --{flag}: {begun}")


def fingerprint(demos: Iterable[DemoSet], asked: TalkConfig | LanguageConfig | None = None) -> str:
    """Four digests of the demonstrations: a run is resumed on those that it began with. Runs made before the second,
    of the state's names and what cameras measured, the third, of the pictures' sizes, or the fourth, of what some of
    them show, were kept know those before it only (`same_data`). A fifth is of the questions that are `asked`."""
    parts = list(demos)
    digests = [_joined([of(part) for part in parts]) for of in (_numbers, _measurements, _sizes, _pictures)]
    return "-".join([*digests, *([] if asked is None else [set_digest(Path(asked.data))])])


def same_data(kept: str, now: str) -> bool:
    """True if a run that has kept this fingerprint was begun with the demonstrations that have `now`."""
    return kept == now or now.startswith(f"{kept}-")


def _joined(each: list[str]) -> str:
    return each[0] if len(each) == 1 else hashlib.blake2b("".join(each).encode(), digest_size=16).hexdigest()


def _measurements(demos: DemoSet) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(demos.proprio_names).encode())
    for camera, known in sorted(demos.geometry.items()):
        digest.update(repr((camera, known.depth_mm.shape)).encode())
        for array in (known.intrinsics, known.extrinsics, known.depth_mm[:, _THIN, _THIN]):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _sizes(demos: DemoSet) -> str:
    sizes = sorted((camera, tuple(map(int, image.shape[1:3]))) for camera, image in demos.images.items())
    return hashlib.blake2b(repr(sizes).encode(), digest_size=16).hexdigest()


def _pictures(demos: DemoSet) -> str:
    digest = hashlib.blake2b(digest_size=16)
    looked = np.unique(np.linspace(0, demos.num_frames - 1, _LOOKED_AT).astype(np.int64))
    for camera, image in sorted(demos.images.items()):
        digest.update(camera.encode())
        for few in np.array_split(looked, _LOOKED_AT // 4):  # they may lie on disk: not all decoded at once
            digest.update(np.ascontiguousarray(image[few]))
    return digest.hexdigest()


def _numbers(demos: DemoSet) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((demos.num_frames, demos.fps, demos.action_names)).encode())
    for array in (demos.proprio, demos.action, demos.episode_index):
        digest.update(array.tobytes())
    if demos.success is not None:
        digest.update(demos.success.tobytes())
    if demos.intervention is not None:
        digest.update(demos.intervention.tobytes())
    digest.update("\n".join(demos.instruction).encode())
    return digest.hexdigest()
