"""Record demonstrations of scripted experts as a LeRobotDataset v3, in parallel and killed-safe.

While recording, `OUT/recording/` holds one file per finished episode, each written atomically by the worker process
that ran it. When there are enough, the dataset is built beside them and moved into place, `meta/` last, so `OUT` is
either an unfinished recording or a whole dataset. After any kind of interruption the same call continues the run.
"""

from __future__ import annotations

import os
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.backends.worker import worker_environment
from envs.demos.dataset_writer import WorldFacts, build_dataset, is_whole, iter_files, save_episode
from envs.demos.episode import DemoWorld, MakeWorld, RunEpisode, run_corrected, run_episode, run_rollout, suite_world
from envs.demos.rollout import CorrectedPolicyWorld, MakePolicy, PolicyWorld
from envs.registry import load_suite, scenes_digest
from envs.seeds import TRAIN_SEED_LIMIT
from vla.core.config import load_json, save_json, write_atomic
from vla.core.disk import writing
from vla.core.subprocesses import spawn
from vla.core.types import IMAGE_SIZE
from vla.runtime.locks import locked
from vla.runtime.rendering_backend import problem as rendering_problem

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation

"""Demonstration seeds stay below this: evaluation scenes start far above."""
_PROVENANCE = "bascule.json"
_NEEDS_NONE = 300
"""Episodes after which a policy is found to need no correction, if it hardly ever got one."""
_DEATHS = 3
"""Workers that may die at one seed, or in their beginnings, before that is an error: it will not get better."""


@dataclass(frozen=True)
class RecordingProgress:
    """Progress after each episode, for `on_progress`."""

    kept: int
    wanted: int
    tried: int
    frames: int
    """Frames kept by this call."""
    replaced: int = 0
    """Worker processes that died, and whose episodes were begun again in others."""


@dataclass(frozen=True)
class _Request:
    """The request that fixes a recording's content. The number of workers does not: seeds alone fix episodes."""

    suite: str
    seed0: int
    noise: float
    image_size: int
    perturb: str | None = None
    tasks: str | None = None
    depth: bool | None = None
    policy: str | None = None
    """Name of the policy whose episodes are recorded, those that fail too. None: the expert's, without those."""
    corrected: bool | None = None
    """A corrector may take over from the policy."""
    scenes: str | None = None
    """Digest of what the suite's file described; None for the package's own suites, and where it was not kept yet."""


def _facts(
    world: DemoWorld, image_size: int, depth: bool = False, outcomes: bool = False, corrected: bool = False
) -> WorldFacts:
    fps = round(world.action_spec.control_hz)
    if fps != world.action_spec.control_hz:
        raise ValueError(f"LeRobot needs a whole number of frames per second, not {world.action_spec.control_hz}")
    names, proprio_names = world.action_spec.names, world.proprio_names
    return WorldFacts(
        fps, names, proprio_names, world.cameras, image_size, depth=depth, outcomes=outcomes, corrected=corrected
    )


def _facts_from_dict(stored: dict[str, Any]) -> WorldFacts:
    return WorldFacts(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})


def _worker(connection: Connection, make_world: MakeWorld, request: dict[str, Any], folder: Path) -> None:
    """Record the seeds that arrive until None does. Each finished episode is on disk before it is reported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which stops us between episodes
    try:
        world = make_world(request["suite"], request["image_size"])
        logs = request["policy"] is not None
        corrected = bool(request["corrected"])
        run: RunEpisode = run_corrected if corrected else run_rollout if logs else run_episode
        connection.send(("ready", _facts(world, request["image_size"], bool(request["depth"]), logs, corrected)))
        while (seed := connection.recv()) is not None:
            episode = run(world, seed, request["noise"])
            if episode is None:
                write_atomic(folder / f"{seed:08d}.failed", b"")
            else:
                save_episode(folder / f"{seed:08d}.parquet", episode)
            connection.send(("episode", seed, 0 if episode is None else len(episode.action)))
        world.close()
    except (EOFError, BrokenPipeError):
        return  # the parent is gone; what we finished is on disk
    except ValueError as error:  # the user's: an unknown suite, say
        connection.send(("invalid", str(error)))
    except Exception:
        connection.send(("error", traceback.format_exc()))


class _Workers:
    """Worker processes, each idle or running one seed. One that dies (killed, out of memory) is replaced; its seed
    is skipped."""

    def __init__(self, count: int, make_world: MakeWorld, request: _Request, folder: Path) -> None:
        self._arguments = make_world, asdict(request), folder
        self._processes: dict[Connection, Any] = {}
        self.running: dict[Connection, int] = {}
        self.idle: list[Connection] = []
        self.facts: WorldFacts | None = None
        self._deaths: Counter[int | None] = Counter()  # by seed; None: not in an episode
        for _ in range(count):
            self._add()

    def _add(self) -> None:
        ours, theirs = Pipe()
        with worker_environment():
            process = spawn(_worker, (theirs, *self._arguments))
        theirs.close()
        self._processes[ours] = process

    @property
    def replaced(self) -> int:
        """Number of workers that died and were replaced so far."""
        return self._deaths.total()

    def start(self, seed: int) -> None:
        """Send the episode's seed to an idle worker. There must be one."""
        connection = self.idle.pop()
        self.running[connection] = seed
        with suppress(OSError):  # it has died: `reports` will find that out
            connection.send(seed)

    def reports(self) -> Iterator[tuple[int, int]]:
        """Wait, then yield (seed, frames kept: 0 for a failed episode) of the episodes that ended."""
        for connection in wait(list(self._processes)):
            seed = self.running.pop(connection, None)
            at = "outside of an episode" if seed is None else f"at seed {seed}"
            try:
                kind, *content = connection.recv()
            except (EOFError, OSError):
                self._replace(connection, seed, at)
                continue
            if kind == "invalid":
                raise ValueError(content[0])
            if kind == "error":
                raise RuntimeError(f"a recording worker failed {at}:\n{content[0]}")
            self.idle.append(connection)
            if kind == "ready":
                self.facts = content[0]
            else:
                yield content[0], content[1]

    def _replace(self, connection: Connection, seed: int | None, at: str) -> None:
        """Another process in the place of a dead one. ChildProcessError where that has been tried enough."""
        process = self._processes.pop(connection)
        process.join(5)
        connection.close()
        if connection in self.idle:
            self.idle.remove(connection)
        self._deaths[seed] += 1
        if self._deaths[seed] == 1 and (reason := rendering_problem()) is not None:
            raise ValueError(reason)  # a GL library that ends the process would end the next one, too
        if self._deaths[seed] == _DEATHS:
            raise ChildProcessError(
                f"{_DEATHS} recording workers died {at} (the last with exit code {process.exitcode}; -9: killed, "
                "perhaps for want of memory: fewer workers need less); finished episodes are kept"
            )
        self._add()

    def close(self) -> None:
        """Stop all workers and wait for them; those inside an episode are terminated."""
        for connection in self.idle:
            with suppress(OSError):
                connection.send(None)
        for connection, process in self._processes.items():
            # Only after an error or Ctrl-C is a worker not idle; its unfinished episode leaves no file.
            if connection not in self.idle:
                process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()


def _check_same(found: dict[str, Any], request: _Request, out: Path) -> None:
    asked = asdict(request)
    if None not in (began := found.get("scenes"), now := asked.pop("scenes")) and began != now:
        raise ValueError(
            f"{out} was recorded in other scenes than {request.suite} describes now: put the file back as it was, or "
            "choose another folder"
        )
    for name, value in asked.items():
        if found.get(name) != value:
            raise ValueError(
                f"{out} holds a recording with {'seed' if name == 'seed0' else name} {found.get(name)!r}, not "
                f"{value!r}: repeat its settings to continue it, or choose another folder"
            )


def _finished(out: Path, request: _Request, episodes: int) -> bool:
    """True if `out` already is the requested dataset. ValueError if it is something else."""
    if not (out / "meta" / "info.json").exists():
        strangers = [p.name for p in out.iterdir() if p.name not in ("recording", "data")] if out.exists() else []
        if strangers or ((out / "data").exists() and not (out / "recording").exists()):
            names = ", ".join(sorted(strangers)[:3] or ["data"])
            raise ValueError(f"{out} is not empty and not a recording (it holds {names}): choose another folder")
        return False
    provenance = out / "meta" / _PROVENANCE
    if not provenance.exists():
        raise ValueError(f"{out} is a dataset recorded by something else: choose another folder")
    found = load_json(provenance)
    _check_same(found, request, out)
    if len(found["seeds"]) != episodes:
        count = len(found["seeds"])
        raise ValueError(f"{out} is a finished dataset of {count} episodes, not {episodes}: choose another folder")
    return True


def _complete(folder: Path, out: Path, request: _Request, facts: WorldFacts, episodes: int) -> None:
    """Build the dataset of the first `episodes` kept seeds and move it into place, `meta/` last."""
    files = [path for _, path in iter_files(folder, ".parquet")][:episodes]
    build = folder / "build"
    try:
        seeds = build_dataset(files, build, facts)
        save_json(build / "meta" / _PROVENANCE, asdict(request) | {"seeds": seeds})
    except Exception:  # a full disk, for one; the episodes are kept
        shutil.rmtree(build, ignore_errors=True)
        raise
    shutil.rmtree(out / "data", ignore_errors=True)
    os.replace(build / "data", out / "data")
    os.replace(build / "meta", out / "meta")


def record(
    suite: str,
    episodes: int,
    out: str | Path,
    *,
    seed0: int = 0,
    num_workers: int = 2,
    noise: float = 0.15,
    image_size: int = IMAGE_SIZE,
    on_progress: Callable[[RecordingProgress], None] | None = None,
    make_world: MakeWorld | None = None,
    perturb: Perturbation | None = None,
    tasks: Sequence[str] = (),
    depth: bool = False,
    policy: tuple[str, MakePolicy] | None = None,
    corrected: bool = False,
) -> Path:
    """Record the first `episodes` successful demonstrations of seeds seed0, seed0+1, ... as a LeRobotDataset v3.

    The result depends on neither `num_workers` nor interruptions. Calling it again on a finished `out` returns at once;
    on an unfinished one it continues. `make_world` is for other worlds than the suites'; `perturb` randomises the
    suites', and `tasks` are which of theirs to show, in turn (a name given twice has twice the share; none: as the
    seeds say); `depth`: with the depth and the calibration of every camera. `policy`: whose episodes to record instead
    of the expert's, by name and how to load it in a worker; they are kept with their outcome, whichever that is, and
    the recorded action is the one executed, `noise` included; `corrected`: the scripted corrector takes over where the
    policy goes wrong, and episodes in which they did not are left out. ValueError if `out` holds something else or
    the expert hardly ever succeeds; RuntimeError if a world fails. A worker process that dies is replaced and its
    episode begun again; ChildProcessError when that happens three times at one seed.
    """
    out = Path(out)
    words = perturb.words() if perturb is not None else ""
    shown = " ".join(tasks) or None
    request = _Request(
        suite,
        seed0,
        float(noise),
        image_size,
        words or None,
        shown,
        depth or None,
        policy and policy[0],
        corrected or None,
        (digest := scenes_digest(suite)) and f"{digest} of {load_suite(suite).horizon} steps",
    )
    if episodes < 1 or num_workers < 1 or noise < 0:
        raise ValueError(f"need episodes >= 1, num_workers >= 1, noise >= 0; got {episodes}, {num_workers}, {noise}")
    if not 0 <= seed0 < TRAIN_SEED_LIMIT:
        raise ValueError(
            f"the first seed must be 0 to {TRAIN_SEED_LIMIT - 1}, got {seed0}: higher ones are validation and "
            "evaluation scenes"
        )
    folder = out / "recording"
    if _finished(out, request, episodes):
        shutil.rmtree(folder, ignore_errors=True)
        return out
    with locked(out), writing(out):
        if _finished(out, request, episodes):  # by another run that has ended just now
            return out
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "request.json"
        if settings.exists():
            _check_same(load_json(settings), request, out)
        else:
            save_json(settings, request)
        make_world = make_world or partial(
            suite_world, perturb=perturb if words else None, tasks=tuple(tasks), depth=depth
        )
        if policy is not None:
            make_world = partial(CorrectedPolicyWorld if corrected else PolicyWorld, make_world, policy[1])
        facts = _record_seeds(folder, request, episodes, num_workers, on_progress, make_world)
        _complete(folder, out, request, facts, episodes)
        shutil.rmtree(folder)
    return out


def _next_seed(seed0: int, episodes: int, kept: set[int], failed: set[int], running: set[int]) -> int | None:
    """The lowest seed worth starting, None if those kept and running may already be enough.

    Seeds start in order, gaps left by a killed run first, and no more than may be needed: which ones end up in the
    dataset depends on neither timing nor the number of workers.
    """
    promised = 0
    for seed in range(seed0, TRAIN_SEED_LIMIT):
        if promised == episodes:
            return None
        if seed in kept or seed in running:
            promised += 1
        elif seed not in failed:
            return seed
    raise ValueError(f"ran out of demonstration seeds below {TRAIN_SEED_LIMIT}: begin with a lower seed")


def _record_seeds(
    folder: Path,
    request: _Request,
    episodes: int,
    num_workers: int,
    on_progress: Callable[[RecordingProgress], None] | None,
    make_world: MakeWorld,
) -> WorldFacts:
    """Run seeds until `folder` holds the first `episodes` successes."""
    for _, path in iter_files(folder, ".parquet"):
        if not is_whole(path):
            path.unlink()
    kept = {seed for seed, _ in iter_files(folder, ".parquet")}
    failed = {seed for seed, _ in iter_files(folder, ".failed")}
    stored = folder / "facts.json"
    if stored.exists() and _next_seed(request.seed0, episodes, kept, failed, set()) is None:
        return _facts_from_dict(load_json(stored))
    frames = 0
    workers = _Workers(min(num_workers, episodes), make_world, request, folder)
    try:
        while True:
            running = set(workers.running.values())
            following = _next_seed(request.seed0, episodes, kept, failed, running)
            if following is not None and workers.idle:
                workers.start(following)
                continue
            if following is None and not running and workers.facts is not None:
                return workers.facts
            for seed, length in workers.reports():
                (kept if length else failed).add(seed)
                frames += length
                tried = len(kept) + len(failed)
                if on_progress is not None:
                    on_progress(RecordingProgress(len(kept), episodes, tried, frames, workers.replaced))
                if request.corrected and tried >= _NEEDS_NONE and len(kept) < 0.02 * tried:
                    raise ValueError(
                        f"the corrector took over in only {len(kept)} of {tried} episodes: this policy needs no "
                        "correction here"
                    )
                if not request.corrected and tried >= 20 and len(kept) < 0.2 * tried:
                    raise ValueError(
                        f"the expert of {request.suite!r} succeeded in only {len(kept)} of {tried} episodes "
                        f"with noise {request.noise}: lower --noise"
                    )
            if workers.facts is not None and not stored.exists():
                save_json(stored, workers.facts)
    finally:
        workers.close()
