"""`vla train --init`: modulators from the command line, and who takes such a policy afterwards."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bascule.commands.learning.train import Train
from bascule.experiments.continual import l2m
from bascule.experiments.continual.l2m import KNOWN, L2MConfig, key_match, tasks_of
from bascule.experiments.continual.learning import owners
from policies.export.exporter import export
from policies.load import load_policy
from tests.vla.data.test_data import lerobot  # noqa: F401 (fixture)
from tests.vla.toy_backbone import toy_vla
from tests.vla.training.test_train_command import arm, command  # noqa: F401 (fixture)
from vla.data.lerobot_dataset import load_dataset
from vla.model.config import ModulatorConfig
from vla.model.model import VLA


@pytest.fixture(scope="module")
def trained(arm, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("trained")
    command(folder, arm).run()
    return folder


def extended(out, data, init, **changes):
    Train(dataset=(data,), out=out, recipe="smoke", init=init, steps=4, batch_size=4, **changes).run()


def test_two_datasets_one_after_another_and_a_policy_for_everyone(arm, trained, tmp_path, capsys):  # noqa: F811
    known = shutil.copytree(arm, tmp_path / "known" / "arm")
    extended(tmp_path / "one", arm, trained, modulators=3, known=(known,))
    told = " ".join(capsys.readouterr().err.split())
    assert "where it is asked as in arm, the policy stays" in told
    assert "warning: in 2 of 2 episodes of this dataset the policy takes what is asked for what it knew before" in told
    extended(tmp_path / "two", arm, tmp_path / "one")
    assert "1 of 3 modulators hold what was learnt" in " ".join(capsys.readouterr().err.split())
    extended(tmp_path / "two", arm, tmp_path / "one", resume=True)  # nothing left to do
    with pytest.raises(ValueError, match="two was begun with another --init: resume it as it was begun"):
        extended(tmp_path / "two", arm, trained, resume=True)
    with pytest.raises(ValueError, match="was begun without --init: resume it as it was begun"):
        extended(trained, arm, tmp_path / "one", resume=True)
    two = VLA.load(tmp_path / "two")
    assert (two.pool.counts_M > 0).sum() == 2
    assert sorted(owners([tmp_path / "one", tmp_path / "two"], ["a", "b"]).values()) == ["a", "b"]
    before, after = VLA.load(trained).state_dict(), two.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    data = load_dataset(arm)
    obs = data.observation(np.flatnonzero(np.diff(data.episode_index, prepend=-1)))
    told = load_policy(trained).act(obs)
    assert np.array_equal(load_policy(tmp_path / "two").act(obs), told), "what is known is done as before"
    with pytest.raises(ValueError, match="exported graph cannot keep a modulator"):
        export(tmp_path / "two", tmp_path / "graph")


def test_without_modulators_the_policy_itself_goes_on(arm, trained, tmp_path):  # noqa: F811
    extended(tmp_path / "on", arm, trained)
    before, after = VLA.load(trained).state_dict(), VLA.load(tmp_path / "on").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["bridge.blocks.0.out.weight"], after["bridge.blocks.0.out.weight"])


def test_a_policy_for_two_robots_goes_on_with_one_of_them(arm, tmp_path):  # noqa: F811
    other = shutil.copytree(arm, tmp_path / "other")
    command(tmp_path / "two", arm, other).run()
    extended(tmp_path / "on", other, tmp_path / "two")
    assert VLA.load(tmp_path / "on").members.keys() == {"arm", "other"}
    for changes, says in (
        ({"modulators": 2, "known": (arm,)}, "modulators are for a policy of one robot"),
        ({}, "not built for the dataset 'third' but for: arm, other"),
    ):
        with pytest.raises(ValueError, match=says):
            extended(
                tmp_path / "x",
                other if changes else shutil.copytree(arm, tmp_path / "third"),
                tmp_path / "two",
                **changes,
            )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"modulators": 2}, "name it with --init"),
        ({"init": True, "modulators": 2}, "--known DATASET"),
        ({"init": True, "chunk_size": 4}, "leave out --chunk-size"),
        ({"init": True, "tune": "full"}, "leave out --tune"),
        ({"init": True, "xyz": True}, "leave out --xyz"),
        ({"init": True, "teacher": Path("teacher")}, "leave out --teacher"),
        ({"init": True, "modulators": 0}, "modulators"),
        ({"init": True, "known": (Path("k"),)}, "--known goes with --modulators"),
    ],
)
def test_flags_that_do_not_go_together(arm, trained, tmp_path, changes, says):  # noqa: F811
    if changes.get("init"):
        changes = changes | {"init": trained}
    with pytest.raises(ValueError, match=says):
        Train(dataset=(arm,), out=tmp_path / "x", recipe="smoke", **changes).run()


def test_the_experiments_tasks_and_matches():
    known, new = tasks_of(L2MConfig())
    assert known == ("lift", "plate", "bowl", "zone", "push") and new == ("stack", "drawer", "open", "close", "press")
    assert tasks_of(L2MConfig(known_tasks=("lift",), new_tasks=("press", "open"))) == (("lift",), ("press", "open"))
    with pytest.raises(ValueError, match="task of tabletop-ten"):
        tasks_of(L2MConfig(new_tasks=("pres",)))
    chosen = {"lift": {KNOWN: 8, "open": 2}, "open": {"open": 7, KNOWN: 3}, "press": {"open": 10}}
    assert key_match(chosen, ("lift",)) == [15, 30]


def test_the_controls_chance_is_among_what_was_learnt_and_nothing():
    pool = toy_vla()
    pool.add_modulators(ModulatorConfig(count=4), seed=0)
    pool.pool.counts_M += torch.tensor([0, 5, 0, 7])
    drawn = l2m._at_random(3)(pool.pool, torch.zeros(300, 48))
    assert {number: round((drawn == number).sum().item() / 100) for number in drawn.tolist()} == {-1: 1, 1: 1, 3: 1}
    noted = []
    assert l2m._noting(l2m._always(2), noted)(pool.pool, torch.zeros(3, 48)).tolist() == noted == [2, 2, 2]
