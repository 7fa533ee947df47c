"""One folder format for everything trained: config.json, model.safetensors, stats.json, trainer/. Never half written.

Saving is a commit: every file is first written and synced under a `.next` name; then config.json, which holds the hash
of each file, is replaced in one rename; only then do the others take their names. A reader that comes in between takes
the `.next` file when that is the one config.json describes, so at every instant exactly one checkpoint is valid.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.core.disk import remove, temporary, writing

if TYPE_CHECKING:  # imported where tensors are touched: exported policies are read without torch
    from torch import Tensor

FORMAT = 1
CONFIG, MODEL, STATS, TRAINER = "config.json", "model.safetensors", "stats.json", "trainer/state.pt"
_UNDO = "; undo what was changed in it, copy the checkpoint again, or update Bascule if a newer one wrote it"
_ENTRY = "checkpoint"  # config.json's own key: format number and the hash of every file
_NEXT = ".next"
_log = logging.getLogger(__name__)
_told: set[tuple[Path, str]] = set()
"""Changed configurations that the user has been told of."""
_ALIASES = "aliases"


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint folder."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    stats: dict[str, Any]
    trainer_state: dict[str, Any] | None
    """Optimiser, step, random state; None when saved without, or when not requested."""
    files: dict[str, bytes]
    """The requested extra files, by their names."""


def weights_digest(folder: str | os.PathLike[str]) -> str:
    """Tells a checkpoint from another in the same folder: its configuration names the hashes of all its files. That of
    a policy of LeRobot names none, so its files are read."""
    digest = hashlib.blake2b((Path(folder) / CONFIG).read_bytes(), digest_size=8)
    for path in sorted(Path(folder).glob("*.safetensors")) if in_lerobot_format(folder) else ():
        digest.update(_sha256(path).encode())
    return digest.hexdigest()


def in_lerobot_format(folder: str | os.PathLike[str]) -> bool:
    """True for the folder of a policy in LeRobot's format, whoever trained it."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and _ENTRY not in config and {"type", "input_features"} <= config.keys()


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically. Tied tensors are stored once and come back tied in value."""
    path = Path(path)
    with writing(path, path.name, tensors):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_tensors(path, tensors, metadata)
        _sync_folder(path.parent)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, on the CPU. ValueError naming the file when it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            aliases = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {os.fspath(path)}") from None
    except SafetensorError as problem:
        raise ValueError(f"{os.fspath(path)} is not a readable safetensors file: {problem}") from None
    for name, stored in aliases.items():
        tensors[name] = tensors[stored]
    return tensors


def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    stats: Mapping[str, Any],
    trainer_state: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Make `folder` hold this checkpoint and no other. `config`, `stats`: plain JSON values; `files`: more, by name.

    Cut at any moment (power included), the folder holds either the previous checkpoint or this one, whole.
    """
    folder = Path(folder)
    writers: dict[str, Callable[[Path], None]] = {MODEL: lambda path: _write_tensors(path, tensors, {})}
    if trainer_state is not None:
        writers[TRAINER] = lambda path: _write_trainer(path, trainer_state)
    with writing(folder, "this checkpoint", [tensors, trainer_state or {}, files or {}]):
        _commit(folder, config, {STATS: _json_bytes(stats), **(files or {})}, writers)
    if trainer_state is None and (folder / TRAINER).parent.exists():
        shutil.rmtree((folder / TRAINER).parent)  # of the previous checkpoint: it would not fit these weights


def save_files(
    folder: str | os.PathLike[str], *, config: Mapping[str, Any], stats: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    """Write an exported policy as `save_checkpoint` writes a checkpoint, without safetensors weights."""
    with writing(folder, "this export", files):
        _commit(Path(folder), config, {STATS: _json_bytes(stats), **files}, {})


def _commit(
    folder: Path,
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    writers: Mapping[str, Callable[[Path], None]],
) -> None:
    if _ENTRY in config:
        raise ValueError(f"a checkpoint's config cannot have the field '{_ENTRY}': the format uses it")
    if (folder / CONFIG).exists():
        _settle(folder)
    for left in folder.glob(".tmp??????"):  # of a killed save of before: safetensors' own, as large as the weights
        remove(left)
    names = [*writers, *files]
    try:
        for name, write in writers.items():
            _prepare(folder, name, write)
        for name, data in files.items():
            _prepare(folder, name, lambda path, data=data: _write_bytes(path, data))
        hashes = {name: _sha256(_next(folder, name)) for name in names}
        entry = {"format": FORMAT, "files": hashes, "config": _config_digest(config)}
        _prepare(folder, CONFIG, lambda path: _write_bytes(path, _json_bytes({**config, _ENTRY: entry})))
        for parent in {(folder / name).parent for name in names}:
            _sync_folder(parent)
    except Exception:  # a full disk, for one: it gets back what this save took of it, and the old checkpoint stays
        for name in (*names, CONFIG):
            _next(folder, name).unlink(missing_ok=True)
        raise
    os.replace(_next(folder, CONFIG), folder / CONFIG)  # the commit: before it the old checkpoint counts, after it this
    _sync_folder(folder)
    _settle(folder)


def load_checkpoint(folder: str | os.PathLike[str], *, trainer: bool = True, extra: str | None = None) -> Checkpoint:
    """Read and verify a folder, config.json once. `extra`: also the files whose names start with this.

    ValueError naming the file that is missing, changed or of another format.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = config.pop(_ENTRY)["files"]
    tensors = load_tensors(_verified(folder, MODEL, files))
    _refuse_nan(folder / MODEL, tensors)
    stats = json.loads(_verified(folder, STATS, files).read_text(encoding="utf-8"))
    state = None
    if trainer and TRAINER in files:
        import torch

        # weights_only: a checkpoint may come from anywhere, and unpickling would run its code
        state = torch.load(_verified(folder, TRAINER, files), map_location="cpu", weights_only=True)
    wanted = {} if extra is None else _read_files(folder, files, extra)
    return Checkpoint(config=config, tensors=tensors, stats=stats, trainer_state=state, files=wanted)


def _refuse_nan(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """ValueError naming a tensor with NaN: its training diverged, or a program that changed the weights did harm. No
    policy with one acts."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ValueError(f"{path} holds NaN, in {name}: load a checkpoint of before its weights were spoilt")


def checkpoint_files(folder: str | os.PathLike[str], prefix: str) -> dict[str, bytes]:
    """All extra files whose name starts with `prefix`, verified: name -> content."""
    folder = Path(folder)
    return _read_files(folder, read_config(folder)[_ENTRY]["files"], prefix)


def _read_files(folder: Path, files: Mapping[str, str], prefix: str) -> dict[str, bytes]:
    return {name: _verified(folder, name, files).read_bytes() for name in files if name.startswith(prefix)}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json of a checkpoint, with its "checkpoint" entry. ValueError when the folder is no checkpoint of ours."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        if os.path.isfile(folder):
            raise ValueError(f"{os.fspath(folder)} is a file; a checkpoint is the folder with {CONFIG} in it")
        raise ValueError(f"{os.fspath(folder)} is not a checkpoint: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is damaged ({problem}): copy the checkpoint again or load another one") from None
    entry = config.get(_ENTRY) if isinstance(config, dict) else None
    if entry is None and in_lerobot_format(folder):
        raise ValueError(
            f"{os.fspath(folder)} is a policy in LeRobot's format ({config['type']}), which only `vla eval`, `view`, "
            "`serve` and `control` take: `vla train` makes a checkpoint"
        )
    if not isinstance(entry, dict) or not isinstance(entry.get("files"), dict):
        raise ValueError(f"{path} does not describe a Bascule checkpoint: it has no '{_ENTRY}' entry")
    if entry.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {entry.get('format')}; this version reads format {FORMAT}")
    kept = entry.get("config")  # earlier versions kept none
    if kept is not None and (path, kept) not in _told and kept != _config_digest(config):
        _told.add((path, kept))
        _log.warning("%s was changed after it was saved: it is read as it is now, undo it if that was not meant", path)
    return config


def _config_digest(config: Mapping[str, Any]) -> str:
    """Tells what config.json says from other words, but for its own entry."""
    said = json.loads(json.dumps({name: value for name, value in config.items() if name != _ENTRY}))  # as it is read
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()


@contextmanager
def reading_config(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make an error of reading a checkpoint's config.json a ValueError that names the file and what to do."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"{Path(folder) / CONFIG}: {problem}{_UNDO}") from None
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{Path(folder) / CONFIG}: {type(problem).__name__}: {problem}{_UNDO}") from None


def refuse_misfit(folder: str | os.PathLike[str], described: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """ValueError naming a tensor that config.json describes otherwise than it was saved. Both: name -> tensor."""
    for name in sorted(described.keys() | saved.keys()):
        shapes = [str(tuple(part[name].shape)) if name in part else "not there" for part in (described, saved)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{Path(folder) / CONFIG}: it does not describe the weights in {MODEL}: {name} is {shapes[0]} by it, "
                f"{shapes[1]} in them{_UNDO}"
            )


def _next(folder: Path, name: str) -> Path:
    path = folder / name
    return path.with_name(path.name + _NEXT)


def _prepare(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    path = _next(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)


def _settle(folder: Path) -> None:
    """Finish the renames of the last commit, and drop what an interrupted save left before its own."""
    files = read_config(folder)[_ENTRY]["files"]
    for name, digest in files.items():
        pending = _next(folder, name)
        # Compare contents: a `.next` may also stem from a save that was cut before its commit.
        if pending.exists() and _sha256(pending) == digest:
            os.replace(pending, folder / name)
    # Not recursive: a folder further down may be a checkpoint of its own, with a commit of its own to finish.
    for parent in {folder, (folder / TRAINER).parent, *((folder / name).parent for name in files)}:
        for pending in parent.glob(f"*{_NEXT}"):
            pending.unlink()
    _sync_folder(folder)


def _verified(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    if name not in files:
        raise ValueError(f"the checkpoint {folder} holds no {name}")
    path = folder / name
    # The plain name twice: a save in another process may rename between the two looks.
    for candidate in (path, _next(folder, name), path):
        if candidate.is_file() and _sha256(candidate) == files[name]:
            return candidate
    state = "is not the file that was saved (its hash differs)" if path.is_file() else "is missing"
    raise ValueError(f"{path} {state}: copy the checkpoint again or load another one")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    import torch
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        fresh = tensor.untyped_storage().data_ptr() not in storages
        storages.add(tensor.untyped_storage().data_ptr())
        # safetensors takes whole, unshared buffers only
        stored[name] = tensor if whole and fresh else tensor.clone(memory_format=torch.contiguous_format)
    # In a folder of its own: safetensors writes to a file of a random name first, which a kill leaves behind, and makes
    # it private to its owner; weights are as readable as any other file.
    folder = temporary(path)
    folder.mkdir()
    try:
        (mode := folder / "mode").touch()
        written = folder / path.name
        # Several metadata entries come out in random order; with one, equal weights make equal files.
        save_file(stored, os.fspath(written), metadata={**metadata, _ALIASES: json.dumps(aliases)})
        written.chmod(mode.stat().st_mode & 0o777)
        _sync_file(written)
        os.replace(written, path)
    finally:
        remove(folder)


def _write_trainer(path: Path, state: Mapping[str, Any]) -> None:
    import torch

    with path.open("wb") as file:  # Python's own: given a path, torch does not say why it could not write
        torch.save(dict(state), file)
    _sync_file(path)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync_file(path)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # a rename is only durable once its directory is
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
