"""`vla report`: results as data, and the pages that show them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bascule.commands.base import Command, check_file, refuse_idle


@dataclass(frozen=True)
class Report(Command):
    """Compare evaluations (`report compare A.json B.json`); render BENCHMARKS.md (`report results`, `report add`)."""

    action: Positional[Literal["compare", "results", "add"]]
    """compare: two or more files of `vla eval --json`, played in the same scenes; every arm beside the first. results:
    write every page that shows results from benchmarks/results. add: create or update a claim there."""
    name: Positional[str] = ""
    """compare: the first file, or ARM=FILE. add: name of the claim, which is the name of its file."""
    files: Positional[tuple[Path, ...]] = ()
    """compare: the other files; ARM=FILE names an arm, and several files of one arm are its training seeds. add: files
    written by vla eval, bench and experiment with --json, and the quickstart's report.json."""
    json: Path | None = None
    """compare: write the result to this file too."""
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
        """Compare; or add the claim if asked to, then render or check the pages. Exit code 1 if --check finds a
        difference."""
        if self.action == "compare":
            self._compare()
            return 0
        if self.json is not None:
            raise ValueError("--json is for `vla report compare`")
        from bascule.report.results import stale, write_pages
        from vla.runtime.console import say

        if self.action == "results" and (self.name or self.files):
            raise ValueError("vla report results takes no names; it renders all claims")
        if self.action == "results":
            refuse_idle(self, "of `report results`: it is for `report add`", "claim", "command", "section", "note")
        if self.action == "add":
            from bascule.report.runs import Wording, add

            refuse_idle(self, "of `report add`: it is for `report results`", "check")
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

    def _compare(self) -> None:
        """Print the arms, their differences and a sentence for each; write --json. ValueError for files that were not
        played in the same scenes."""
        from bascule.experiments.arms import arms_of
        from bascule.report.comparison import compare, tables
        from vla.core.config import save_json
        from vla.runtime.console import say, stdout

        if self.check or any((self.claim, self.command, self.section, self.note)):
            raise ValueError("`vla report compare` takes files and --json only")
        check_file("--json", self.json)
        arms = arms_of([self.name, *self.files] if self.name else [], "file")
        result = compare({name: [Path(file) for file in files] for name, files in arms.items()})
        for warning in result["warnings"]:
            say(f"note: {warning}")
        for table in tables(result):
            stdout().print(table)
        for one in result["comparisons"]:
            print(one["sentence"])
        if self.json is not None:
            save_json(self.json, result)
