"""LeRobot's architectures as arms: each trained by LeRobot's own trainer, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bascule.experiments.peers.budget import Budget, Learnt, on_gpu, steps_within
from bascule.experiments.peers.smolvla import PICTURE, SIZES, write_random_vlm
from vla.core.config import load_json
from vla.core.paths import ROOT, quoted

CALIBRATION_STEPS = 8
"""Steps of the short run that tells how many fit into a time; the first, which is slower, does not count."""
_REPLANS = ("n_action_steps=4",)  # as our recipes look again
_IMAGENET = "resnet18-f37072fd.pth"


@dataclass(frozen=True)
class Peer:
    """A policy of LeRobot as it is trained here: its type, and the flags --policy.FLAG that differ from LeRobot's."""

    kind: str
    flags: tuple[str, ...]
    resnet: bool = False
    """It begins with LeRobot's ResNet-18, whose ImageNet weights are taken where torch has them on this machine."""
    vlm: str | None = None
    """Size of the vision-language model with random weights around which it is built (`smolvla.SIZES`)."""


# LeRobot's rates are for 100,000 steps, its chunks of 100 actions for long episodes: with those neither learns anything
# in minutes. Every frame is learnt from (episodes are short), and copies of the last action behind the end are not.
_ACT = ("chunk_size=16", *_REPLANS, "optimizer_lr=1e-4", "optimizer_lr_backbone=1e-4")
_DIFFUSION = ("horizon=16", *_REPLANS, "drop_n_last_frames=0", "do_mask_loss_for_padding=true")
# With random weights there is nothing to freeze.
_SMOLVLA = (
    "chunk_size=16", *_REPLANS, "load_vlm_weights=false", "train_expert_only=false", "freeze_vision_encoder=false",
    f"resize_imgs_with_padding=[{PICTURE},{PICTURE}]",
)  # fmt: skip
PEERS = {
    "act": Peer("act", _ACT, resnet=True),
    "act-small": Peer("act", (*_ACT, "dim_model=256", "dim_feedforward=1024"), resnet=True),
    "diffusion": Peer("diffusion", (*_DIFFUSION, "n_obs_steps=2"), resnet=True),
    "diffusion-small": Peer(
        "diffusion",
        (
            *_DIFFUSION, "n_obs_steps=1", "down_dims=[64,128,256]", "noise_scheduler_type=DDIM",
            "num_inference_steps=10",
        ),
        resnet=True,
    ),
    "smolvla-random": Peer("smolvla", _SMOLVLA, vlm="published"),
    "smolvla-small-random": Peer("smolvla", _SMOLVLA, vlm="small"),
}  # fmt: skip
"""By arm. The small ones are a third of the size and several times as fast, which suits minutes on a CPU core."""


def check_installed() -> None:
    """ValueError where LeRobot's trainer lacks packages."""
    if missing := [name for name in ("accelerate", "diffusers", "num2words") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"LeRobot's trainer needs {', '.join(missing)}: ./run setup peers")


def starting_weights(peer: Peer) -> str:
    """Where the peer's visual backbone begins, in words."""
    return "ImageNet" if peer.resnet and _imagenet() else "random"


def learn(peer: Peer, dataset: Path, folder: Path, budget: Budget, *, batch_size: int, seed: int) -> Learnt:
    """Train a peer within a budget; its run is left in `folder`. RuntimeError with the log where LeRobot fails."""
    from policies.load import load_policy

    train = _trainer(peer, dataset, batch_size=batch_size, seed=seed)
    steps = budget.amount
    if budget.kind == "seconds":
        trial = folder.with_name(f"{folder.name}-calibration")
        each = train(trial, CALIBRATION_STEPS, False)["per_step"]
        shutil.rmtree(trial, ignore_errors=True)  # LeRobot makes it when it saves something
        steps = steps_within(budget.amount, 0.0, each)
    took = train(folder, steps, True)
    last = folder / "checkpoints" / "last"
    shutil.rmtree(last / "training_state")  # twice the size of the policy, and nobody continues from it
    policy = load_policy(last / "pretrained_model")
    weights = list(policy.policy.parameters())
    return Learnt(
        policy=policy, steps=steps, seconds=took["learning_seconds"], wall_seconds=took["seconds"],
        parameters=sum(weight.numel() for weight in weights), batch_size=batch_size,
        trained_parameters=sum(weight.numel() for weight in weights if weight.requires_grad),
        chunk_size=getattr(policy.config, "chunk_size", None) or policy.config.horizon,
        n_action_steps=policy.n_action_steps, folder=last / "pretrained_model",
    )  # fmt: skip


def _trainer(peer: Peer, dataset: Path, *, batch_size: int, seed: int) -> Callable[[Path, int, bool], dict[str, float]]:
    def train(folder: Path, steps: int, save: bool) -> dict[str, float]:
        """Times of a run of so many steps: all of it in `seconds`, on the budget's clock `learning_seconds` in all and
        `per_step` after the first."""
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: its time would not be the run's
        times, log = folder.with_suffix(".times.json"), folder.with_suffix(".log")
        args = command(peer, dataset, folder, steps, batch_size=batch_size, seed=seed, save=save)
        _run([sys.executable, "-m", "policies.lerobot.train", f"--times={times}", *args], log, folder.parent)
        took = load_json(times)
        times.unlink()
        prefix = "" if on_gpu() else "cpu_"
        return {
            "seconds": took["seconds"],
            "learning_seconds": took[f"{prefix}seconds"],
            "per_step": took[f"{prefix}seconds_after_first"] / max(1, steps - 1),
        }

    return train


def command(
    peer: Peer, dataset: Path, folder: Path, steps: int, *, batch_size: int, seed: int, save: bool = True
) -> list[str]:
    """The arguments of `lerobot-train` that train a peer."""
    flags = [*peer.flags, "push_to_hub=false", f"device={'cuda' if on_gpu() else 'cpu'}"]
    if peer.resnet and not _imagenet():
        flags.append("pretrained_backbone_weights=null")
        if peer.kind == "diffusion":  # as its paper has it; LeRobot refuses it beside ImageNet's batch norms
            flags.append("use_group_norm=true")
    if peer.vlm is not None:
        vlm = write_random_vlm(folder.resolve().with_name(f"smolvlm-{peer.vlm}"), peer.vlm)
        flags += [f"vlm_model_name={vlm}", f"num_vlm_layers={SIZES[peer.vlm]['layers']}"]
    if peer.kind != "act":
        flags.append(f"scheduler_warmup_steps={min(500, steps // 10)}")
    loading = ["--num_workers=4", "--dataloader_multiprocessing_context=fork"] if on_gpu() else ["--num_workers=0"]
    return [
        f"--policy.type={peer.kind}", *(f"--policy.{flag}" for flag in flags), "--dataset.repo_id=local/demonstrations",
        f"--dataset.root={dataset.resolve()}", f"--output_dir={folder.resolve()}", f"--steps={steps}",
        f"--batch_size={batch_size}", f"--seed={seed}", *loading, f"--log_freq={max(1, steps // 20)}",
        "--save_freq=0", f"--save_checkpoint={str(save).lower()}", "--env_eval_freq=0",
    ]  # fmt: skip


def _run(args: list[str], log: Path, out: Path) -> None:
    """Run a command, its output in `log`. RuntimeError with the last line where it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str((out / "lerobot-cache").resolve())}
    settings |= {} if on_gpu() else {"OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            args,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | settings,
            check=False,
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"LeRobot's trainer failed, see {quoted(log)}: {lines[-1]}")


def _imagenet() -> bool:
    import torch

    return (Path(torch.hub.get_dir()) / "checkpoints" / _IMAGENET).is_file()
