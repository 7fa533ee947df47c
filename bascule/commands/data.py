"""Commands that make data and judge it: demonstrations, a verdict on a recording, questions about rendered scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from bascule.commands.base import Command, check_file, check_numbers, chosen_perturbation, refuse_idle, stays
from vla.core.checkpoint import weights_digest
from vla.core.config import lookup
from vla.core.paths import quoted
from vla.model.config import DEFAULT_BACKBONE, DEFAULT_PIXELS

_COMPARED = 10
"""Episodes that a policy is played beside."""
_MOST_SHOWN = 24
"""Episodes with findings that the page of a check shows."""


@dataclass(frozen=True)
class Demos(Command):
    """Record demonstrations of the scripted expert as a LeRobotDataset v3, or a policy's own episodes."""

    suite: Positional[str]
    """The suite to record in, see `vla list suites`; or a .toml file."""
    episodes: int = 200
    """Number of demonstrations; episodes in which the expert fails are replaced."""
    out: Path | None = None
    """The dataset's folder. Default: runs/demos/SUITE, or runs/logs/SUITE of a policy's episodes."""
    policy: Path | None = None
    """Record the episodes of this policy instead, those that fail too, with LeRobot's next.success, for `vla train
    --advantage`. The recorded actions are the ones executed."""
    corrections: bool = False
    """Beside --policy: a scripted corrector takes over where the policy goes wrong, as in `vla control --teleop
    corrector`, and the feature intervention says where, for `vla train --intervention-weight`. Episodes without a
    correction are left out. In suites of picking and placing."""
    seed: int = 0
    """Seed of the first episode's scene; the following episodes count up from it."""
    noise: float = 0.15
    """Noise added to the actions, in halves of their range: demonstrations then include recoveries, and a policy's
    episodes what it would not have done by itself. A corrector's recorded actions are without it."""
    workers: int = 2
    """Processes that simulate."""
    image_size: int | None = None
    """Height and width of the pictures in pixels. As the backbone reads them is best: 96 for small, the default; or
    those that the policy of --policy was taught with."""
    embodiment: str | None = None
    """--policy: which robot, of a policy for several."""
    depth: bool = False
    """Record the depth and the calibration of every camera, too, for `vla train --xyz`."""
    tasks: tuple[str, ...] = ()
    """Tasks to record, in turn; a name given twice has twice the share. Default: all, drawn by the seeds."""
    randomise: tuple[str, ...] = ()
    """Domain randomisation: light, medium, strong or robust, and AXIS=FROM:TO to change a mix; plain=SHARE leaves that
    share of the episodes as they are. Its patterns, colours, light directions, camera orbits and words are none of the
    tests' (--perturb)."""
    perturb: tuple[str, ...] = ()
    """Perturbations as in `vla eval`, AXIS=FROM:TO each: for tests rather than for training."""

    def _out(self) -> Path:
        return self.out or Path("runs/demos" if self.policy is None else "runs/logs") / Path(self.suite).stem

    def run(self) -> None:
        """Record the episodes. ValueError for an unknown suite, task or policy, or a number out of range."""
        from envs.registry import load_suite

        check_numbers(
            self, episodes=(1, 10_000_000), seed=(0, 2**53), noise=(0, 100), workers=(1, 1024), image_size=(16, 4096)
        )
        suite = load_suite(self.suite)
        for task in self.tasks:
            lookup(task, dict.fromkeys(suite.tasks), f"task of {suite.name}")
        from envs.demos.record import record
        from vla.runtime.console import progress, say

        if self.embodiment is not None and self.policy is None:
            raise ValueError(f"--embodiment {self.embodiment} says which robot of --policy: name that")
        if self.corrections and self.policy is None:
            raise ValueError("--corrections are of a policy: name the one that is to be corrected with --policy")
        perturb = chosen_perturbation(self.perturb, self.randomise)
        depth, played, pixels = self.depth, None, self.image_size or DEFAULT_PIXELS
        if self.policy is not None:
            from functools import partial

            from policies.load import checkpoint, chosen_embodiment, load_policy, picture_size, reads_depth

            folder = checkpoint(self.policy)
            depth = depth or reads_depth(folder)
            robot = chosen_embodiment(folder, self.embodiment)
            name = f"{self.policy} {weights_digest(folder)}" + (f" {robot}" if robot else "")
            played = name, partial(load_policy, folder, robot)
            pixels = self.image_size or picture_size(folder, robot) or DEFAULT_PIXELS
        what = "demonstrations" if self.policy is None else "episodes"
        with progress(what, self.episodes, unit="episodes") as update:
            out = record(
                self.suite,
                self.episodes,
                self._out(),
                seed0=self.seed,
                num_workers=self.workers,
                noise=self.noise,
                image_size=pixels,
                perturb=perturb,
                tasks=self.tasks,
                depth=depth,
                policy=played,
                corrected=self.corrections,
                on_progress=lambda state: update(state.kept, _note(state)),
            )
        say(f"{self.episodes} {what} in {out}")

    def writes(self) -> tuple[Path, ...]:
        """The dataset's folder."""
        return (self._out(),)

    def kept(self) -> str:
        """Finished episodes are kept after Ctrl-C."""
        return stays(self._out(), f"finished episodes stay in {self._out()}; the same command continues")


def _note(state: Any) -> str:
    replaced = f", {state.replaced} workers died and were replaced" if state.replaced else ""
    return f"{state.tried - state.kept} discarded{replaced}"


@dataclass(frozen=True)
class Check(Command):
    """Say whether a LeRobotDataset is fit to train on: findings, a verdict, and a page to look at."""

    dataset: Positional[Path]
    """The dataset's folder, a LeRobotDataset v3 with state, action and cameras."""
    json: Path | None = None
    """Write the verdict, the findings and each episode's figures to this file."""
    page: Path | None = None
    """Write a page to this file: findings, pictures, and state and actions over time."""
    backbone: str = DEFAULT_BACKBONE
    """The backbone, or the folder of a policy, whose words the task strings are compared with."""
    pictures: int = 12
    """Pictures of each camera that are looked at in every episode; 0 for none."""
    shown: int = 6
    """How many of the first episodes the page shows, beside those with findings."""
    policy: str | None = None
    """A checkpoint folder: also tell how far its actions are from the recorded ones, for each component and phase."""
    server: str | None = None
    """The same for the policy of `vla serve` at ws://HOST:PORT."""
    compared: int | None = None
    """--policy, --server: episodes to compare with, spread over the recording; 10 unless given. Ones it was not
    trained on say most."""
    embodiment: str | None = None
    """--policy: which robot, of a policy for several."""
    cameras: tuple[str, ...] = ()
    """--policy, --server: cameras that the recording calls otherwise, POLICY=RECORDING each, e.g. front=cam_high; or
    wrist=none, which the policy then sees black."""
    fix: Path | None = None
    """Write a copy to this new folder, without the idle time at the start and end of episodes. LeRobot's writer makes
    it; videos are encoded anew."""
    drop: tuple[int, ...] = ()
    """--fix: the numbers of episodes to leave out."""
    rename: tuple[str, ...] = ()
    """--fix: cameras to rename, OLD=NEW each."""
    image_size: int | None = None
    """--fix: height and width of the copy's pictures in pixels. Default: as they are."""

    def run(self) -> int:
        """Check and print. Exit code 1 if there are errors or warnings, 0 if there are none. ValueError for a folder
        that is no dataset."""
        check_numbers(self, pictures=(0, 10_000), shown=(0, 1000), compared=(1, 100_000), image_size=(8, 4096))
        if self.page is None:
            refuse_idle(self, "without --page, which shows them", "shown")
        rename = self._new_names()
        for flag, path in (("--json", self.json), ("--page", self.page)):
            check_file(flag, path)
        if self.page is not None and self.page.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--page {self.page} must end in .html: a page for a browser is what it becomes")
        if self.policy is not None and self.server is not None:
            raise ValueError("--policy and --server both name the policy: give one of them")
        if self.embodiment is not None and self.policy is None:
            where = (
                "goes to `vla serve`, which loads the policy"
                if self.server
                else "says which robot of --policy: name that"
            )
            raise ValueError(f"--embodiment {self.embodiment} {where}")
        if self.compared is not None and self.policy is None and self.server is None:
            raise ValueError(
                f"--compared {self.compared} counts episodes to play a policy beside: name --policy or --server"
            )
        if self.cameras and self.policy is None and self.server is None:
            raise ValueError(
                "--cameras says what a policy looks through: name --policy or --server (--rename is --fix's)"
            )
        from vla.model.config import check_backbone

        check_backbone(self.backbone)
        policy = self._load_policy()
        from dataclasses import replace

        from rich.text import Text

        from vla.checking.check import check_dataset
        from vla.core.config import save_json
        from vla.runtime.console import progress, say, stdout

        with progress("checking", 1, unit="episodes") as update:

            def show(done: int, total: int) -> None:
                update(done, total=total)

            report = check_dataset(self.dataset, backbone=self.backbone, pictures=self.pictures, on_progress=show)
        beside = None if policy is None else self._compare(report, policy)
        if beside is not None:
            report = replace(report, findings=(*report.findings, beside.finding()))
        out = stdout()
        styles = {"error": "bold red", "warning": "yellow", "note": "dim"}
        for finding in report.findings:
            line = Text(f"{finding.severity:<8} {finding.code}: ", style=styles[finding.severity])
            out.print(line.append(" ".join(finding.text.split()), style="default"), soft_wrap=True)
        out.print(Text(f"{self.dataset}: {report.size()}"), soft_wrap=True)
        out.print(Text(f"{self.dataset}: {report.verdict}", style="bold"), soft_wrap=True)
        if self.json is not None:
            save_json(self.json, report.data() | ({} if beside is None else {"open_loop": beside.data()}))
        if self.page is not None:
            self._write_page(report, beside)
            say(f"page in {self.page}")
        if self.fix is not None:
            self._write_copy(report, self.fix, rename)
        return int(not report.clean)

    def _load_policy(self) -> Any:
        from vla.processing.cameras.camera_map import CameraMap

        cameras = CameraMap.parse(self.cameras)
        if self.server is not None:
            from policies.serving.client import PolicyClient

            return PolicyClient(self.server, cameras=cameras)
        if self.policy is None:
            return None
        from policies.load import checkpoint, load_policy, of_single_observations

        return of_single_observations(
            load_policy(checkpoint(self.policy), self.embodiment, cameras), "a recording's frames"
        )

    def _compare(self, report: Any, policy: Any) -> Any:
        """Play the policy beside some of the episodes."""
        from policies.open_loop import open_loop, spread
        from vla.runtime.console import progress, say

        episodes = spread(report, _COMPARED if self.compared is None else self.compared)
        with progress("policy", len(episodes), unit="episodes") as update:
            return open_loop(policy, self.policy or self.server, report, episodes, say=say, on_episode=update)

    def _new_names(self) -> dict[str, str]:
        """--rename as a map. ValueError for what is no OLD=NEW, or has no --fix beside it."""
        if self.fix is None and (self.drop or self.rename or self.image_size):
            raise ValueError(
                "--drop, --rename and --image-size say how a copy differs: give --fix, the copy's new folder, too"
            )
        if self.fix is not None and self.fix.exists():
            raise ValueError(f"--fix {self.fix} is already there: choose another folder")
        pairs = dict(part.partition("=")[::2] for part in self.rename)
        if odd := [part for part in self.rename if not all(side.strip() for side in part.partition("="))]:
            raise ValueError(f"--rename {odd[0]} must be OLD=NEW, two names of cameras")
        return pairs

    def _write_copy(self, report: Any, out: Path, rename: dict[str, str]) -> None:
        from vla.checking.fix import plan, write_copy
        from vla.data.findings import numbered
        from vla.runtime.console import progress, say

        wanted = plan(report, self.drop, rename, self.image_size)
        with progress("copy", wanted.frames, unit="frames") as update:
            write_copy(report, wanted, out, update)
        kept, left_out = numbered(len(wanted.kept), "episode"), numbered(wanted.dropped, "episode")
        cut, renamed = numbered(wanted.cut, "idle frame"), numbered(len(rename), "camera")
        say(f"{kept}, {wanted.frames} frames in {out}: {left_out} left out, {cut} cut off, {renamed} renamed")

    def _write_page(self, report: Any, beside: Any) -> None:
        from bascule.report.recording_page import write_recording_page
        from vla.checking.samples import chosen, shown
        from vla.runtime.console import progress
        from vla.runtime.provenance import provenance

        numbers = chosen(report, self.shown, _MOST_SHOWN + self.shown)
        if beside is not None:
            numbers = sorted({*numbers, *list(beside.predicted)[: self.shown]})
        with progress("page", len(numbers), unit="episodes") as update:
            episodes = shown(report, numbers, update)
        about = {"command": f"vla check {quoted(self.dataset)}", **provenance()}
        write_recording_page(report, episodes, self.page, about, beside)

    def writes(self) -> tuple[Path, ...]:
        """--json, --page and --fix."""
        return tuple(path for path in (self.json, self.page, self.fix) if path is not None)


@dataclass(frozen=True)
class GroundData(Command):
    """Render scenes with question-answer pairs about them, to pre-train the backbone."""

    out: Path = Path("runs/ground-data")
    """The dataset's folder."""
    scenes: int = 20_000
    """Number of scenes."""
    suites: tuple[str, ...] = ()
    """Suites to render, in turn: suites with goals, robosuite's or Meta-World's; or LIBERO's, in a set of their own. A
    name given twice has twice the share. Default: shapes and plates."""
    seed: int = 0
    """Seed of the scenes and of the questions."""
    workers: int = 2
    """Processes that render."""
    image_size: int = DEFAULT_PIXELS
    """Height and width of the pictures, pixels: best what the backbone to be trained reads."""
    depth: bool = False
    """With the depth and the calibration of the cameras, for `vla pretrain heatmap`; best of 128 pixels."""
    randomise: tuple[str, ...] = ()
    """Domain randomisation: light, medium or strong, and AXIS=FROM:TO to change a mix. Its patterns, colours, light
    directions and camera orbits are none of the tests'. Cameras do not shake: labels are where the picture was.
    robosuite's and Meta-World's scenes know camera, light, texture, noise and compression; the other axes of a mix
    leave them alone."""

    def run(self) -> None:
        """Render the scenes and write the dataset to `out`."""
        check_numbers(self, scenes=(1, 100_000_000), seed=(0, 2**53), workers=(1, 1024), image_size=(16, 4096))
        from envs.grounding.generate import generate, labelled_randomisation
        from envs.registry import load_suite
        from vla.runtime.console import progress

        perturb = labelled_randomisation(self.randomise)
        for suite in self.suites:
            load_suite(suite)
        with progress("scenes", self.scenes) as update:
            generate(
                self.scenes,
                self.out,
                suites=self.suites,
                seed=self.seed,
                num_workers=self.workers,
                image_size=self.image_size,
                perturb=perturb,
                depth=self.depth,
                on_progress=lambda done, total: update(done),
            )

    def kept(self) -> str:
        """Nothing is kept after Ctrl-C."""
        return "nothing: the folder appears when it is complete"
