"""The same figures in metrics.jsonl and in the trackers, and a resumed run does not tell them twice."""

import importlib.util
import json
import sys
import types
from dataclasses import replace

import pytest

from tests.vla.training.test_train import CONFIG, Killed, demos, fresh, interrupt_at, kill, metrics
from vla.runtime.run_log import METRICS, Metrics
from vla.training.train import learning_rate, train


def test_tensorboard_holds_what_the_file_holds(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = replace(CONFIG, trackers=("tensorboard",))
    with pytest.raises(Killed):
        train(cfg, fresh(), demos(), tmp_path, on_step=interrupt_at(6, kill))
    train(cfg, fresh(), demos(), tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    for name in ("loss", "grad_norm", "lr"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [(line["step"], pytest.approx(line[name])) for line in lines], name
    assert [line["lr"] for line in lines] == [learning_rate(cfg, step - 1) for step in (3, 6, 9, 12)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_run_trackers_are_given_name_configuration_and_figures(tmp_path, monkeypatch, name):
    """Against a stand-in with their three functions: the real ones would phone home."""
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **about: calls.append(("init", about))
    module.log = lambda figures, step: calls.append(("log", step, figures))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    with Metrics(tmp_path / "run", (name,), config={"lr": 1}) as log:
        log.log(5, {"loss": 0.5})
    assert [call[0] for call in calls] == ["init", "log", "finish"]
    assert calls[0][1]["name"] == "run" and calls[0][1]["config"] == {"lr": 1}
    assert calls[1] == ("log", 5, {"loss": 0.5})
    assert json.loads((tmp_path / "run" / METRICS).read_text()) == {"step": 5, "loss": 0.5}


def test_a_missing_tracker_is_said_before_training(tmp_path):
    with pytest.raises(ValueError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        Metrics(tmp_path, ("tensorbord",))
    if importlib.util.find_spec("trackio") is None:
        with pytest.raises(ValueError, match="'trackio' needs its package: pip install trackio"):
            Metrics(tmp_path, ("trackio",))
