"""`vla train --head heatmap` and `vla pretrain heatmap`: policies that answer by heat-maps, and their head."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from bascule.commands.base import check_numbers, given
from vla.core.checkpoint import CONFIG
from vla.model.config import DEFAULT_BACKBONE, check_backbone
from vla.runtime.devices import choose_device
from vla.runtime.locks import refuse_used

_TRAIN = ("dataset", "out", "head", "steps", "batch_size", "lr", "seed", "backbone", "cameras", "num_threads", "device")
_PRETRAIN = ("kind", "data", "out", "steps", "lr", "seed", "initial")


def train_heatmap(command: Any) -> None:
    """Train as `vla train` was asked to, its `Train`, on a few demonstrations with depth. ValueError for flags of other
    policies, and as `build` says."""
    _refuse_others(command, _TRAIN, "vla train --head heatmap")
    check_numbers(command, seed=(0, 2**31), steps=(1, 10**9), batch_size=(1, 10**6), lr=(1e-9, 10))
    check_numbers(command, num_threads=(0, 4096))
    if len(command.dataset) > 1:
        raise ValueError("--head heatmap learns from one dataset: give one --dataset")
    if command.backbone is not None:
        check_backbone(command.backbone)
    refuse_used(command.out / CONFIG, command.out, "a checkpoint", resume=False)
    from vla.checking.check import training_warnings
    from vla.data.lerobot_dataset import load_dataset
    from vla.runtime.console import progress, say
    from vla.training.advantage.labels import imitated_failures
    from vla.training.heatmap.train import HeatmapTrainConfig, build, train
    from vla.training.interventions import corrected_lines

    config = HeatmapTrainConfig()
    backbone = command.backbone or config.model.backbone
    # The shipped head is of the default backbone.
    pretrained = config.pretrained if backbone == DEFAULT_BACKBONE else None
    changes = given(
        steps=command.steps, batch_size=command.batch_size, lr=command.lr, seed=command.seed,
        num_threads=command.num_threads,
    )  # fmt: skip
    config = replace(config, model=replace(config.model, backbone=backbone), pretrained=pretrained, **changes)
    demos = load_dataset(command.dataset[0], command.cameras, depth=True)
    policy = build(config, demos)
    policy.model.to(choose_device(command.device))
    for line in demos.summary(command.dataset[0].name):
        say(line)
    name = command.dataset[0].name
    for line in corrected_lines(None, {name: demos}):
        say(line.removesuffix("; --intervention-weight half learns the person's"))
    for warning in (*imitated_failures(name, demos), *training_warnings(command.dataset[0], demos)):
        say(f"warning: {warning}")
    motion = policy.model.config.motion
    say(f"an action of 1 moves the hand by {1000 * motion.metres_per_action:.1f} mm, as the demonstrations show")
    with progress("heat-maps", config.steps, unit="steps") as update:

        def show(stage: str, done: int, total: int, loss: float | None) -> None:
            update(done, stage if loss is None else f"loss {loss:.3f}", total=total)

        figures = train(config, policy, demos, command.out, on_step=show)
    say(f"policy after {config.steps} steps on {figures['looks']:.0f} looks in {command.out}")


def pretrain_heatmap(command: Any) -> None:
    """Teach a head where named things are, as `vla pretrain` was asked to, its `Pretrain`. ValueError for flags of
    backbones, or without a set with depth."""
    _refuse_others(command, _PRETRAIN, "vla pretrain heatmap")
    check_numbers(command, seed=(0, 2**31), steps=(1, 10**9), lr=(1e-9, 10))
    if len(command.data) != 1:
        raise ValueError("vla pretrain heatmap learns from one set: --data FOLDER, of `vla ground-data --depth`")
    if command.out.suffix != ".safetensors":
        raise ValueError(f"--out {command.out} must be a file that ends in .safetensors: only the head is written")
    if command.out.exists():
        raise ValueError(f"--out {command.out} is already there: name a new file, or remove it")
    from vla.data.dataset_meta import require_grounding_set
    from vla.runtime.console import progress, table
    from vla.runtime.console import stdout as results
    from vla.training.heatmap.pretrain import HeatmapPretrainConfig, pretrain

    require_grounding_set(command.data[0])
    config = replace(HeatmapPretrainConfig(), **given(steps=command.steps, lr=command.lr, seed=command.seed))
    with progress("heat-maps", config.steps, unit="steps") as update:
        figures = pretrain(
            config, command.data[0], command.out, backbone=command.initial or DEFAULT_BACKBONE,
            on_step=lambda stage, done, total, loss: update(
                done, stage if loss is None else f"loss {loss:.3f}", total=total
            ),
        )  # fmt: skip
    results().print(table("held-out scenes", ("figure", "value"), list(figures.items())))


def _refuse_others(command: Any, taken: tuple[str, ...], name: str) -> None:
    """ValueError naming a flag that was given and is not one of `taken`."""
    plain: dict[str, Any] = {field.name: field.default for field in fields(command)}  # type: ignore[arg-type]
    for flag, default in plain.items():
        if flag not in taken and getattr(command, flag) != default:
            raise ValueError(f"{name} takes no --{flag.replace('_', '-')}: leave it out")
