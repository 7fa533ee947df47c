"""A policy at the controls that says what it does: between its decisions, which come no later for it."""

import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from policies.control.playback import Answer, Inference
from policies.control.policy_process import PolicyProcess
from policies.control.policy_source import PolicySource
from vla.core.types import Observation
from vla.language.talking import ACCOUNT, Said, ask

# A spawned process finds a module by its name, and `tests` may be somebody else's package there.
sys.path.insert(0, str(Path(__file__).parent))
from toy_processes import Steady, Talks  # noqa: E402


def observation(text="go"):
    return Observation({"front": np.zeros((1, 8, 8, 3), np.uint8)}, np.zeros((1, 3), np.float32), [text])


def acts(policy, times, text="go", pause_s=0.0):
    """The accounts that came with these decisions, and the seconds that each took."""
    told, took = [], []
    for _ in range(times):
        began = time.monotonic()
        policy.act(observation(text))
        took.append(time.monotonic() - began)
        told.append(policy.account)
        time.sleep(pause_s)
    return told, took


def test_accounts_come_at_their_interval_and_only_once():
    policy = PolicyProcess(partial(Talks), account_s=0.0)
    told, _ = acts(policy, 4, pause_s=0.05)
    assert told[0] is None and told[1:] == [Said(ACCOUNT, 0.75)] * 3
    assert ask(policy, observation(), ["which object"]) == [Said("which object", 0.5)]
    policy.close()
    policy = PolicyProcess(partial(Talks), account_s=3600.0)
    told, _ = acts(policy, 4, pause_s=0.02)
    assert told[1] == Said(ACCOUNT, 0.75) and told[2:] == [None, None]
    policy.close()


def test_a_decision_waits_for_one_letter_and_the_account_goes_on_after_it():
    """The whole account takes 17 letters of 0.1 s; asked in the midst of it, a decision takes a letter's time."""
    policy = PolicyProcess(partial(Talks, 0.1), account_s=0.0)
    acts(policy, 1)
    told, took = acts(policy, 2, pause_s=0.3)
    assert told == [None, None] and max(took) < 0.1 * len(ACCOUNT) / 2
    time.sleep(0.1 * len(ACCOUNT))
    assert acts(policy, 1)[0] == [Said(ACCOUNT, 0.75)]
    policy.close()


def test_who_loses_its_voice_goes_on_acting():
    policy = PolicyProcess(partial(Talks), account_s=0.0)
    told, _ = acts(policy, 3, "crash", pause_s=0.02)
    assert told == [None] * 3 and acts(policy, 2, pause_s=0.05)[0][1] == Said(ACCOUNT, 0.75)
    policy.close()


def test_without_being_asked_for_nothing_is_said_and_who_cannot_talk_is_refused():
    policy = PolicyProcess(partial(Talks))
    assert acts(policy, 2, pause_s=0.02)[0] == [None, None]
    policy.close()
    with pytest.raises(ValueError, match="this policy cannot talk"):
        PolicyProcess(partial(Steady), account_s=1.0)


def test_the_loop_writes_accounts_to_log_and_black_box(caplog):
    told = []

    class Box:
        def event(self, **what):
            told.append(what)

    source = PolicySource.__new__(PolicySource)
    source._log = Box()
    with caplog.at_level("INFO"):
        source.tell(Said("lifting the red cube", 0.9))
    assert told == [{"account": {"text": "lifting the red cube", "confidence": 0.9}}] and json.dumps(told)
    assert caplog.messages == ["the policy says: lifting the red cube (confidence 0.90)"]


def test_inference_hands_an_account_on():
    policy = Talks()
    policy.account = Said("reaching", 0.5)
    inference = Inference(policy, asynchronous=False)
    inference.ask(observation(), step=0, seen_s=0.0)
    answer = inference.fetch()
    assert isinstance(answer, Answer) and answer.account == Said("reaching", 0.5)
