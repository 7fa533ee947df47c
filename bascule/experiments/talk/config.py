"""Configuration of `vla experiment talk`."""

from __future__ import annotations

from dataclasses import dataclass

from vla.model.config import DEFAULT_BACKBONE


@dataclass(frozen=True)
class TalkExperimentConfig:
    """Arms that act, talk, or both, from the same demonstrations and the same questions."""

    suite: str = "tabletop-pick"
    """Where the policies act."""
    arms: tuple[str, ...] = ("action-only", "adapter", "shuffled", "action-tuned", "joint", "text-tuned")
    """action-only: frozen backbone, no talking. adapter: the same, with a talker of its own. shuffled: its answers
    exchanged in training, a control. action-tuned, joint, text-tuned: the decoder learns (LoRA) from actions alone,
    from both, from text alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each with its own demonstrations and initial weights; the questions are the same."""
    demos: int = 20
    """Number of demonstrations."""
    backbone: str = DEFAULT_BACKBONE
    """Backbone of the policies, see `vla list backbones`."""
    steps: int = 800
    """Gradient steps of the arms with a frozen backbone."""
    tuned_steps: int = 150
    """Gradient steps, on half as many frames, of the arms whose backbone learns: it runs at every step."""
    talk_episodes: int = 1600
    """Episodes that are asked about for training, of tabletop-pick and tabletop-ten in turn."""
    episodes: int = 200
    """Evaluation scenes to act in, and as many held-out episodes to be asked about."""
    num_envs: int = 24
    """Environments that play at the same time."""
    workers: int = 2
    """Processes that simulate."""

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        from envs.grounding.episode_questions import askable
        from envs.registry import load_suite

        if self.episodes < 2:
            return f"--episodes must be at least 2, half of which are asked about in other words, got {self.episodes}"
        return askable(load_suite(self.suite))
