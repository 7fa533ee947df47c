"""The quickstart's recipes: budgets, what is randomised, what is refused, and the perturbed environments at the end."""

from __future__ import annotations

import numpy as np
import pytest

import envs
from bascule import main as cli
from bascule.quickstart import job, perturbed
from bascule.quickstart.config import QuickstartConfig
from bascule.quickstart.recipes import RECIPES, imitation, training_perturbation, with_budgets
from bascule.quickstart.refine import _recipe
from envs.perturb.perturbation import parse
from rl.recipes import RECIPES as RL_RECIPES
from tests.vla.toy_backbone import toy_vla


def test_a_recipe_sets_what_the_user_did_not():
    plain, robust = QuickstartConfig(), QuickstartConfig(recipe="tabletop-robust", imitation_steps=50)
    assert with_budgets(plain) == plain
    chosen = with_budgets(robust)
    assert (chosen.imitation_steps, chosen.rl_seconds, chosen.demos) == (50, 480.0, 20)
    assert imitation(robust).model.backbone == "small" and imitation(plain).model.backbone == "tiny-goals"
    other = QuickstartConfig(recipe="tabletop-robust", backbone="tiny-goals")
    assert imitation(other).model.backbone == "tiny-goals"
    assert imitation(other).max_text_tokens > imitation(plain).max_text_tokens


def test_demonstrations_and_rl_are_randomised_alike():
    robust, plain = QuickstartConfig(recipe="tabletop-robust"), QuickstartConfig()
    perturb = training_perturbation(robust)
    assert perturb.draws == "train" and perturb.plain == 0.3 and perturb.on("instruction") and perturb.on("light")
    assert all(perturb.range_of(axis)[0] == 0.0 for axis in ("camera", "texture", "distractors", "layout"))
    assert (
        RL_RECIPES["tabletop-robust"]().randomise == RECIPES["tabletop-robust"].randomise == _recipe(robust).randomise
    )
    assert training_perturbation(plain) is None and _recipe(plain).randomise == ()
    assert RL_RECIPES["tabletop-robust"]().guide is not None
    names = [stage.name for stage in job._stages(robust, None, None)]
    assert names[-2:] == ["evaluate perturbed", "serve"]
    assert "evaluate perturbed" not in [stage.name for stage in job._stages(plain, None, None)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--recipe", "tabletop-robst"), "tabletop-robust"),
        (("--recipe", "tabletop-robust", "--suite", "robosuite-lift"), "robosuite-lift' has no perturbations"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path, capsys, words, told):
    assert cli.main(["quickstart", "--out", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out" / "quickstart.json").exists()


class _Worlds:
    """Environments in which the policy succeeds in as many scenes as there are letters in the axis's name."""

    def __init__(self, perturb):
        self.perturb = perturb

    def close(self):
        pass


def test_perturbed_cells_become_controls(tmp_path, monkeypatch):
    from envs.evaluation import evaluate

    class Report:
        def __init__(self, successes, episodes):
            self.successes, self.episodes, self.wrong_object = successes, episodes, 1

    made = []
    monkeypatch.setattr(envs, "make_vec", lambda suite, n, **how: made.append((n, how)) or _Worlds(how["perturb"]))
    monkeypatch.setattr(
        evaluate, "evaluate",
        lambda policy, env, seeds, suite: Report(len(env.perturb.words().partition("=")[0]), len(seeds)),
    )  # fmt: skip
    monkeypatch.setattr("vla.model.model.VLA.load", lambda folder: toy_vla())
    found = perturbed.judge_perturbed(QuickstartConfig(), tmp_path, ("light=0.5", "texture=0.5"), range(10))
    controls = found.parts["controls"]
    assert {name: row["successes"] for name, row in controls.items()} == {
        "perturbed: light=0.5": 5, "perturbed: texture=0.5": 7
    }  # fmt: skip
    assert [how["perturb"] for _, how in made] == [parse(["light=0.5"]), parse(["texture=0.5"])]
    assert all(n == 10 and how["image_size"] == 16 for n, how in made)
    assert np.isclose(controls["perturbed: light=0.5"]["success_rate"], 0.5)
