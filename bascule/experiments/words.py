"""`vla experiment words`: success of trained policies when people say it otherwise, and what they do when nothing that
is said is in sight.

May import every package. Every policy hears the same sentences in the same scenes, and every cell is kept in OUT.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bascule.experiments.arms import Report, Row, arms_of, evaluation_scenes, in_turn, kept, over_seeds, played_with
from bascule.experiments.spoken import NOTHING, TARGET, Heard, Listener, SpokenEnv
from bascule.experiments.unseen import FILE, Scene, Unseen, load_unseen
from vla.core.compatibility import fitted
from vla.core.statistics import wilson95

if TYPE_CHECKING:
    from envs.tabletop.episodes import Episode

_log = logging.getLogger(__name__)
PLAIN, UNSEEN, ABSENT = "plain", "unseen", "nothing in sight, left alone"
"""Parts: the suite's own phrasings; the sentences about the target; those about nothing in the scene."""


@dataclass(frozen=True)
class WordsConfig:
    """Sentences that no training text has."""

    policy: tuple[Path, ...] = ()
    """Checkpoints, or expert, zero, random, blind. ARM=CHECKPOINT gives an arm's name: several of one name are its
    training seeds, in this order."""
    suite: str = "tabletop-pick"
    """The suite to evaluate in."""
    episodes: int = 400
    """Episodes with a sentence about the target, each sentence in equally many."""
    num_envs: int = 48
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""
    sentences: Path = FILE
    """The file with the sentences."""


def words(config: WordsConfig, out: Path, on_progress: Report | None = None) -> dict[str, Any]:
    """k/n with its interval, wrong objects and holds of every policy and part, in all and by group of sentences, and by
    sentence under "sentences". Where nothing named is in sight, k counts the episodes in which nothing was lifted.

    ValueError without a policy, for a suite of other tasks than picking, and for a number of episodes that the
    sentences do not divide."""
    if not config.policy:
        raise ValueError("vla experiment words needs a policy: --policy CHECKPOINT (or expert, zero, random)")
    parts, policies = _said(config, load_unseen(config.sentences)), arms_of(config.policy)
    started, arms, sentences = time.monotonic(), dict[str, list[Row]](), dict[str, list[Row]]()
    cells = [(arm, seed, part) for arm, ones in policies.items() for seed in range(len(ones)) for part in parts]
    for arm, seed, part in in_turn(cells, lambda cell: f"{cell[0]}, seed {cell[1]}, {cell[2]}", on_progress):
        policy = policies[arm][seed]
        said = "\n".join(f"{one.seed}: {one.instruction}" for one in parts[part])
        asked = {"suite": config.suite, "policy": policy, "said": hashlib.sha256(said.encode()).hexdigest()[:16]}
        asked |= played_with(policy, config.suite)
        file = out / f"{arm}-{f'{seed}-' if seed else ''}{part.replace(', ', '-').replace(' ', '-')}.json"
        row = kept(file, asked, partial(_played, config, policy, parts[part]))
        heard = [Heard(**one) for one in row["played"]]
        prefix = f"{arm}: " if len(policies) > 1 else ""
        for name, counts in rows_of(part, heard).items():
            arms.setdefault(prefix + name, []).append(counts | {"seed": seed})
        for name, counts in {} if part == PLAIN else _by("sentence", part, heard).items():
            sentences.setdefault(prefix + name, []).append(counts | {"seed": seed})
    seeds = max(map(len, policies.values()))
    per_seed = ["per_seed"] if seeds > 1 else []
    held = ["held"] if any("held" in row for rows in arms.values() for row in rows) else []
    return {
        "experiment": "words",
        "seeds": list(range(seeds)),
        "arms": {name: _pooled(rows) for name, rows in arms.items()},
        "sentences": {name: _pooled(rows) for name, rows in sentences.items()},
        "columns": [*per_seed, "wrong_object", *held],
        "seconds": round(time.monotonic() - started, 1),
    }


def _said(config: WordsConfig, unseen: Unseen) -> dict[str, list[Heard]]:
    """Every part's episodes, yet to be played. Scene k of all parts is the same, where its sentence fits it."""
    from envs.registry import load_suite
    from envs.tabletop.episodes import sample_episode
    from envs.tabletop.scene import SCENES
    from envs.tabletop.suites import Suite

    suite = load_suite(config.suite)
    if not isinstance(suite, Suite) or suite.tasks != ("pick",):
        raise ValueError(f"the unseen sentences ask to pick things up: --suite tabletop-pick, not {config.suite}")
    total = sum(map(len, unseen.present.values()))
    if config.episodes % total:
        raise ValueError(f"--episodes must be a multiple of {total}, the number of sentences, got {config.episodes}")
    scene = SCENES[suite.scene]
    draw = partial(sample_episode, suite, scene)
    plain = [draw(suite.eval_seed0 + k) for k in range(config.episodes)]
    parts = {PLAIN: [Heard(one.seed, PLAIN, one.template, one.instruction) for one in plain]}
    for part, groups in ((UNSEEN, unseen.present), (ABSENT, unseen.absent)):
        pairs = [(group, sentence) for group, texts in groups.items() for sentence in texts]
        parts[part], size = [], len(pairs) * (config.episodes // total)
        for k in range(size):
            repeat, place = divmod(k, len(pairs))
            group, sentence = pairs[place]
            # Scene k, or the next one in which the sentence means one thing, or nothing, as its part says.
            later = (draw(suite.eval_seed0 + k + further * size) for further in count())
            episode = next(one for one in later if unseen.fits(sentence, _scene(one, scene.objects)))
            # the place is added so that a group's sentences do not all draw the same synonym
            said = unseen.fill(sentence, _scene(episode, scene.objects), repeat + place)
            parts[part].append(Heard(episode.seed, group, sentence, said))
    return parts


def _scene(episode: Episode, kinds: Sequence[str]) -> Scene:
    return Scene(episode.colors, tuple(kinds[slot] for slot in episode.slots), episode.slots.index(episode.target))


def _played(config: WordsConfig, policy: str, heard: Sequence[Heard]) -> Row:
    """The episodes of one part, played."""
    from bascule.agents import AGENTS, resolve_policy
    from envs.evaluation.evaluate import evaluate

    heard = [replace(one) for one in heard]
    few = replace(config, episodes=len(heard), num_envs=min(config.num_envs, len(heard)))
    loaded = None if policy in AGENTS else resolve_policy(policy, None, config.suite)
    with evaluation_scenes(few, loaded) as (env, _):
        agent = fitted(loaded or resolve_policy(policy, env, config.suite), env, say=_log.warning)
        spoken = SpokenEnv(env, heard)
        evaluate(Listener(agent, spoken), spoken, [one.seed for one in heard], name=policy, suite=config.suite)
    return {"played": [asdict(one) for one in heard]}


def rows_of(part: str, heard: Sequence[Heard]) -> dict[str, Row]:
    """The arms of one part, in all and by group; of a policy with a confidence also for a robot that holds."""
    arms = {part: _counts(part, heard)}
    if any(one.held is not None for one in heard):
        arms[f"{part}, holding"] = _counts(part, [replace(one, lifted=NOTHING) if one.held else one for one in heard])
    if part != PLAIN:
        arms |= {f"{part}: {group}": row for group, row in _by("group", part, heard).items()}
    return arms


def _by(field: str, part: str, heard: Sequence[Heard]) -> dict[str, Row]:
    groups: dict[str, list[Heard]] = {}
    for one in heard:
        groups.setdefault(getattr(one, field), []).append(one)
    return {name: _counts(part, ones) for name, ones in groups.items()}


def _counts(part: str, heard: Sequence[Heard]) -> Row:
    """k of n episodes in which what was due was lifted (the target; of an absent thing, nothing), those in which
    another object was, and those that the policy's confidence would have held."""
    from envs.evaluation.evaluate import Count

    due, n = NOTHING if part == ABSENT else TARGET, len(heard)
    row = Count(sum(one.lifted == due for one in heard), n).to_dict()
    held = [one.held for one in heard if one.held is not None]
    marks = {"wrong_object": sum(one.lifted not in (due, NOTHING) for one in heard)}
    return row | _marked(marks | ({"held": sum(held)} if held else {}), n)


def _pooled(rows: list[Row]) -> Row:
    """An arm's counts over its training seeds."""
    total = over_seeds(rows)
    if len(rows) == 1:
        del total["per_seed"]
    marks = {name: sum(row[name] for row in rows) for name in ("wrong_object", "held") if name in rows[0]}
    return total | _marked(marks, total["episodes"])


def _marked(marks: Mapping[str, int], n: int) -> Row:
    """Counts of other things that happened in n episodes, each with its rate and interval."""
    row: Row = {}
    for name, k in marks.items():
        row |= {name: k, f"{name}_rate": k / n, f"{name}_wilson95": list(wilson95(k, n))}
    return row
