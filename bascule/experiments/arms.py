"""Shared steps of the experiments: finished runs that are kept, several arms over several seeds, imitation."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bascule.agents import AGENTS
from vla.core.checkpoint import CONFIG, weights_digest
from vla.core.config import load_json, save_json, write_atomic

if TYPE_CHECKING:
    from envs.perturb.perturbation import Perturbation
    from vla.core.types import Policy, VecEnv
    from vla.model.config import VLAConfig
    from vla.model.model import VLA

    Variant = Callable[[VLAConfig], VLAConfig]

NEWER = ("weights", "suite_file", "backbone_files")
"""Entries of `made_of` and `files_of`, which rows of earlier versions do not have."""
BEGUN = ".begun"
"""Ending of the file that tells, until there is a row, that a command has begun with it."""
Report = Callable[[int, int, str], None]
"""Callback with (finished runs, all runs, description of the current one)."""
Row = dict[str, Any]


def made_of(policy: str | Path, suite: str) -> dict[str, str]:
    """Tells, in the result of an evaluation, what may change under the same names: the "weights" in a checkpoint's
    folder, and the scenes of a "suite_file". Scripted agents have no weights, and the package's suites no file of
    their own."""
    from envs.registry import scenes_digest

    checkpoint = str(policy) not in AGENTS and (Path(policy) / CONFIG).is_file()
    weights = {"weights": weights_digest(policy)} if checkpoint else {}
    return weights | ({} if (scenes := scenes_digest(suite)) is None else {"suite_file": scenes})


def played_with(policy: str | Path, suite: str) -> dict[str, str]:
    """`made_of` for a row that is kept, with what else a suite file may say otherwise when the command is repeated."""
    return made_of(policy, suite) | files_of({"suite": suite})


def files_of(asked: Mapping[str, Any]) -> dict[str, str]:
    """Contents of the files that the settings `asked` name, in short: a "suite" of its own file, a "backbone" folder.
    Either may be another when the command is repeated."""
    from envs.registry import load_suite, scenes_digest

    found, suite, backbone = dict[str, str](), asked.get("suite"), Path(asked.get("backbone") or "nowhere")
    if suite and (scenes := scenes_digest(suite)) is not None:
        told = load_suite(suite)
        found["suite_file"] = f"{scenes}, horizon {told.horizon}, seeds from {told.eval_seed0}"
    if backbone.is_dir():
        files = sorted(file for file in backbone.iterdir() if file.is_file())
        found["backbone_files"] = _digest(tuple((file, file.stat().st_mtime_ns) for file in files))
    return found


@cache
def _digest(files: tuple[tuple[Path, int], ...]) -> str:
    """A digest of the contents of these files, each given with the time of its last change."""
    digest = hashlib.blake2b(digest_size=8)
    for path, _ in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def kept(file: Path, asked: Mapping[str, Any], run: Callable[[], Row]) -> Row:
    """The row in `file`, if an earlier command got so far; otherwise that of `run`, which is written there with the
    settings `asked` and what the files hold that they name (`files_of`). ValueError where the file holds a row of
    others, or none. For those of `NEWER` that an older row does not name it is not refused."""
    asked = {**asked, **files_of(asked)}
    if file.is_file():
        row = _row(file)
        if other := _other(row["asked"], asked):
            raise ValueError(f"{file.parent} holds results of {other}: choose another --out")
        return row
    row = {**run(), "asked": asked}
    save_json(file, row)
    return row


def begin(out: Path, name: str, asked: Mapping[str, Any], rows: Sequence[Path] = ()) -> None:
    """Note in OUT/NAME-settings.json what is begun there, before anything else is: what an interrupted command has
    recorded and trained goes into the `rows` of the next. ValueError where it was begun with other settings than
    `asked`, or with other files (`files_of`), unless nothing has come of that."""
    file, asked = out / f"{name}-settings.json", {**asked, **files_of(asked)}
    if not file.is_file():
        if not any(row.is_file() for row in rows):  # those of an earlier version say themselves what was asked
            save_json(file, asked)
    elif other := _other(load_json(file), asked):
        if any(path.is_file() and not path.name.endswith(("-settings.json", BEGUN)) for path in out.rglob("*")):
            raise ValueError(f"{out} was begun with {other}: choose another --out")
        save_json(file, asked)


def _row(file: Path) -> Row:
    """A row that was kept. ValueError with the remedy for a file that holds none, as after a power cut."""
    try:
        row = load_json(file)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("asked"), dict):
        raise ValueError(f"{file} is damaged: remove it, and the same command plays it again")
    return row


def _other(had: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """How settings that were kept differ from those asked for, in words; "" where they do not."""
    had = {name: asked[name] for name in NEWER if name in asked} | dict(had)
    differing = [name for name in had.keys() | asked.keys() if had.get(name) != asked.get(name)]
    if not differing:
        return ""
    if differing == ["weights"]:
        return f"other weights, which {asked.get('policy', 'the policy')} held before"
    if differing == ["suite_file"]:
        return f"other scenes, which {asked.get('suite', 'the suite file')} described before"
    if differing == ["backbone_files"]:
        return f"another backbone, which {asked['backbone']} held before"
    return f"other settings ({had})"


def arms_of(policies: Sequence[str | Path], kind: Literal["checkpoint", "file"] = "checkpoint") -> dict[str, list[str]]:
    """{arm: the policies of its training seeds, or the files of their results}. ValueError where two without a name
    are called alike."""
    arms: dict[str, list[str]] = {}
    for text in map(str, policies):
        name, given, policy = text.partition("=")
        if not given or "/" in name or Path(text).exists():  # a folder may be called lr=1e-3
            name, policy = Path(text).name.removesuffix(".json"), text
            if name in arms:
                several = "files" if kind == "file" else "policies"
                raise ValueError(f"two {several} are called '{name}': give them names, ARM={arms[name][0]} ARM={text}")
        if not (name and policy):
            flag = "" if kind == "file" else "--policy "
            raise ValueError(f"{flag}{text} must be a {kind}, or ARM={kind.upper()}")
        arms.setdefault(name, []).append(policy)
    return arms


def in_turn[Run](runs: Sequence[Run], words: Callable[[Run], str], on_progress: Report | None) -> Iterator[Run]:
    """The runs one by one, each reported with its `words` before it begins, and the last when it is done."""
    report = on_progress or (lambda done, total, what: None)
    for done, run in enumerate(runs):
        report(done, len(runs), words(run))
        yield run
    report(len(runs), len(runs), "")


def compare(
    name: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    run: Callable[[str, int], Row],
    out: Path,
    *,
    asked: Mapping[str, Any],
    figures: Mapping[str, Callable[[list[Row]], Any]],
    on_progress: Report | None,
) -> dict[str, Any]:
    """Every arm with every seed: {"experiment", "seeds", "arms": {arm: counts over the seeds}, "columns", "seconds"}.

    `run` returns the row of an arm and a seed, which is kept in OUT/ARM-SEED.json: successes, episodes, wrong_object,
    and what `figures` read. These are further columns, each computed from an arm's rows of all seeds.
    """
    started = time.monotonic()
    pairs = [(seed, arm) for seed in seeds for arm in arms]
    files = {(seed, arm): out / f"{arm}-{seed}.json" for seed, arm in pairs}
    begin(out, name, asked, list(files.values()))
    rows: dict[str, list[Row]] = {arm: [] for arm in arms}
    for seed, arm in in_turn(pairs, lambda pair: f"{pair[1]}, seed {pair[0]}", on_progress):
        row = kept(files[seed, arm], asked, partial(_timed, partial(run, arm, seed), files[seed, arm]))
        rows[arm].append(row | {"seed": seed})
    return {
        "experiment": name,
        "seeds": list(seeds),
        "arms": {
            arm: over_seeds(found)
            | {column: figure(found) for column, figure in figures.items()}
            | ({"continued": again} if (again := [row["seed"] for row in found if row.get("continued")]) else {})
            for arm, found in rows.items()
        },
        "columns": ["per_seed", *figures],
        "seconds": round(time.monotonic() - started, 1),
    }


def _timed(run: Callable[[], Row], file: Path) -> Row:
    """The row of `run`, which says of one that an earlier command had begun that its times are of the rest alone."""
    begun = file.with_suffix(BEGUN)
    continued = begun.is_file()
    if not continued:
        write_atomic(begun, b"")
    row = run()
    begun.unlink(missing_ok=True)
    if continued:
        logging.getLogger(__name__).warning(
            "%s was begun by an earlier command: its times are those of this one alone", file.stem
        )
    return row | ({"continued": True} if continued else {})


def share_kept(row: Mapping[str, Any], plain: Mapping[str, Any]) -> float | None:
    """Success as a share of that in `plain`; None where there was none, or where nothing was played."""
    if not row["episodes"] or not plain["successes"]:
        return None
    return round(row["success_rate"] / plain["success_rate"], 3)


def over_seeds(rows: list[Row]) -> Row:
    """One arm's counts, in all and by seed."""
    from envs.evaluation.evaluate import Count

    total = Count(sum(row["successes"] for row in rows), sum(row["episodes"] for row in rows))
    return {
        **total.to_dict(),
        "per_seed": {str(row["seed"]): [row["successes"], row["episodes"]] for row in rows},
        "wrong_object": sum(row["wrong_object"] for row in rows),
    }


class EvaluationConfig(Protocol):
    """The fields of an experiment's configuration that say where its policies are evaluated."""

    suite: str
    episodes: int
    num_envs: int
    workers: int


@contextmanager
def evaluation_scenes(
    config: EvaluationConfig,
    policy: Policy | None = None,
    *,
    seed0: int | None = None,
    perturb: Perturbation | None = None,
) -> Iterator[tuple[VecEnv, range]]:
    """The environments, drawn as `policy` reads them, and the seeds of the suite's evaluation scenes, or of those from
    `seed0` on."""
    from envs import make_vec
    from envs.registry import load_suite
    from envs.sim.render_options import drawn_for

    first = load_suite(config.suite).eval_seed0 if seed0 is None else seed0
    env = make_vec(config.suite, config.num_envs, num_workers=config.workers, perturb=perturb, **drawn_for(policy))
    try:
        yield env, range(first, first + config.episodes)
    finally:
        env.close()


class ImitationConfig(Protocol):
    """The fields of an experiment's configuration that its imitation policies depend on."""

    suite: str
    demos: int
    steps: int
    backbone: str
    workers: int


def imitate(
    config: ImitationConfig,
    seed: int,
    out: Path,
    folder: Path,
    variant: Variant | None = None,
    *,
    keep_features: bool = False,
    recipe_name: str = "tabletop",
) -> VLA:
    """The seed's imitation policy in `folder`, from demonstrations in `out`; an interrupted run continues
    exactly where it was. `keep_features`: see `TrainConfig`. KeyboardInterrupt when it is stopped again."""
    from envs.demos.record import record
    from envs.seeds import DEMO_BLOCK
    from vla.backbones.hub import load as load_backbone
    from vla.core.types import IMAGE_SIZE
    from vla.data.lerobot_dataset import load_dataset
    from vla.training.recipes import RECIPES
    from vla.training.train import build_vla, train

    recipe = RECIPES[recipe_name]()
    model = replace(recipe.model, backbone=config.backbone)
    model = variant(model) if variant else model
    recipe = replace(recipe, steps=config.steps, seed=seed, model=model, keep_features=keep_features)
    backbone = load_backbone(recipe.model.backbone)
    dataset = record(
        config.suite, config.demos, out / f"demos-{seed}", seed0=DEMO_BLOCK * seed, num_workers=config.workers,
        image_size=getattr(backbone, "image_size", IMAGE_SIZE),
    )  # fmt: skip
    demos = load_dataset(dataset)
    model = build_vla(recipe, demos, backbone=backbone)
    if train(recipe, model, demos, folder, resume=(folder / "config.json").exists()).interrupted:
        raise KeyboardInterrupt
    return model
