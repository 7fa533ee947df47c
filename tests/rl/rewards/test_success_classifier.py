"""The success classifier: its promise about false positives, its control, its file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rl.configs.offline import ClassifierConfig
from rl.rewards.success_classifier import (
    NEVER,
    SuccessClassifier,
    Watched,
    check,
    fit_classifier,
    shuffled,
)

QUICK = ClassifierConfig(width=16, steps=100, dropout=0.0)


def episodes(count: int, seed: int, *, overlap: float = 0.6) -> list[Watched]:
    """Twelve frames each; half are done in the last three. What is seen is a noisy sign of that, and seven numbers of
    no meaning."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for k in range(count):
        done = torch.zeros(12, dtype=torch.bool)
        done[9:] = k % 2 == 0
        sign = done.float() * 2 - 1 + overlap * torch.randn(12, generator=generator)
        out.append(Watched(torch.cat([sign[:, None], torch.randn(12, 7, generator=generator)], 1), done))
    return out


def test_at_most_one_new_episode_in_twenty_is_taken_for_done_too_early() -> None:
    model, report = fit_classifier(episodes(300, 0), QUICK)
    false, negatives, missed, positives = check(model, episodes(600, 1)).episodes
    assert negatives == 600 and false / negatives <= 0.06 and missed / positives < 0.5
    frames_false, frames_negative, *_ = report.frames
    assert frames_false / frames_negative <= 0.05 and 0.5 <= report.threshold < 1


def test_a_bad_sight_is_no_excuse_for_false_positives() -> None:
    model, _ = fit_classifier(episodes(200, 2, overlap=4.0), QUICK)
    false, negatives, *_ = check(model, episodes(400, 3, overlap=4.0)).episodes
    assert false / negatives <= 0.07


def test_too_few_episodes_promise_nothing() -> None:
    model, report = fit_classifier(episodes(20, 0, overlap=0.1), replace(QUICK, held_out=0.5))
    assert report.threshold == NEVER and not (model(episodes(2, 4)[0].seen_TS) > model.threshold).any()


def test_shuffled_labels_leave_nothing_to_be_rewarded_for() -> None:
    watched = episodes(300, 0)
    control, _ = fit_classifier(shuffled(watched, seed=0), QUICK)
    honest, _ = fit_classifier(watched, QUICK)
    fresh = episodes(300, 5)
    assert check(honest, fresh).frame_auc > 0.95
    counted = [int(torch.cat([w.done_T for w in part]).sum()) for part in (watched, shuffled(watched, seed=0))]
    assert counted[0] == counted[1] == 450
    seen, done = torch.cat([w.seen_TS for w in fresh]), torch.cat([w.done_T for w in fresh])

    def told_apart(model: SuccessClassifier) -> float:
        said = model(seen) > model.threshold
        return float(said[done].float().mean() - said[~done].float().mean())

    assert told_apart(honest) > 0.5 > 0.2 > told_apart(control)


def test_it_is_read_back_as_it_was_written(tmp_path) -> None:
    model, _ = fit_classifier(episodes(200, 0), QUICK)
    model.save(tmp_path / "c", "small")
    again, seen = SuccessClassifier.load(tmp_path / "c"), episodes(1, 9)[0].seen_TS
    assert torch.equal(model(seen), again(seen)) and again.threshold == model.threshold
    assert again.patience == model.patience


def test_it_needs_frames_of_both_kinds() -> None:
    hopeless = [Watched(w.seen_TS, torch.zeros(12, dtype=torch.bool)) for w in episodes(10, 0)]
    with pytest.raises(ValueError, match="frames of both kinds"):
        fit_classifier(hopeless, QUICK)
