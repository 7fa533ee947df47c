"""A run of `vla rl` keeps more than its configuration, so that it is resumed as it was begun."""

from pathlib import Path

from bascule.commands.learning.rl import RL
from envs.perturb.perturbation import parse, randomisation


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
