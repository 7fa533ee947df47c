"""The privileged teacher: a network that reads the simulator's state and imitates the demonstrations.

Where things are is most of what a policy has to learn from images; given the simulator's state, a small network gets
far more out of the same demonstrations. Its actions then supervise the policy in the states that the policy visits
(Chen et al. 2019, "Learning by cheating", arXiv 1912.12294; Ross et al. 2011, DAgger).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rl.configs.teacher import TeacherConfig
from rl.models.actor import ChunkActor
from rl.models.critic import privileged_state
from rl.teacher.symmetry import from_hand, turned
from vla.core.types import ActionChunk, ActionSpec, Observation, Pair, PlanarSymmetry, PolicySpec, Prefix
from vla.data.lerobot_dataset import DemoSet
from vla.model.heads.registry import masked_l1
from vla.processing.processor import Processor

SHARP = 4.0
"""Every standardised input is also given as its tanh at this scale, since contact and release depend on millimetres."""


class Teacher(nn.Module):
    """Privileged state (B, S) -> normalised action chunk (B, C, A): the mean of several networks."""

    def __init__(self, state_dim: int, chunk_size: int, action_dim: int, config: TeacherConfig | None = None) -> None:
        super().__init__()
        config = config or TeacherConfig()
        self.chunk_size, self.action_dim = chunk_size, action_dim
        self.register_buffer("view", torch.eye(state_dim))
        self.register_buffer("shift", torch.zeros(state_dim))
        self.register_buffer("divide", torch.ones(state_dim))
        width = config.width
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 * state_dim, width), nn.LayerNorm(width), nn.SiLU(),
                nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU(),
                nn.Linear(width, width), nn.SiLU(),
                nn.Linear(width, chunk_size * action_dim),
            )
            for _ in range(config.count)
        )  # fmt: skip

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], chunk_size: int, config: TeacherConfig) -> Teacher:
        """Return the frozen teacher of a `state_dict`."""
        action_dim = len(tensors["nets.0.8.bias"]) // chunk_size
        teacher = Teacher(len(tensors["shift"]), chunk_size, action_dim, config)
        tensors = {"view": torch.eye(len(tensors["shift"]))} | tensors  # checkpoints before it was kept
        teacher.load_state_dict(tensors)
        return teacher.requires_grad_(False).eval()

    def standardised(self, viewed_BS: Tensor) -> Tensor:
        """Return the networks' input (B, 2 S)."""
        scaled = ((viewed_BS - self.shift) / self.divide).clamp(-10.0, 10.0)
        return torch.cat([scaled, torch.tanh(SHARP * scaled)], 1)

    def forward(self, state_BS: Tensor) -> Tensor:
        """Return the mean chunk (B, C, A), normalised."""
        seen = self.standardised(state_BS @ self.view)
        mean = torch.stack([net(seen) for net in self.nets]).mean(0)
        return mean.unflatten(1, (self.chunk_size, self.action_dim))


def fit_teacher(
    demos: DemoSet,
    processor: Processor,
    chunk_size: int,
    config: TeacherConfig | None = None,
    *,
    plane: PlanarSymmetry | None = None,
    seed: int = 0,
) -> Teacher:
    """Return a frozen teacher that imitates the demonstrated chunks (L1 loss) from the simulator's state.

    `plane` says which columns of the suite's state lie in the table's plane; `origin` "hand" needs it. ValueError if
    the demonstrations do not hold that state, or the configuration asks for a symmetry that the suite does not have.
    """
    config = config or TeacherConfig()
    if problem := config.problem():
        raise ValueError(problem)
    if demos.privileged is None:
        raise ValueError(
            "these demonstrations do not hold the simulator's state, which a teacher reads: record them anew with "
            "`vla demos`"
        )
    view, pairs = _view(demos, config, plane)
    proprio = demos.proprio if demos.exact_proprio is None else demos.exact_proprio
    state = torch.from_numpy(np.concatenate([demos.privileged, proprio], 1, dtype=np.float32)) @ view
    action, mask = demos.chunks(chunk_size)
    if config.turns > 1:
        state, action = turned(state, action, pairs, demos.action_names, config.turns)
    space = processor.config.action_space
    if config.turns > 1 and space is not None and max(space.state) >= 0:
        raise ValueError(
            "a teacher that turns demonstrations about the table cannot turn positions relative to the state: set its "
            "turns to 1, or refine a policy that was trained on actions as recorded"
        )
    began_FP = np.tile(demos.proprio, (config.turns, 1))
    action_FCA = torch.from_numpy(processor.normalise_action(action, began_FP)).float()
    mask_FC = torch.from_numpy(mask).repeat(config.turns, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = Teacher(state.shape[1], chunk_size, action_FCA.shape[2], config)
    teacher.view.copy_(view)
    teacher.shift.copy_(state.mean(0))
    teacher.divide.copy_((state.std(0) + 1e-3).clamp(min=config.floor))  # what never moves stays near 0
    seen = teacher.standardised(state)
    generator = torch.Generator().manual_seed(seed)
    for net in teacher.nets:
        optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.steps)
        for _ in range(config.steps):
            rows = torch.randint(len(seen), (config.minibatch_size,), generator=generator)
            error = net(seen[rows]).unflatten(1, action_FCA.shape[1:]) - action_FCA[rows]
            optimiser.zero_grad(set_to_none=True)
            masked_l1(error, mask_FC[rows]).backward()
            optimiser.step()
            schedule.step()
    return teacher.requires_grad_(False).eval()


def _view(demos: DemoSet, config: TeacherConfig, plane: PlanarSymmetry | None) -> tuple[Tensor, tuple[Pair, ...]]:
    """Return the linear view (S, S) of the state, and the pairs of its columns that are vectors in the plane."""
    dims = demos.privileged.shape[1], demos.proprio.shape[1]
    if config.origin == "world":
        return torch.eye(sum(dims)), ()
    if plane is None:
        raise ValueError(
            'this suite does not tell what lies in the plane of a table: set the teacher\'s origin to "world"'
        )
    if config.turns > 1 and not plane.turns:
        raise ValueError(
            "this suite's scenes cannot be turned (fixtures stand in them, or its state has angles): choose a recipe "
            "that does not turn its demonstrations (multitask, robosuite-lift-guided), or set turns to 1"
        )
    return from_hand(plane, *dims)


class TeacherPolicy:
    """The teacher acting by itself, to measure its success. A `vla.core.types.Policy`."""

    def __init__(self, teacher: Teacher, actor: ChunkActor, spec: ActionSpec, n_action_steps: int) -> None:
        """`actor` converts normalised actions to the environment's units."""
        self.teacher, self.actor, self.action_spec = teacher, actor, spec
        self.spec = PolicySpec(spec, teacher.chunk_size, min(n_action_steps, teacher.chunk_size))

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Do nothing: a decision depends on the observation alone."""

    @torch.no_grad()
    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Return the whole chunk (B, C, A) in environment units."""
        return self.actor.to_env(self.teacher(privileged_state(obs).to(self.teacher.shift)), self.action_spec, obs)
