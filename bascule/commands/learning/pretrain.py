"""`vla pretrain`: an embedded backbone learns to see and to hear."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from bascule.commands.base import Command, check_numbers, given, refuse_idle, stays
from vla.core.config import load_json, save_json, unknown
from vla.model.config import retirement
from vla.runtime.locks import refuse_used

if TYPE_CHECKING:
    from envs.grounding.mixture import Plan

_PIXELS = 96
_NEW = "new-backbone.json"
"""The file of a run that holds what its new backbone was made of."""


@dataclass(frozen=True)
class Pretrain(Command):
    """Pre-train an embedded vision-language backbone on rendered scenes, with questions and answers about them."""

    kind: Positional[str] = "small"
    """small: convolutions at several scales, and the words of SmolLM2 (needs the extra smollm). heatmap: no backbone,
    but the head of a policy that answers by heat-maps, on sets of `vla ground-data --depth` (docs/beyond.md)."""
    data: tuple[Path, ...] = ()
    """Folders of `vla ground-data`; the last 256 scenes of each are for evaluation only. Default: it first makes its
    own in OUT/data, 72,000 scenes of the tabletop, robosuite and Meta-World, most of them randomised (4 GB, about an
    hour on two cores), each with a share of its own."""
    weights: tuple[float, ...] = ()
    """How often each of several folders of --data is drawn. Default: by their sizes."""
    scenes: int | None = None
    """Number of scenes to make in all, without --data. Default: 72,000. Every set keeps its share and has at least 288,
    of which 256 are for evaluation only."""
    without: tuple[Literal["robosuite", "metaworld"], ...] = ()
    """Simulators whose scenes are not made, so that they need not be installed."""
    workers: int = 2
    """Processes that render these scenes."""
    out: Path = Path("runs/backbone")
    """The folder for the backbone."""
    minutes: float | None = None
    """Wall-clock budget of the training, without the rendering; the learning rate decays to its end. Default: 110,
    three hours with its scenes."""
    steps: int | None = None
    """Stop after this number of steps, if that is sooner."""
    initial: str | None = None
    """Start from this backbone (a name or a folder) instead of an untrained one."""
    only_pointer: bool = False
    """Train only the part of `initial` that looks at the picture again to refine a pixel; the rest stays."""
    only_sight: bool = False
    """Train only the part of `initial` that tells whether what is named is in sight, and set its threshold; the rest
    stays."""
    lr: float | None = None
    """Largest learning rate. Default: 1.2e-3 from an untrained backbone, 7e-4 from `initial`."""
    questions: int | None = None
    """Number of a scene's five questions that name something to use at each step. Default: all."""
    stem: Literal["imagenet", "random"] = "imagenet"
    """The convolutions' first weights. imagenet: those of MobileNetV2 (needs the extra stem)."""
    dictionaries: Path | None = None
    """A folder with WordNet's folder dict and Moby's words.txt, to score anew what every word means
    (docs/train.md). Default: the scores that the shipped backbone has."""
    image_size: int | None = None
    """Height and width of the pictures that a new backbone reads, and makes, pixels; a multiple of 16. Default: 96; one
    of --initial keeps its own."""
    seed: int = 0
    """Seed of the initial weights and of the order of the scenes; the scenes that are made are always the same."""
    resume: bool = False
    """Continue the run in OUT with its first set of scenes that is missing, and from its last saved step; begin it if
    there is none yet."""

    def run(self) -> None:
        if self.kind == "heatmap":
            from bascule.commands.learning.heatmap import pretrain_heatmap

            return pretrain_heatmap(self)
        data = self._checked_data()
        import torch

        from vla.backbones.hub import load
        from vla.runtime.console import progress, say, table
        from vla.runtime.console import stdout as results
        from vla.runtime.devices import bfloat16_is_fast
        from vla.training.grounding.pretrain import PretrainConfig, pretrain, refuse_finished
        from vla.training.grounding.questions import POINT_QUESTIONS

        check_numbers(self, questions=(1, POINT_QUESTIONS))
        refuse_finished(self.out, resume=self.resume)
        config = PretrainConfig(only_pointer=self.only_pointer, only_sight=self.only_sight)
        if self.initial is not None and not self.only_pointer:  # the reader starts anew, the backbone does not
            config = replace(config, lr=7e-4, reader_weight=0.3)
        initial = self._initial()
        if initial is None or load(initial).family_name != "embedded":  # which would not spell a paraphrase's words
            half = bfloat16_is_fast(torch.device("cpu"))
            config = replace(config, half=half, paraphrase=True, points_per_scene=POINT_QUESTIONS, minutes=110.0)
        if self.initial is not None:
            self._refuse_new(load(self.initial).image_size)
        if note := retirement(initial or ""):
            say(f"note: {note}")
        changes = given(
            minutes=self.minutes, max_steps=self.steps, seed=self.seed, weights=self.weights, lr=self.lr,
            points_per_scene=self.questions,
        )  # fmt: skip
        config = replace(config, **changes)
        plan = None
        if not data:
            from envs.grounding.mixture import planned

            each = config.holdout + config.batch_scenes
            pixels = (self.image_size or _PIXELS) if initial is None else load(initial).image_size
            plan = planned(self.out / "data", pixels, self.scenes, without=self.without, at_least=each)
        start = initial or self._new_small()
        if plan is not None:  # after all that can be refused, and after the words, which need another extra
            self._make_scenes(plan)
            data = plan.folders
            config = replace(config, weights=tuple(part.share for part in plan.parts))
        with progress("pre-training", self.steps, unit="steps") as update:
            figures = pretrain(
                config, data, self.out, initial=start, resume=self.resume,
                on_step=lambda row: update(row.get("step", 0), f"loss {row['loss']:.3f}"),
                on_sight=lambda done: update(self.steps or 0, f"in sight or not: {done:,} scenes"),
            )  # fmt: skip
        results().print(table("held-out scenes", ("figure", "value"), list(figures.items())))

    def _checked_data(self) -> tuple[Path, ...]:
        """The folders to learn from, none where they are to be made. ValueError for flags that cannot be."""
        from vla.data.dataset_meta import require_grounding_set

        if self.kind != "small":
            raise ValueError(retirement(self.kind) or unknown(self.kind, ("small", "heatmap"), "kind of backbone"))
        if self.only_pointer and self.initial is None:
            raise ValueError("--only-pointer needs a backbone to sharpen: --initial small, or a folder")
        if self.only_pointer and self.only_sight:
            raise ValueError("--only-pointer and --only-sight each train one part alone: give one of them")
        if self.only_sight and (self.initial is None or retirement(self.initial)):
            raise ValueError("--only-sight is for a finished backbone: vla pretrain small --initial small, or a folder")
        if self.only_sight:
            idle = "beside --only-sight, which draws its scenes once"
            refuse_idle(self, idle, "minutes", "steps", "lr", "questions")
        if self.data:
            refuse_idle(self, "beside --data, whose scenes are there", "workers")
        check_numbers(
            self, minutes=(0.01, 1e6), steps=(1, 10**9), image_size=(32, 1024), seed=(0, 2**31),
            scenes=(1, 100_000_000), workers=(1, 1024), lr=(1e-12, 100),
        )  # fmt: skip
        if self.dictionaries is not None:
            from vla.backbones.small.dictionaries import require_dictionaries

            require_dictionaries(self.dictionaries)
        if (self.image_size or 0) % 16:
            raise ValueError(f"--image-size must be a multiple of 16, got {self.image_size}")
        refuse_used(self.out / "bascule.json", self.out, "a backbone", resume=self.resume)
        if not self.data:
            if self.weights:
                raise ValueError("--weights are for the folders of --data: the scenes that are made have their own")
            refuse_used(self.out / "data", self.out, "the scenes of a run", resume=self.resume)
            return ()
        if self.scenes is not None or self.without:
            raise ValueError("--scenes and --without are for the scenes that are made, without --data")
        for folder in self.data:
            require_grounding_set(folder)
        return self.data

    def _initial(self) -> str | None:
        """The backbone to start from. None: an untrained one, which a run in OUT may have already."""
        if self.initial is None and (self.out / "bascule.json").exists() and not (self.out / "untrained").exists():
            return str(self.out)  # a run of a kind that is retired
        return self.initial

    def _refuse_new(self, pixels: int) -> None:
        """ValueError for flags of a new backbone beside --initial, which reads pictures of so many pixels and keeps its
        eyes and its words."""
        if self.image_size not in (None, pixels):
            raise ValueError(
                f"--initial {self.initial} reads pictures of {pixels} pixels, not of --image-size {self.image_size}: "
                "leave out --image-size, or start a new backbone without --initial"
            )
        refuse_idle(self, f"beside --initial {self.initial}, which has its own", "stem", "dictionaries")

    def _make_scenes(self, plan: Plan) -> None:
        """Render the sets that OUT/data lacks, one after the other."""
        from vla.core.disk import free_bytes, size_words
        from vla.runtime.console import progress, say

        if plan.missing:
            total, needed, free = sum(part.scenes for part in plan.missing), plan.nbytes(), free_bytes(plan.folder)
            say(
                f"{total:,} scenes of {plan.image_size} pixels are made in {plan.folder}; they need "
                f"{size_words(needed)} of {size_words(free)} free"
            )
        for number, part in enumerate(plan.missing, 1):
            with progress(f"{part.name} ({number} of {len(plan.missing)})", part.scenes, unit="scenes") as update:
                made = plan.make(part, self.workers, on_progress=lambda done, _, update=update: update(done))
            say(f"{part.scenes:,} scenes in {made}")

    def _new_small(self) -> Path:
        """The untrained backbone to start from, made unless the run has it."""
        from vla.backbones.small.create import imagenet_file, new_small
        from vla.runtime.console import progress

        folder, file = self.out / "untrained", self.out / _NEW
        asked = {
            "stem": self.stem, "image_size": self.image_size or _PIXELS,
            "dictionaries": None if self.dictionaries is None else self.dictionaries.resolve().name,
        }  # fmt: skip
        if (folder / "bascule.json").exists():
            made = load_json(file) if file.is_file() else asked  # runs of earlier versions do not say
            for name, now in asked.items():
                if made.get(name) != now:
                    raise ValueError(
                        f"{self.out} was begun with --{name.replace('_', '-')} {made.get(name)}, not {now}: resume it "
                        "as it was begun, or begin another run (--out)"
                    )
        else:
            save_json(file, asked)
            stem = imagenet_file() if self.stem == "imagenet" else None
            with progress("word vectors", None, unit="words") as update:
                new_small(
                    folder, stem=stem, image_size=self.image_size or _PIXELS, seed=self.seed,
                    dictionaries=self.dictionaries, on_word=lambda done, total: update(done, total=total),
                )  # fmt: skip
        return folder

    def kept(self) -> str:
        return stays(self.out, f"finished sets of scenes and the last checkpoint stay in {self.out}; add --resume")
