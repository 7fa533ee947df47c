"""Talking: what a policy that answers questions beside its actions says, and the words of those that cannot. No torch.

A policy that talks has `PolicySpec.talks` and a method `answer(observation, questions)`, which changes nothing about
its actions (VLA4CD, EMNLP 2025: continuous actions and text from one model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vla.core.types import Observation, Policy

LONGEST_QUESTION = 400
"""Characters of a question that are read."""
ACCOUNT = "what are you doing"
"""The question to which a policy tells its own account of what it does."""
CANNOT = "this policy cannot talk: train one that does with `vla train --talk DATA` (docs/beyond.md)"


@dataclass(frozen=True)
class Said:
    """One answer."""

    text: str
    confidence: float
    """Probability of the answer's least sure token, its end included, 0 to 1."""


class Speech(Protocol):
    """Answers on their way: a token a step, so that whoever acts too need not wait for more than that."""

    def step(self) -> bool:
        """Go on by one token. True when all answers have ended."""

    def said(self) -> list[Said]:
        """The answers, as far as they have come."""


def speech(policy: Policy, obs: Observation, questions: Sequence[str]) -> Speech:
    """Begin to answer one question about each of B observations. For a policy in this process: it has a method
    `speech`. ValueError as `ask`."""
    _check(policy, obs, questions)
    return policy.speech(obs, [checked_question(question) for question in questions])  # type: ignore[attr-defined]


def _check(policy: Policy, obs: Observation, questions: Sequence[str]) -> None:
    if not policy.spec.talks:
        raise ValueError(CANNOT)
    if len(questions) != obs.batch_size:
        raise ValueError(f"ask takes one question for each of {obs.batch_size} observations, got {len(questions)}")


def ask(policy: Policy, obs: Observation, questions: Sequence[str]) -> list[Said]:
    """The answers of a policy to one question about each of B observations. ValueError for a policy that cannot talk,
    or a question that says nothing."""
    _check(policy, obs, questions)
    return policy.answer(obs, [checked_question(question) for question in questions])  # type: ignore[attr-defined]


def checked_question(question: Any) -> str:
    """The question itself. ValueError for what is no text, says nothing, or is too long."""
    if not isinstance(question, str):
        raise ValueError(f"a question must be text, got {type(question).__name__}")
    if not question.strip():
        raise ValueError('a question must say something, for example "what are you doing?"')
    if len(question) > LONGEST_QUESTION:
        raise ValueError(f"a question has at most {LONGEST_QUESTION} characters, got {len(question)}")
    return question
