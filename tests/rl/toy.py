"""A point that reaches for a spot it sees in an image: small, but with the real interfaces, for the real PPO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from rl.configs.learning import PPOConfig
from rl.configs.run import RunnerConfig
from rl.models.actor import GreedyPolicy
from rl.rollout.step_collector import play
from vla.backbones.features import Features
from vla.core.checkpoint import load_tensors, save_tensors
from vla.core.types import ActionSpec, Observation, StepResult, VecEnv
from vla.data.lerobot_dataset import DemoSet

CHUNK = 4
SPEED = 0.2  # metres per control step at normalised action 1
SPEC = ActionSpec(names=("dx", "dy", "gripper"), low=(-SPEED, -SPEED, -1.0), high=(SPEED, SPEED, 1.0), control_hz=20.0)


class PointReach(VecEnv):
    """Move a point to the goal and close the gripper there; success ends the episode with reward 1, even mid-chunk."""

    action_spec = SPEC
    cameras = ("front",)
    proprio_dim = 2
    privileged_dim = 4
    horizon = 12

    def __init__(self, num_envs: int, *, radius: float = 0.15) -> None:
        self.num_envs, self.radius = num_envs, radius
        self.pos = np.zeros((num_envs, 2), np.float32)
        self.goal = np.zeros((num_envs, 2), np.float32)
        self.elapsed = np.full(num_envs, self.horizon)
        self.over = np.ones(num_envs, bool)
        self.seeds_seen: list[int] = []

    def reset(self, *, seeds, tasks=None, env_ids=None):
        ids = range(self.num_envs) if env_ids is None else env_ids
        assert len(seeds) == len(ids)
        for seed, i in zip(seeds, ids, strict=True):
            draw = np.random.default_rng(seed).uniform(-0.8, 0.8, 4).astype(np.float32)
            self.pos[i], self.goal[i], self.elapsed[i], self.over[i] = draw[:2], draw[2:], 0, False
            self.seeds_seen.append(seed)
        return self._obs()

    def _obs(self) -> Observation:
        image = np.zeros((self.num_envs, 4, 4, 3), np.uint8)
        image[..., :2] = np.round((self.goal + 1) * 127.5)[:, None, None, :]
        return Observation(
            images={"front": image},
            proprio=self.pos.copy(),
            instruction=["reach the spot"] * self.num_envs,
            privileged=np.concatenate([self.goal, self.goal - self.pos], axis=1),
        )

    def step_chunk(self, chunk) -> StepResult:
        assert chunk.dtype == np.float32 and chunk.shape[::2] == (self.num_envs, 3)
        assert (np.abs(chunk) <= np.float32(SPEC.high)).all(), "an action outside its bounds reached the environment"
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        n_steps = np.zeros(self.num_envs, np.int64)
        for action in chunk.transpose(1, 0, 2):
            live = ~self.over
            self.pos[live] += action[live, :2]
            self.elapsed[live] += 1
            n_steps += live
            near = np.linalg.norm(self.pos - self.goal, axis=1) < self.radius
            reached = live & near & (action[:, 2] > 0)
            late = live & ~reached & (self.elapsed >= self.horizon)
            reward += reached
            terminated |= reached
            truncated |= late
            self.over |= reached | late
        info = {"success": terminated.copy(), "wrong_object": np.zeros(self.num_envs, bool)}
        return StepResult(self._obs(), reward, terminated, truncated, n_steps, info)

    def set_rendering(self, on: bool) -> None:
        self.drawing = on

    def observation(self) -> Observation:
        return self._obs()

    def alternative_instructions(self) -> list[str]:
        return ["reach nothing"] * self.num_envs

    def close(self) -> None: ...


class Endless(PointReach):
    """Reward 1 per chunk for ever; only the clock (or, `terminal`, a clock mistaken for an ending) cuts it."""

    horizon = 3 * CHUNK

    def __init__(self, num_envs: int, *, terminal: bool) -> None:
        super().__init__(num_envs)
        self.terminal = terminal

    def step_chunk(self, chunk) -> StepResult:
        self.elapsed += chunk.shape[1]
        late = self.elapsed >= self.horizon
        never = np.zeros(self.num_envs, bool)
        ends = (late, never) if self.terminal else (never, late)
        steps = np.full(self.num_envs, chunk.shape[1])
        info = {"success": never, "wrong_object": never}
        return StepResult(self._obs(), np.ones(self.num_envs, np.float32), *ends, steps, info)


@dataclass
class ToyInput:
    image_BHWC: Tensor
    proprio_BP: Tensor


class ToyProcessor:
    config = SimpleNamespace(action_space=None)

    def prepare(self, obs: Observation) -> ToyInput:
        return ToyInput(torch.from_numpy(obs.images["front"]), torch.from_numpy(obs.proprio))

    def unnormalise_action(self, action, proprio=None):
        return action * np.float32(SPEC.high)

    def normalise_action(self, action, proprio=None):
        return action / np.float32(SPEC.high)


class ToyVLA(nn.Module):
    """`vla.model.model.VLA` in miniature: frozen backbone -> Features; head with dropout -> chunk of normalised
    actions."""

    chunk_size = CHUNK

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = nn.Linear(3, 16)
            self.head = nn.Sequential(
                nn.Linear(18, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, CHUNK * 3)
            )
        self.backbone.requires_grad_(False)
        self.processor = ToyProcessor()

    def encode(self, inp: ToyInput) -> Features:
        x = self.backbone(inp.image_BHWC.float().mean((1, 2)) / 127.5 - 1)
        rows = x[:, None, None, :]
        return Features(rows, None, rows, None, torch.zeros(1, 3))

    def act(self, features: Features, proprio_BP: Tensor) -> Tensor:
        return self.head(torch.cat([features.raw_BLND[:, 0, 0], proprio_BP], 1)).view(-1, CHUNK, 3)

    @torch.no_grad()
    def predict(self, inp: ToyInput) -> np.ndarray:
        mean = self.act(self.encode(inp), inp.proprio_BP)
        return np.clip(self.processor.unnormalise_action(mean.numpy()), np.float32(SPEC.low), np.float32(SPEC.high))

    def save(self, folder: Path) -> None:
        save_tensors(Path(folder) / "model.safetensors", self.state_dict(), {})

    def load(self, folder: Path) -> None:
        self.load_state_dict(load_tensors(Path(folder) / "model.safetensors"))


def imitate(seed: int = 0, *, steps: int = 300, offset: float = 0.13) -> ToyVLA:
    """Cloned from a demonstrator that aims `offset` beside the goal on both axes: succeeds about half of the time."""
    model = ToyVLA(seed)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.Adam(model.head.parameters(), lr=3e-3)
    env = PointReach(256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(steps):
            env.pos[:], env.goal[:] = rng.uniform(-0.9, 0.9, (2, 256, 2))
            inp = model.processor.prepare(env._obs())
            gap = torch.from_numpy((env.goal + offset - env.pos) / SPEED)
            target = torch.ones(256, CHUNK, 3)
            for k in range(CHUNK):
                target[:, k, :2] = gap.clamp(-1, 1)
                gap = gap - gap.clamp(-1, 1)
            loss = (model.act(model.encode(inp), inp.proprio_BP) - target).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def evaluate(policy: GreedyPolicy, episodes: int = 200) -> tuple[int, int]:
    return play(policy, PointReach(episodes), range(5_000_000, 5_000_000 + episodes)), episodes


def config(**changes) -> RunnerConfig:
    """A small run; keyword arguments replace fields, `ppo` a dict of PPOConfig fields."""
    ppo = {"minibatch_size": 64, "critic_warmup": 1} | changes.pop("ppo", {})
    base = {"suite": "toy", "num_envs": 16, "decisions_per_update": 4, "eval_every": 2, "target_success": None}
    return RunnerConfig(**(base | {"calibrate_scales": ()} | changes), ppo=PPOConfig(**ppo))


def learning_config(**changes) -> RunnerConfig:
    """A configuration that brings success from half of the episodes to nearly all, in a few seconds."""
    return config(
        num_envs=64, decisions_per_update=8, eval_every=10, max_updates=40, target_success=0.95,
        ppo={"lr": 3e-4, "minibatch_size": 128, "critic_warmup": 3}, **changes,
    )  # fmt: skip


def demos(episodes: int = 6, length: int = 10) -> DemoSet:
    """To the goal in a straight line."""
    env, rows = PointReach(episodes), {"image": [], "proprio": [], "action": [], "privileged": []}
    env.reset(seeds=range(episodes))
    for _ in range(length):
        obs = env._obs()
        action = np.concatenate([np.clip(env.goal - env.pos, -0.2, 0.2), np.ones((episodes, 1))], 1).astype(np.float32)
        values = (obs.images["front"], obs.proprio, action, obs.privileged)
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value)
        env.pos += action[:, :2]
    stack = {name: np.concatenate(np.stack(parts, 1)) for name, parts in rows.items()}
    return DemoSet(
        images={"front": stack["image"]}, proprio=stack["proprio"], action=stack["action"],
        instruction=["pick up the red cube"] * (episodes * length), episode_index=np.arange(episodes).repeat(length),
        fps=20.0, action_names=SPEC.names, proprio_names=("x", "y"), privileged=stack["privileged"],
    )  # fmt: skip
