"""PPO over tokens solves a bandit of chunks, with either ratio, and by advantages that lie it does not."""

import numpy as np
import pytest
import torch
from torch import nn

from rl.algorithms.policy_gradient import OBJECTIVES
from rl.algorithms.ppo import PPO
from rl.configs.learning import ActorConfig, PPOConfig
from rl.models.actor import TokenChunkActor
from rl.models.critic import Critic
from rl.models.policy_inputs import StateInput
from rl.models.tokens import TokenChunk
from rl.rollout.step_collector import Collector
from rl.storage.rollout_buffer import RolloutBuffer
from tests.rl.algorithms.test_learning import Bandit, before_and_after, lie
from vla.model.heads.tokens import BinHead, FrequencyHead


class TokenNet:
    """The state as latent of three steps, and a head that chooses among nine bins."""

    chunk_size = 3

    def __init__(self, head: type[BinHead], seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = nn.ModuleDict(
                {"stem": nn.Linear(2, 3 * 32), "head": head(width=32, action_dim=2, bins=9, limit=1.0)}
            )
        self.head = self.module["head"]

    def encode(self, obs):
        proprio = torch.from_numpy(obs.proprio)
        return StateInput(proprio), proprio

    def _latent(self, inputs):
        return self.module["stem"](inputs.state_BS).unflatten(-1, (3, 32))

    def mean(self, inputs, proprio_BP):
        return self.head(self._latent(inputs))

    def token_chunk(self, inputs, proprio_BP, temperature):
        return TokenChunk(self.head.logits(self._latent(inputs)), temperature, self.head.spans_chunk)

    def of_tokens(self, token_BCA):
        return self.head.of_tokens(token_BCA)

    def unnormalise_action(self, action_BCA, proprio_BP):
        return action_BCA.astype(np.float32)


def distance(head: type[BinHead], ratio: str, temperature: float = 1.0) -> tuple[float, float]:
    """Mean distance of the greedy chunk to the best one, before and after learning."""
    env = Bandit(64)
    actor = TokenChunkActor(TokenNet(head, 0), ActorConfig(noise="tokens", temperature=temperature))
    torch.manual_seed(0)
    settings = PPOConfig(
        lr=1e-2, minibatch_size=128, critic_warmup=0, epochs=2, critic_epochs=2, ratio=ratio, kl_stop=0.2
    )
    learner = PPO(actor, Critic(0, 2), settings, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(100)
    collector = Collector(actor, env, generator=noise, train_seeds=(0, 100_000), score=OBJECTIVES[ratio].score)
    return before_and_after(env, learner, collector, RolloutBuffer(4, 64), updates=25)


@pytest.mark.parametrize(
    ("head", "ratio", "temperature"),
    [(BinHead, "chunk", 1.5), (BinHead, "token", 1.5), (FrequencyHead, "chunk", 1.5)],
)
def test_a_bandit_of_token_chunks_is_solved(head, ratio, temperature):
    before, after = distance(head, ratio, temperature)
    assert before > 0.3 and after < 0.6 * before, (before, after)


def test_a_flipped_sign_unlearns(monkeypatch):
    lie(monkeypatch)
    before, after = distance(BinHead, "token")
    assert after > before
