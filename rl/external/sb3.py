"""Stable-Baselines3: our environments as its VecEnv, its models as our Policy. Extra: `sb3`.

One action per control step, no images: the observation is proprio and the simulator's state in one vector. It answers
two questions a VLA's learner cannot answer for itself: is the task learnable at all, and does a trusted library's PPO
or SAC agree with what we compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from torch import nn

from envs.seeds import TRAIN_SEED_LIMIT
from vla.core.types import ActionChunk, Observation, Policy, PolicySpec, Prefix, StepResult, VecEnv

try:
    from stable_baselines3 import SAC  # noqa: F401 - the fence: `rl.external.residual_sac` takes it from here
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.policies import ContinuousCritic
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
    from stable_baselines3.common.vec_env import VecEnv as SB3VecEnv
    from stable_baselines3.common.vec_env import VecNormalize
    from stable_baselines3.sac.policies import SACPolicy
except ImportError as error:
    raise ImportError("rl.external.sb3 needs stable-baselines3: install Bascule with the extra 'sb3'") from error


class LayerNormCritics(SACPolicy):
    """SAC's policy with LayerNorm in its critics: what keeps off-policy values finite at many updates per step.

    Ball et al. 2023 (RLPD, arXiv 2302.02948). A policy class for `SAC(LayerNormCritics, ...)`.
    """

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        """Return SAC's critics with a LayerNorm after every linear layer."""
        critic = super().make_critic(features_extractor)
        given = self.critic_kwargs
        for i in range(critic.n_critics):
            width = critic.q_networks[i][0].in_features
            layers = create_mlp(width, 1, given["net_arch"], given["activation_fn"], post_linear_modules=[nn.LayerNorm])
            critic.q_networks[i] = nn.Sequential(*layers).to(self.device)
            setattr(critic, f"qf{i}", critic.q_networks[i])
        return critic


def leave_no_log(model: BaseAlgorithm) -> None:
    """Let it learn without a logger: SB3's own leaves an empty folder among the temporary ones each time."""
    model.set_logger(Logger(folder=None, output_formats=[]))


def state_of(obs: Observation) -> NDArray[np.float32]:
    """Return (B, P + S): proprio, then the simulator's state. ValueError outside simulation."""
    if obs.privileged is None:
        raise ValueError("an SB3 policy of this kind reads the simulator's state: Observation.privileged is None")
    return np.concatenate([obs.proprio, obs.privileged], axis=1).astype(np.float32)


class StateVecEnv(SB3VecEnv):
    """A vector environment with the interface of Stable-Baselines3: it resets itself and reports truncation in `info`.

    A finished environment is reset at once; its last observation is `info["terminal_observation"]`, and
    `info["TimeLimit.truncated"]` says that the horizon cut it, so that SB3 bootstraps. Episodes run through training
    seeds, from a place that `seed` fixes. Images are switched off while this is in charge.
    """

    def __init__(self, env: VecEnv, *, seed: int = 0) -> None:
        self.env = env
        self.render_mode = None
        spec = env.action_spec
        bounds = spaces.Box(np.asarray(spec.low, np.float32), np.asarray(spec.high, np.float32), dtype=np.float32)
        super().__init__(
            env.num_envs, spaces.Box(-np.inf, np.inf, (self._state_dim(),), np.float32), self._action_space(bounds)
        )
        env.set_rendering(False)
        self._rng = np.random.default_rng([seed, 53])
        self._actions: np.ndarray | None = None
        self.obs: Observation | None = None
        """The present observation of all environments, for scripted experts."""

    def reset(self) -> NDArray[np.float32]:
        """Start an episode in every environment; return their states (N, S)."""
        if self._seeds[0] is not None:  # SB3's `seed()` since the last reset
            self._rng = np.random.default_rng([int(self._seeds[0]), 53])
        self._reset_seeds()
        self._reset_options()
        self.obs = self._begin(range(self.num_envs))
        self.reset_infos = [{} for _ in range(self.num_envs)]
        return self._state(self.obs)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions (N, A) for `step_wait`."""
        self._actions = np.asarray(actions, np.float32)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Execute the actions; return states (N, S), rewards (N,), done (N,) and one `info` per environment."""
        assert self._actions is not None, "step_async first"
        result = self._step(self._actions)
        self.obs, self._actions = result.obs, None
        done = result.terminated | result.truncated
        infos: list[dict[str, Any]] = [
            {
                "TimeLimit.truncated": bool(result.truncated[i] and not result.terminated[i]),
                **{name: value[i].item() for name, value in result.info.items()},
            }
            for i in range(self.num_envs)
        ]
        over = np.flatnonzero(done)
        if len(over):
            last = self._state(result.obs)
            for i in over:
                infos[i]["terminal_observation"] = last[i]
            self.obs = self._begin(over.tolist())
        return self._state(self.obs), result.reward, done, infos

    # What another view of the same environments changes (`rl.external.residual_sac`).
    def _state_dim(self) -> int:
        return self.env.proprio_dim + self.env.privileged_dim

    def _action_space(self, bounds: spaces.Box) -> spaces.Box:
        return bounds

    def _state(self, obs: Observation) -> NDArray[np.float32]:
        return state_of(obs)

    def _begin(self, ids: Sequence[int]) -> Observation:
        """Start new episodes in environments `ids`; return the observation of all."""
        return self.env.reset(seeds=self._draw(len(ids)), env_ids=None if len(ids) == self.num_envs else ids)

    def _step(self, actions: NDArray[np.float32]) -> StepResult:
        return self.env.step_chunk(actions[:, None])

    def action_of(self, env_action: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the action (B, A) of this view that is nearest to `env_action` of the environments."""
        return np.clip(env_action, self.action_space.low, self.action_space.high)

    def _draw(self, count: int) -> list[int]:
        return [int(s) for s in self._rng.integers(TRAIN_SEED_LIMIT, size=count)]

    def close(self) -> None:
        """Hand the environments back, rendering on. The caller closes them."""
        with suppress(RuntimeError, OSError, BrokenPipeError):
            self.env.set_rendering(True)

    # SB3 asks these of environments that are objects; ours are rows of arrays, all alike.
    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return the attribute, the same for every environment."""
        value = getattr(self, attr_name) if attr_name == "render_mode" else getattr(self.env, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Raise AttributeError: nothing can be set."""
        raise AttributeError(
            f"{attr_name!r} cannot be set through SB3: these worlds share one configuration; change it where they are "
            "made"
        )

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Raise AttributeError: there are no single environments to call."""
        raise AttributeError(
            f"{method_name!r} cannot be called through SB3: these worlds are rows of arrays, not separate objects; "
            "call the vector environment itself"
        )

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Return False for every environment."""
        return [False for _ in self._get_indices(indices)]


class SB3Policy:
    """A trained SB3 model as our Policy: chunks of one step, so `envs.evaluation.evaluate.evaluate` scores it like any
    other.

    `normalise`: the VecNormalize that the model was trained under, if any; its statistics are used, not changed.
    """

    spec = PolicySpec(chunk_size=1, n_action_steps=1)

    def __init__(
        self, model: BaseAlgorithm, *, deterministic: bool = True, normalise: VecNormalize | None = None
    ) -> None:
        self.model, self.deterministic, self.normalise = model, deterministic, normalise

    def reset(self, env_ids: Sequence[int] | None = None) -> None:
        """Nothing to forget: these policies have no memory."""

    def act(self, obs: Observation, *, prefix: Prefix | None = None) -> ActionChunk:
        """Return the actions (B, 1, A) of B observations."""
        state = state_of(obs)
        if self.normalise is not None:
            state = self.normalise.normalize_obs(state)
        action, _ = self.model.predict(state, deterministic=self.deterministic)
        return np.asarray(action, np.float32)[:, None]


def fill_replay(
    model: OffPolicyAlgorithm, policy: Policy, episodes: int, *, max_steps: int = 100_000
) -> tuple[int, int]:
    """Put a policy's (say, the scripted expert's) episodes into an off-policy model's replay buffer, before it learns.

    Plays in the model's own environment until `episodes` have ended; returns (transitions stored, successes).
    """
    env, buffer = model.get_env(), getattr(model, "replay_buffer", None)
    worlds = env.unwrapped if env is not None else None
    if not isinstance(worlds, StateVecEnv) or buffer is None or isinstance(env, VecNormalize):
        raise ValueError("fill_replay needs a SAC or TD3 model whose environment is a StateVecEnv without VecNormalize")
    state, ended, successes, stored = env.reset(), 0, 0, 0
    policy.reset()
    while ended < episodes and stored < max_steps:
        assert worlds.obs is not None
        action = worlds.action_of(policy.act(worlds.obs)[:, 0])
        following, reward, done, infos = env.step(action)
        real_next = following.copy()
        for i in np.flatnonzero(done):
            real_next[i] = infos[i]["terminal_observation"]
            successes += bool(infos[i]["success"])
        # The buffer holds actions as the network gives them, within [-1, 1].
        buffer.add(state, real_next, model.policy.scale_action(action), reward, done, infos)
        ended, stored, state = ended + int(done.sum()), stored + env.num_envs, following
        if done.any():
            policy.reset([int(i) for i in np.flatnonzero(done)])
    return stored, successes
