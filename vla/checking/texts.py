"""Task strings of a recording: empty, twice, several for one task, broken, or of words that a backbone only spells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vla.checking.recording import Recording
from vla.data.findings import Finding, Severity, listed, numbered
from vla.data.tables import no_text, parquet_files, read_parquet, says_something, tasks, two_texts
from vla.processing.text import plain_text, read, shortened

_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]|\x1b\\[|[\u00c2\u00c3][\u0080-\u00bf]")
"""Remains of a character that was read in a wrong encoding; control characters; a terminal's colours."""
_LIMIT = 512
_NAMED = 6


class Words:
    """A tokenizer read from its file alone, as `vla.processing.text.read` calls one."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))
        self.unk_token_id = self._tokenizer.token_to_id("<unk>")

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=False).ids}


def tokenizer_file(backbone: str) -> Path | None:
    """The tokenizer of a backbone that ships with the package, or of the folder of a backbone or policy; None where
    there is none without a network."""
    shipped = Path(str(resources.files("vla.backbones"))) / "assets" / f"{backbone}-vlm"
    places = (shipped, Path(backbone), Path(backbone) / "tokenizer")
    return next((place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file()), None)


def episode_tasks(recording: Recording) -> dict[int, str]:
    """The first task string of every episode, "" where there is none."""
    try:
        texts = dict(reversed(tasks(recording.root)))
    except ValueError:
        return {}
    index = recording.table.column("task_index").to_numpy()[recording.starts[:-1]]
    return {
        int(number): text if isinstance(text := texts.get(int(which)), str) else ""
        for number, which in zip(recording.episodes, index, strict=True)
    }


def task_count(recording: Recording) -> int:
    """Number of different task strings that its frames have."""
    try:
        texts = dict(reversed(tasks(recording.root)))
    except ValueError:
        return 0
    index = recording.table.column("task_index").to_numpy()
    return len({str(texts.get(which, "")) for which in np.unique(index).tolist()})


def text_findings(recording: Recording, backbone: str) -> list[Finding]:
    """All findings about task strings. `backbone`: whose words are asked for."""
    try:
        rows = tasks(recording.root)
    except ValueError as problem:
        return [Finding("task_missing", "error", str(problem))]
    index = recording.table.column("task_index").to_numpy()
    used = np.unique(index).tolist()
    found = []
    known: dict[int, object] = {}
    for which, text in rows:
        if known.setdefault(which, text) != text:
            found.append(Finding("task_two_texts", "error", two_texts(which, known[which], text),
                                 _with(recording, index, [which])))  # fmt: skip
    for which in used:
        if not says_something(known.get(which)):
            found.append(Finding("task_empty", "error", no_text(which), _with(recording, index, [which])))
    said = {which: str(known[which]) for which in used if says_something(known.get(which))}
    found += _disagreeing(recording, index, said) + _several(recording, index)
    return found + _alike(recording, index, said) + _odd(recording, index, said, backbone)


def _with(recording: Recording, index: NDArray[np.int64], which: Sequence[int]) -> tuple[int, ...]:
    """The episodes that have a frame of these tasks."""
    numbers = recording.table.column("episode_index").to_numpy()
    return tuple(np.unique(numbers[np.isin(index, which)]).tolist())


def _several(recording: Recording, index: NDArray[np.int64]) -> list[Finding]:
    places = [recording.rows(place) for place in range(len(recording.episodes))]
    mixed = [int(recording.episodes[p]) for p, rows in enumerate(places) if len(np.unique(index[rows])) > 1]
    if not mixed:
        return []
    have = "has" if len(mixed) == 1 else "have"
    text = f"{listed(mixed)} {have} several task strings: each frame is learnt with its own"
    return [Finding("task_changes", "note", text, tuple(mixed))]


def _disagreeing(recording: Recording, index: NDArray[np.int64], said: dict[int, str]) -> list[Finding]:
    """Episodes of which meta/episodes names another task than the frames do: an error where it is another task of the
    recording, as after a tool has numbered meta/tasks.parquet anew; else its words may have been corrected since."""
    swapped: dict[int, tuple[str, str]] = {}
    reworded: dict[int, tuple[str, str]] = {}
    known = {plain_text(text, "signs") for text in said.values()}
    told = _told_by_episodes(recording)
    for place, number in enumerate(recording.episodes.tolist()):
        learnt = [said[which] for which in np.unique(index[recording.rows(place)]).tolist() if which in said]
        wanted = {plain_text(text, "signs"): text for text in told.get(number, ())}
        strange = [text for text in learnt if plain_text(text, "signs") not in wanted]
        if not strange or not wanted:
            continue
        kind = swapped if set(wanted) & known else reworded
        kind[number] = (next(iter(wanted.values())), strange[0])
    found: list[Finding] = []
    severities: tuple[tuple[dict[int, tuple[str, str]], Severity], ...] = ((swapped, "error"), (reworded, "warning"))
    for those, severity in severities:
        if not those:
            continue
        first, (there, here) = next(iter(those.items()))
        text = (
            f"meta/episodes says {shortened(there)} for episode {first}, the number of its frames is {shortened(here)} "
            f"in meta/tasks.parquet, which is what is learnt ({numbered(len(those), 'such episode')}): was that table "
            "numbered anew, or reworded? Correct the one that is wrong"
        )
        found.append(Finding("task_disagrees", severity, text, tuple(those)))
    return found


def _told_by_episodes(recording: Recording) -> dict[int, list[str]]:
    """Episode -> its task strings as meta/episodes has them; empty where it has none."""
    found: dict[int, list[str]] = {}
    try:
        for path in parquet_files(recording.root / "meta" / "episodes"):
            part = read_parquet(path, recording.root, ["episode_index", "tasks"])
            for number, texts in zip(*(part.column(name).to_pylist() for name in part.column_names), strict=True):
                found[number] = [text for text in ([texts] if isinstance(texts, str) else texts or ()) if text]
    except ValueError:
        return {}  # other writers have none; what needs the table says so
    return found


def _alike(recording: Recording, index: NDArray[np.int64], said: dict[int, str]) -> list[Finding]:
    """Texts that differ only in how they are written down."""
    groups: dict[str, list[int]] = {}
    for which, text in said.items():
        groups.setdefault(plain_text(text, "signs"), []).append(which)
    found = []
    for group in groups.values():
        texts = list(dict.fromkeys(said[which] for which in group))
        if len(group) > 1 and len(texts) > 1:
            words = (
                f"the task strings {', '.join(map(shortened, texts))} differ only in case, spaces or punctuation: they "
                "are one task, write them alike (a policy reads them alike)"
            )
            found.append(Finding("task_spelling", "warning", words, _with(recording, index, group)))
        elif len(group) > 1:
            words = f"meta/tasks.parquet lists the task string {shortened(texts[0])} {len(group)} times: number it once"
            found.append(Finding("task_twice", "note", words, _with(recording, index, group)))
    return found


def _odd(recording: Recording, index: NDArray[np.int64], said: dict[int, str], backbone: str) -> list[Finding]:
    """Broken characters, texts that say nothing, and words without a meaning."""
    file = tokenizer_file(backbone)
    tokenizer = Words(file) if file is not None else None
    found, strange = [], {}
    for which, text in said.items():
        if _BROKEN.search(text):
            words = (
                f"the task string {shortened(text)} holds broken characters: write it in UTF-8, without control codes"
            )
            found.append(Finding("task_characters", "warning", words, _with(recording, index, [which])))
        elif not plain_text(text, "signs"):
            words = f"the task string {shortened(text)} has no word, number or symbol: write what is to be done"
            found.append(Finding("task_empty", "error", words, _with(recording, index, [which])))
        elif tokenizer is not None:
            reading = read(text, tokenizer, rule="signs", limit=_LIMIT)
            if reading.cut_after is not None:
                words = f"the task string {shortened(text)} is longer than {_LIMIT} tokens: say it in fewer words"
                found.append(Finding("task_long", "warning", words, _with(recording, index, [which])))
            for word in (*reading.unknown, *reading.spelled):
                strange.setdefault(word, []).append(which)
    if strange:
        named = ", ".join(map(shortened, list(strange)[:_NAMED])) + (" ..." if len(strange) > _NAMED else "")
        words = (
            f"the backbone '{backbone}' only spells {named}: such a word means what these demonstrations show and "
            "nothing else; plainer words, or another --backbone, bring knowledge with them"
        )
        those = sorted({which for tasks_with in strange.values() for which in tasks_with})
        found.append(Finding("task_words", "note", words, _with(recording, index, those)))
    return found
