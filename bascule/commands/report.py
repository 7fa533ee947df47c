"""`vla report`: results as data, and the pages that show them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bascule.commands.base import Command


@dataclass(frozen=True)
class Report(Command):
    """Manage results: `report results` renders BENCHMARKS.md, `report add NAME FILE...` adds the JSON of a run."""

    action: Positional[Literal["results", "add"]]
    """results: write every page that shows results from benchmarks/results. add: create or update a claim there."""
    name: Positional[str] = ""
    """add: name of the claim, which is the name of its file."""
    files: Positional[tuple[Path, ...]] = ()
    """add: files written by vla eval, bench and experiment with --json, and the quickstart's report.json."""
    check: bool = False
    """results: write nothing; exit code 1 if a page differs from its claims."""
    claim: str | None = None
    """add: the title of a new claim."""
    command: str | None = None
    """add: the command that reproduces these figures."""
    section: str | None = None
    """add: the heading of BENCHMARKS.md under which it is shown."""
    note: str | None = None
    """add: one sentence on how to read it."""

    def run(self) -> int:
        """Add the claim if asked to, then render or check the pages. Exit code 1 if --check finds a difference."""
        from bascule.report.results import stale, write_pages
        from vla.runtime.console import say

        if self.action == "results" and (self.name or self.files):
            raise ValueError("vla report results takes no names; it renders all claims")
        if self.action == "add":
            from bascule.report.runs import Wording, add

            if not self.name:
                raise ValueError("vla report add needs a name for the claim, and the JSON files of a run")
            add(self.name, self.files, Wording(self.claim, self.command, self.section, self.note))
        if self.check:
            differing = stale()
            for page in differing:
                say(f"{page} differs from benchmarks/results: run `./run report results`")
            return int(bool(differing))
        for page in write_pages():
            say(f"{page} written")
        return 0
