"""A checkpoint's config.json that was edited by hand, or written by a newer version: one line that names the file."""

import json

import pytest

from bascule.main import main
from policies.load import load_policy
from tests.vla.small_policy import small_policy

UNDO = "; undo what was changed in it, copy the checkpoint again, or update Bascule if a newer one wrote it"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return small_policy(tmp_path_factory.mktemp("policy") / "small")


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("model", {"new_gate": 1}, "unknown field of VLAConfig 'new_gate'"),
        (
            "model",
            {"chunk_size": 16},
            "it does not describe the weights in model.safetensors: bridge.position is (16, ",
        ),
        ("model", {"head": "flow"}, "it does not describe the weights in model.safetensors: head."),
        ("model", {"bridge": None}, "bridge"),
        ("processor", {"control_hz": "20"}, "control_hz must be float, got '20'"),
        ("processor", {"action_names": ["dx"]}, "the action has 1 components (dx) but the statistics have"),
        ("processor", {"action_low": [2.0] * 4, "action_high": [1.0] * 4}, "action_low of dx must be at most its "),
        ("processor", {"action_low": [float("nan")] * 4}, "action_low of dx must be at most its action_high, got nan"),
    ],
)
def test_the_file_and_the_field_are_named(saved, tmp_path, capsys, part, change, words):
    folder = tmp_path / "edited"
    folder.mkdir()
    for path in saved.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(saved)).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(saved)).write_bytes(path.read_bytes())
    config = json.loads((saved / "config.json").read_text())
    config[part].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as problem:
        load_policy(folder)
    told = str(problem.value)
    assert told.startswith(f"{folder / 'config.json'}: ") and words in told and told.endswith(UNDO), told
    assert main(["serve", str(folder), "--port", "0"]) == 2
    assert "Traceback" not in (said := capsys.readouterr().err) and words in said


def test_as_it_was_saved_it_loads(saved):
    assert load_policy(saved).spec.chunk_size > 0
