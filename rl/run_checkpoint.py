"""Checkpoints of a run: tensors in named groups, the state of everything else, and what may differ on resuming.

`last/` holds the tensors and rank 0's state; every other rank keeps its own state in `last-RANK/`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl.configs.run import BUDGET_FIELDS, RunnerConfig
from vla.core.checkpoint import load_checkpoint, save_checkpoint
from vla.core.config import difference, encode, fill_defaults
from vla.runtime.distributed import Team
from vla.training.run_identity import same_data

LEARNER, BEST, REWARD, TEACHER = "", "best.", "progress.", "teacher."
"""Groups of tensors, by the prefix of their names in the file. The learner's are those with no other prefix."""
Groups = dict[str, dict[str, Tensor]]

REMOVED: dict[str, Any] = {
    "bc_coef": 0.0, "demo_coef": 0.0, "entropy_coef": 0.0, "kl_target": None, "lr_final": 0.1,
    "std_final": 0.5, "discount_per": "chunk", "reward_scale": 1.0, "scale_returns": False, "state_std": False,
}  # fmt: skip
"""Options that earlier versions had, with the values that mean what this version does."""
_FIRST_VALUES = 65_536
_DIGEST = re.compile(r"[0-9a-f]{16,}(-[0-9a-f]+)*")
"""A condition that is no words: of a policy, or of demonstrations (`vla.training.run_identity.fingerprint`)."""
UNREAD = ("lora", "backbone_lr")
"""Options of earlier versions that nothing reads unless another option says so."""


def save_run(out: Path, config: RunnerConfig, groups: Groups, state: Mapping[str, Any], team: Team) -> None:
    """Write the checkpoint `last` of a run, each rank its own part."""
    state = {**state, "threads": torch.get_num_threads()}
    if team.rank:
        save_checkpoint(out / f"last-{team.rank}", config={}, tensors={}, stats={}, trainer_state=dict(state))
    else:
        tensors = {prefix + name: tensor for prefix, group in groups.items() for name, tensor in group.items()}
        save_checkpoint(out / "last", config=encode(config), tensors=tensors, stats={}, trainer_state=dict(state))
    team.wait()


def load_run(out: Path, config: RunnerConfig, team: Team) -> tuple[Groups, dict[str, Any]]:
    """Read the checkpoint `last` of a run: (groups of tensors, this rank's state).

    Torch gets as many threads as the run had, because their number changes the last bits of what is learnt. ValueError
    when another configuration or another number of processes made it.
    """
    saved = load_checkpoint(out / "last")
    require_same_run(out, config, saved.config)
    processes = saved.trainer_state.get("processes", 1)
    if processes != team.size:
        raise ValueError(f"{out} was made by {processes} processes: resume it with as many")
    groups: Groups = {prefix: {} for prefix in (LEARNER, BEST, REWARD, TEACHER)}
    for name, tensor in saved.tensors.items():
        prefix = next((prefix for prefix in (BEST, REWARD, TEACHER) if name.startswith(prefix)), LEARNER)
        groups[prefix][name.removeprefix(prefix)] = tensor
    torch.set_num_threads(saved.trainer_state.get("threads", torch.get_num_threads()))
    if team.rank:
        return groups, load_checkpoint(out / f"last-{team.rank}").trainer_state
    return groups, saved.trainer_state


def frozen_digest(model: nn.Module) -> str:
    """Tells the policy that a run was begun from by what it does not train: `last` does not hold that. Of every tensor
    the first values are enough."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.named_parameters()):
        if not tensor.requires_grad:
            first = tensor.detach().flatten()[:_FIRST_VALUES].contiguous().cpu()
            digest.update(name.encode() + first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_same_base(out: Path, state: Mapping[str, Any], digest: str) -> None:
    """ValueError where the run in `out` was begun from another policy than the one with this `frozen_digest`. Runs of
    earlier versions do not say from which."""
    if state.get("base", digest) != digest:
        raise ValueError(
            f"{out} was begun from another policy: resume it with the one it was begun from (--init), or start a new "
            "run in another folder"
        )


def require_same_scenes(out: Path, state: Mapping[str, Any], digest: str | None) -> None:
    """ValueError where the suite file of the run in `out` has been edited since. None: a suite without a file; runs of
    earlier versions do not say."""
    if digest != (began := state.get("scenes")) and None not in (digest, began):
        raise ValueError(
            f"{out} was begun in other scenes than its suite file describes now: put the file back as it was, or start "
            "a new run in another folder"
        )


def require_same_conditions(out: Path, state: Mapping[str, Any], conditions: Mapping[str, str]) -> None:
    """ValueError naming the condition (see `Runner`) in which the run in `out` differs from the one now. Runs of
    earlier versions do not say theirs."""
    began = state.get("conditions", {})
    for name, now in conditions.items():
        if not same_data(was := began.get(name, now), now):
            changed = f"a different {name}" if _DIGEST.fullmatch(now) else f"{name} {was}, now it is {now}"
            raise ValueError(
                f"{out} was begun with {changed}: resume it as it was begun, or start a new run in another folder"
            )


def require_same_run(out: Path, config: RunnerConfig, saved: Mapping[str, Any]) -> None:
    """ValueError naming a field (budgets aside) in which the run saved in `out` differs from `config`."""
    ours = encode(config)
    theirs = fill_defaults(encode(RunnerConfig()), without_removed(out, ours, dict(saved)))
    for name in sorted(ours):
        if name not in BUDGET_FIELDS and theirs.get(name) != ours[name]:
            field, was, wanted = difference(name, theirs.get(name), ours[name])
            raise ValueError(
                f"{out} was made with {field}={was!r}, now it is {wanted!r}: resume with the same configuration "
                "(budgets may change) or start a new run in another folder"
            )


def without_removed(out: Path, known: Any, saved: Any) -> Any:
    """Return the encoded configuration `saved` without options that `known` lacks. ValueError if such an option has a
    value that this version cannot honour."""
    if not (isinstance(known, dict) and isinstance(saved, dict)):
        return saved
    kept = {}
    for name, value in saved.items():
        if name in known:
            kept[name] = without_removed(out, known[name], value)
        elif name not in UNREAD and (name not in REMOVED or value != REMOVED[name]):
            raise ValueError(
                f"{out} was made with {name}={value!r}, an option that this version does not have: start a new run in "
                "another folder, or continue it with the version that made it"
            )
    return kept
