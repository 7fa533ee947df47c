"""Imitation: train bridge and head on demonstrations, with the backbone frozen. One loop, exactly resumable.

`OUT` is one checkpoint folder (`vla.checkpoint`: saved atomically, always whole) plus `metrics.jsonl`. Batches follow
from (seed, step) alone, so a run that was interrupted and resumed makes the same parameters, bit for bit, as one that
was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vla.cache import EncodedDemos, check_demos, encode_demos
from vla.checkpoint import CONFIG, load_checkpoint
from vla.config import encode, save_json, write_atomic
from vla.data import DemoSet
from vla.model import VLA, VLAConfig
from vla.types import ActionSpec

METRICS = "metrics.jsonl"
_MAY_CHANGE = ("log_every", "save_every", "num_threads", "encode_batch", "keep_features")
"""Fields of TrainConfig that a resumed run may set differently: they do not decide what is learnt."""


@dataclass(frozen=True)
class TrainConfig:
    """One imitation run."""

    model: VLAConfig = field(default_factory=VLAConfig)
    cameras: tuple[str, ...] | None = None
    """Which cameras the policy sees, in order; None: all of the dataset."""
    image_size: int = 84
    max_text_tokens: int = 24

    steps: int = 1500
    batch_size: int = 64
    lr: float = 7e-4
    warmup_steps: int = 100
    lr_floor: float = 0.05
    """The last step's learning rate, as a fraction of `lr`."""
    weight_decay: float = 0.01
    """On matrices only: biases, norms, gates and embeddings of positions stay free."""
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    """Average the weights over about 1 / (1 - decay) steps; the checkpoint then holds the average. 0: off."""
    seed: int = 0

    log_every: int = 20
    save_every: int = 250
    num_threads: int = 0
    """Torch threads. 0: one per idle core, at most 4, and the same again when resumed (bit-exactness needs that)."""
    encode_batch: int = 64
    keep_features: bool = False
    """Keep the backbone's features in OUT, so that a resumed run need not compute them again."""

    def problem(self) -> str | None:
        """What is wrong with this configuration, or None."""
        for name in ("steps", "batch_size", "log_every", "save_every", "encode_batch"):
            if getattr(self, name) < 1:
                return f"{name} must be at least 1, got {getattr(self, name)}"
        if not (self.lr > 0 and self.grad_clip > 0):
            return f"lr and grad_clip must be positive, got {self.lr} and {self.grad_clip}"
        if not 0 <= self.ema_decay < 1:
            return f"ema_decay must be in [0, 1), got {self.ema_decay}"
        if not self.model.freeze_backbone:
            return "training the backbone on actions is not supported yet: set freeze_backbone"
        return None


@dataclass(frozen=True)
class TrainProgress:
    """What `on_step` receives: after each batch encoded and after each step trained."""

    stage: Literal["encode", "train"]
    done: int
    """Frames encoded, or steps trained (since the very beginning, not since the resume)."""
    total: int
    loss: float | None = None
    lr: float | None = None


@dataclass(frozen=True)
class TrainReport:
    """How a call of `train` ended. The policy itself is in `vla` and in the checkpoint."""

    step: int
    interrupted: bool
    """Ctrl-C or SIGTERM came before the last step; the checkpoint is valid, resume continues."""
    loss: float | None
    """Mean over the last `log_every` steps; None when no step was trained."""
    encode_seconds: float
    train_seconds: float
    samples_per_second: float


class TrainingDiverged(FloatingPointError):
    """The loss or its gradient is no longer finite. The last checkpoint is from before."""


def build_vla(
    cfg: TrainConfig, demos: DemoSet, *, action_spec: ActionSpec | None = None, backbone: nn.Module | None = None
) -> VLA:
    """An untrained policy for these demonstrations. `action_spec`: the robot's true bounds, if known.

    `backbone` is used instead of loading `cfg.model.backbone`.
    """
    return VLA.build(
        cfg.model,
        stats=demos.stats(),
        action_spec=action_spec or demos.action_spec,
        cameras=cfg.cameras or tuple(demos.images),
        image_size=cfg.image_size,
        max_text_tokens=cfg.max_text_tokens,
        backbone=backbone,
        seed=cfg.seed,
    )


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Of step 0, 1, ..., steps - 1: linear warm-up, then half a cosine down to lr * lr_floor."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    along = (step - cfg.warmup_steps) / max(1, cfg.steps - 1 - cfg.warmup_steps)
    return cfg.lr * (cfg.lr_floor + (1 - cfg.lr_floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, along))))


def batch_frames(seed: int, step: int, batch_size: int, num_frames: int) -> Tensor:
    """(batch_size,) frames of a step. Epochs are permutations laid end to end: every frame once before any twice."""
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(first // num_frames, (last - 1) // num_frames + 1):
        order = torch.randperm(num_frames, generator=torch.Generator().manual_seed(_mix(seed, epoch)))
        begin = epoch * num_frames
        parts.append(order[max(first - begin, 0) : last - begin])
    return torch.cat(parts)


def train(
    cfg: TrainConfig,
    vla: VLA,
    demos: DemoSet,
    out: str | os.PathLike[str],
    *,
    on_step: Callable[[TrainProgress], None] | None = None,
    resume: bool = False,
) -> TrainReport:
    """Train `vla` in place and leave its checkpoint in `out`.

    `resume`: continue from the checkpoint in `out` if there is one. Ctrl-C and SIGTERM finish the step, save, return.
    ValueError: the demonstrations do not fit the policy, `out` is taken, or what is resumed was another run.
    TrainingDiverged: loss or gradient not finite.
    """
    out = Path(out)
    if problem := cfg.problem():
        raise ValueError(problem)
    check_demos(vla, demos)
    if vla.config.chunk_size != cfg.model.chunk_size:
        raise ValueError(f"the policy has chunk_size {vla.config.chunk_size}, the recipe {cfg.model.chunk_size}")
    taken = (out / CONFIG).exists()
    if taken and not resume:
        raise ValueError(f"{out} already holds a checkpoint: resume it, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with _restored_threads(), _stop_signals() as stop, torch.random.fork_rng(devices=[]):
        run = _Run(cfg, vla, demos)
        if taken:
            run.restore(out)
        torch.set_num_threads(run.threads)
        if run.step >= cfg.steps:
            return TrainReport(run.step, False, None, 0.0, 0.0, 0.0)
        save_json(out / "train.json", encode(cfg))
        begin = time.monotonic()
        encoded = _encoded(cfg, vla, demos, out, on_step, stop)
        return _loop(run, encoded, out, on_step, stop, time.monotonic() - begin)


class _Run:
    """What a checkpoint must bring back: model, optimiser, average, step."""

    def __init__(self, cfg: TrainConfig, vla: VLA, demos: DemoSet) -> None:
        self.cfg, self.vla, self.step = cfg, vla, 0
        self.data = _data_fingerprint(demos)
        self.threads = cfg.num_threads or min(4, max(1, round(_idle_cores())))
        self.parameters = vla.trainable()
        matrices = [p for p in self.parameters if p.ndim >= 2 and p is not vla.bridge.position]
        others = [p for p in self.parameters if not any(p is matrix for matrix in matrices)]
        groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas)
        self.average = [p.detach().clone() for p in self.parameters] if cfg.ema_decay else None

    def update(self, encoded: EncodedDemos) -> tuple[float, float, float]:
        """One optimiser step: (loss, gradient norm, learning rate used)."""
        cfg = self.cfg
        frames = batch_frames(cfg.seed, self.step, cfg.batch_size, encoded.num_frames)
        torch.manual_seed(_mix(cfg.seed, -1 - self.step))  # dropout too must follow from (seed, step) alone
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(cfg, self.step)
        device = self.vla.device
        features, *tensors = encoded.batch(frames)
        loss, _ = self.vla.loss(features.to(device=device), *(tensor.to(device) for tensor in tensors))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, cfg.grad_clip))
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingDiverged(
                f"loss {value} with gradient norm {norm} at step {self.step} (learning rate "
                f"{self.optimiser.param_groups[0]['lr']:.2g}): lower lr, or look for extreme values in the data"
            )
        self.optimiser.step()
        if self.average is not None:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - cfg.ema_decay)
        self.step += 1
        return value, norm, self.optimiser.param_groups[0]["lr"]

    def save(self, out: Path) -> None:
        state: dict[str, Any] = {
            "step": self.step,
            "config": encode(self.cfg),
            "data": self.data,
            "threads": self.threads,
            "optimiser": self.optimiser.state_dict(),
        }
        if self.average is None:
            self.vla.save(out, trainer_state=state)
            return
        state["raw"] = [p.detach().clone() for p in self.parameters]
        self._copy(self.average)
        try:
            self.vla.save(out, trainer_state=state)
        finally:
            self._copy(state["raw"])

    def restore(self, out: Path) -> None:
        checkpoint = load_checkpoint(out)
        state = checkpoint.trainer_state
        if state is None:
            raise ValueError(f"{out} holds a finished policy without its training state: it cannot be resumed")
        before, now = state["config"], encode(self.cfg)
        for name in now:
            if name not in _MAY_CHANGE and before.get(name) != now[name]:
                raise ValueError(
                    f"{out} was trained with {name}={before.get(name)!r}, not {now[name]!r}: it cannot be resumed so"
                )
        if state["data"] != self.data:
            raise ValueError(f"{out} was trained on other demonstrations: it cannot be resumed on these")
        self.vla.load_state_dict(checkpoint.tensors)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        self.threads = self.cfg.num_threads or state["threads"]
        if self.average is not None:
            self.average = [p.detach().clone() for p in self.parameters]
            self._copy(state["raw"])

    def finish(self) -> None:
        """Leave in `vla` what the checkpoint holds."""
        if self.average is not None:
            self._copy(self.average)

    def _copy(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


class _Stop:
    """Set by the first Ctrl-C or SIGTERM."""

    requested = False


def _encoded(
    cfg: TrainConfig,
    vla: VLA,
    demos: DemoSet,
    out: Path,
    on_step: Callable[[TrainProgress], None] | None,
    stop: _Stop,
) -> EncodedDemos:
    def progress(done: int, total: int) -> None:
        if stop.requested:
            raise KeyboardInterrupt  # nothing has been learnt yet, and a checkpoint that was here still is
        if on_step is not None:
            on_step(TrainProgress("encode", done, total))

    folder = out if cfg.keep_features else None
    return encode_demos(vla, demos, batch_size=cfg.encode_batch, folder=folder, on_progress=progress)


def _loop(
    run: _Run,
    encoded: EncodedDemos,
    out: Path,
    on_step: Callable[[TrainProgress], None] | None,
    stop: _Stop,
    encode_seconds: float,
) -> TrainReport:
    cfg, vla, first = run.cfg, run.vla, run.step
    _keep_metrics(out / METRICS, first)
    vla.train()
    recent: list[tuple[float, float, float]] = []
    logged, begin = first, time.monotonic()
    mark = begin
    with (out / METRICS).open("a", encoding="utf-8") as metrics:
        while run.step < cfg.steps and not stop.requested:
            recent = [*recent, run.update(encoded)][-cfg.log_every :]
            loss, _, lr = recent[-1]
            if run.step % cfg.log_every == 0 or run.step == cfg.steps:
                now, count = time.monotonic(), run.step - logged
                _log(metrics, run.step, recent[-count:], now - begin, cfg.batch_size * count / max(now - mark, 1e-9))
                mark, logged = now, run.step
            if run.step % cfg.save_every == 0 and run.step < cfg.steps:
                run.save(out)
            if on_step is not None:
                on_step(TrainProgress("train", run.step, cfg.steps, loss, lr))
    run.save(out)
    run.finish()
    vla.eval()
    seconds = time.monotonic() - begin
    mean = sum(loss for loss, _, _ in recent) / len(recent) if recent else None
    rate = cfg.batch_size * (run.step - first) / max(seconds, 1e-9)
    return TrainReport(run.step, run.step < cfg.steps, mean, encode_seconds, seconds, rate)


def _log(file: Any, step: int, recent: list[tuple[float, float, float]], seconds: float, rate: float) -> None:
    loss, norm = (sum(entry[i] for entry in recent) / len(recent) for i in (0, 1))
    entry = {"step": step, "loss": loss, "grad_norm": norm, "lr": recent[-1][2], "seconds": seconds}
    file.write(json.dumps(entry | {"samples_per_second": rate}) + "\n")
    file.flush()


def _keep_metrics(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that is being resumed: it will be logged again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A killed run may have left half a line.
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        write_atomic(path, "".join(kept).encode())


def _mix(seed: int, number: int) -> int:
    """A generator seed from two integers; neighbours must not give related streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{number}".encode(), digest_size=7).digest())


def _data_fingerprint(demos: DemoSet) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((demos.num_frames, demos.fps, demos.action_names)).encode())
    for array in (demos.proprio, demos.action, demos.episode_index):
        digest.update(array.tobytes())
    digest.update("\n".join(demos.instruction).encode())
    return digest.hexdigest()


def _idle_cores(window_s: float = 0.3) -> float:
    """Cores' worth of idle time right now. A second thread that must share its core made training 10x slower: every
    operation waits for the thread that is not running."""
    cores = len(os.sched_getaffinity(0))

    def jiffies() -> tuple[int, int]:
        counts = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return counts[3] + counts[4], sum(counts)  # idle and waiting for disks; all

    try:
        idle, total = jiffies()
        time.sleep(window_s)
        idle_after, total_after = jiffies()
    except OSError:
        return cores
    return cores * (idle_after - idle) / max(1, total_after - total)


@contextmanager
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn Ctrl-C and SIGTERM into a request; a second Ctrl-C is the usual KeyboardInterrupt."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
