"""README.md and docs/ hold what they say: commands parse, links resolve, the examples of docs/extend.md run."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from bascule import main as cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
HISTORY = "research-log"
"""Its commands are those of their day."""

SCRIPT_COMMANDS = {"test", "setup"}
"""Commands that ./run does itself; everything else is a command of `vla`."""
MAX_EXAMPLE_LINES = 40
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:\./run|vla) [a-z][^`]*)`")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def blocks(page):
    """[(language, text)] of a page's fenced blocks, in order."""
    return [(match[1], match[2]) for match in _FENCE.finditer(page.read_text())]


def shell_commands(text):
    """Argument lists of the `vla` commands in a shell block: comments, variables and line ends taken off."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words[:1] in (["./run"], ["vla"]):
            yield words[1:]


def commands(page):
    """[argument list] of every command line that a page shows, in blocks and within sentences."""
    found = [words for language, text in blocks(page) if language in ("sh", "text") for words in shell_commands(text)]
    prose = _FENCE.sub("", page.read_text())
    for match in _INLINE.finditer(prose):
        # `vla eval` alone names a command; with arguments it is one that somebody may type
        words = shlex.split(match[1])
        found += [words[1:]] if len(words) > 2 and "..." not in words else []
        assert words[1] in cli.COMMANDS or words[1] in SCRIPT_COMMANDS, f"{page.name}: there is no `{match[1]}`"
    return [[word for word in words if word != "..."] for words in found]


def anchors(page):
    """GitHub's anchors of a page's headings."""
    text = _FENCE.sub("", page.read_text())
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def test_what_the_scripts_of_benchmarks_import_is_there():
    texts = [path.read_text() for path in sorted((ROOT / "benchmarks").glob("*.sh"))]
    parts = [part for text in texts for part in re.findall(r"<<'PY'\n(.*?)\nPY\n", text, re.DOTALL)]
    imports = [node for part in parts for node in ast.walk(ast.parse(part)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module.partition(".")[0] in ("vla", "envs", "bascule")]
    assert len(ours) > 5, "the scan found nothing: it is broken"
    for node in ours:
        module = importlib.import_module(node.module)
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], node.module


def test_every_page_is_read():
    names = {page.stem for page in PAGES}
    wanted = {"README", "concepts", "train", "evaluate", "rl", "deploy", "extend", "architecture"}
    assert wanted <= names
    assert sum(len(commands(page)) for page in PAGES) > 40, "the scan found too few commands: it is broken"


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != HISTORY], ids=lambda page: page.stem)
def test_the_parser_takes_every_command(page, capsys):
    """A renamed flag or command fails here, in the page that still shows the old one."""
    for words in commands(page):
        name, *rest = words
        if name in SCRIPT_COMMANDS:
            continue
        assert name in cli.COMMANDS, f"{page.name}: there is no command `{name}`"
        try:
            command, left = cli.COMMANDS[name].variant(rest)
            tyro.cli(command, args=left, prog=f"vla {name}")
        except SystemExit:
            pytest.fail(f"{page.name}: the parser refuses `vla {shlex.join(words)}`:\n{capsys.readouterr().err}")


def test_the_parser_check_sees_a_renamed_flag():
    (words,) = shell_commands("PYTHONPATH=. ./run train --dataset runs/few --heads l1  # of another kind\n")
    assert words == ["train", "--dataset", "runs/few", "--heads", "l1"]
    with pytest.raises(SystemExit):
        tyro.cli(cli.COMMANDS["train"], args=words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_anchors_resolve(page):
    broken = []
    for link in filter(None, itertools.chain(*_LINK.findall(_FENCE.sub("", page.read_text())))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            broken.append(link)
    assert broken == []


def test_named_files_exist():
    """`vla/model/heads/registry.py` in a sentence is a file, and `vla/model/` a folder."""
    missing = []
    for page in PAGES:
        prose = _FENCE.sub("", page.read_text())
        for path in re.findall(r"`((?:vla|envs|policies|rl|bascule|tests|benchmarks|sim_configs)/[\w./]+)`", prose):
            missing += [] if (ROOT / path).exists() else [f"{page.name}: {path}"]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_are_short_and_import_what_there_is(page):
    for language, text in blocks(page):
        if language == "python":
            assert text.count("\n") <= MAX_EXAMPLE_LINES
            for node in ast.walk(ast.parse(text, page.name)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readme_is_short_and_the_picture_small():
    assert (ROOT / "README.md").read_text().count("\n") <= 130
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures and all(path.stat().st_size <= 1_500_000 for path in pictures)


def test_the_examples_of_extend_run(tmp_path, monkeypatch, capsys):
    """Files are written, commands run, in the order of the page: physics, training and a controlled robot are real."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    before = set(sys.modules)
    try:
        for language, text in blocks(ROOT / "docs" / "extend.md"):
            if language in ("python", "toml"):
                name = re.match(r"# (\S+\.\w+)\n", text)
                assert name, f"a block of docs/extend.md names no file: {text[:60]}"
                Path(name[1]).write_text(text)
            elif language == "sh":
                for words in shell_commands(text):
                    assert cli.main([*words, *_one_worker(words[0])]) == 0, (
                        f"{shlex.join(words)}\n{capsys.readouterr()}"
                    )
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("my_"):
                del sys.modules[name]
    out = capsys.readouterr().out
    assert out.count("100.0%") >= 4  # the expert solves both suites
    ticks, same = re.search(r"(\d+) ticks, (\d+) decided as logged", out).groups()
    assert ticks == same and int(ticks) >= 1


def _one_worker(command):
    return ["--workers", "1"] if command in ("demos", "eval") else []
