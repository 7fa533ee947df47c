"""A run of `vla rl` keeps more than its configuration, so that it is resumed as it was begun."""

import re
from pathlib import Path

import pytest

from bascule.commands.learning.rl import RL
from envs.perturb.perturbation import parse, randomisation
from rl.run_checkpoint import require_same_conditions


def conditions(perturb=None, demos=None, **flags):
    return RL("tabletop-pick", Path("init"), **flags)._conditions(perturb, demos)


def test_everything_that_changes_what_is_learnt_is_told():
    plain = conditions()
    assert set(plain.values()) == {"none", "0", "cpu"}
    light = conditions(parse(["light=0.5", "azimuths=-30,30"]))
    assert light["perturbations (--randomise, --perturb)"] == "light 0.5; draws test; azimuths (-30.0, 30.0)"
    assert conditions(parse(["light=0"])) == plain
    for other in (
        conditions(randomisation(["light"])), conditions(randomisation(["medium"])), conditions(late_steps=2),
        conditions(backend="warp"), light,
    ):  # fmt: skip
        assert other != plain and len([name for name in other if other[name] != plain[name]]) == 1


def test_other_demonstrations_and_another_policy_are_refused_in_words():
    demos, policy = "demonstrations (--demos)", "policy (--init)"
    began = {demos: "29eeefcd0def285f", policy: "0523b84e2c14036a", "--late-steps": "2"}
    same = {demos: "29eeefcd0def285f-1775486060817388", policy: "0523b84e2c14036a"}  # kept before pictures counted
    require_same_conditions(Path("out"), {"conditions": began}, same)
    require_same_conditions(Path("out"), {"conditions": {}}, same)
    for other, words in (
        ({demos: "39eeefcd0def285f-1775486060817388"}, "different demonstrations (--demos): resume"),
        ({policy: "1523b84e2c14036a"}, "different policy (--init): resume it as it was begun"),
        ({"--late-steps": "1"}, "--late-steps 2, now it is 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            require_same_conditions(Path("out"), {"conditions": began}, other)
