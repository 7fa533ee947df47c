"""The quickstart's recipes: budgets, what is randomised, what is refused, and the perturbed environments at the end."""

from __future__ import annotations

import json
import shutil

import pytest

from bascule import main as cli
from bascule.quickstart import job, perturbed
from bascule.quickstart.config import QuickstartConfig
from bascule.quickstart.recipes import RECIPES, imitation, rl_recipe, training_perturbation, with_budgets
from envs.registry import load_suite
from rl.recipes import RECIPES as RL_RECIPES
from tests.bascule.robustness.test_report import policy  # noqa: F401 (a fixture)


def test_a_recipe_sets_what_the_user_did_not(tmp_path):
    plain, robust = QuickstartConfig(), QuickstartConfig(recipe="tabletop-robust", imitation_steps=50)
    assert with_budgets(plain) == plain
    chosen = with_budgets(robust)
    assert (chosen.imitation_steps, chosen.rl_updates, chosen.demos) == (50, 18, 20)
    assert with_budgets(robust, ["recipe", "imitation_steps"]) == chosen
    asked = QuickstartConfig(recipe="tabletop-robust", rl_updates=16)  # the default, but asked for
    assert with_budgets(asked, ["recipe", "rl_updates"]).rl_updates == 16
    assert imitation(robust).model.backbone == imitation(plain).model.backbone == "small"
    other = QuickstartConfig(recipe="tabletop-robust", backbone="tiny-goals")
    assert imitation(other).model.backbone == "tiny-goals"
    assert imitation(other).model.bridge == imitation(robust).model.bridge
    # A backbone that points at nothing is read with its raw tokens.
    assert not imitation(plain).model.bridge.raw and imitation(plain).query_noise
    assert imitation(QuickstartConfig(backbone="smollm2-135m")).model.bridge.raw
    for pointing in (True, False):  # a folder of `vla pretrain`, and one of a backbone that does not point
        (tmp_path / "bascule.json").write_text(json.dumps({} if pointing else {"pointing": False}))
        assert imitation(QuickstartConfig(backbone=str(tmp_path))).model.bridge.raw is not pointing
    assert imitation(other).max_text_tokens > imitation(plain).max_text_tokens


def test_demonstrations_and_rl_are_randomised_alike(tmp_path):
    robust, plain = QuickstartConfig(recipe="tabletop-robust"), QuickstartConfig()
    perturb = training_perturbation(robust)
    assert perturb.draws == "train" and perturb.plain == 0.3 and perturb.on("instruction") and perturb.on("light")
    assert all(perturb.range_of(axis)[0] == 0.0 for axis in ("camera", "texture", "distractors", "layout"))
    assert RL_RECIPES[rl_recipe(robust)]().randomise == RECIPES["tabletop-robust"].randomise == ("robust",)
    assert training_perturbation(plain) is None and RL_RECIPES[rl_recipe(plain)]().randomise == ()
    assert RL_RECIPES["tabletop-robust"]().guide is not None
    names = [stage.name for stage in job._stages(robust, tmp_path, None)]
    assert names[-2:] == ["evaluate perturbed", "serve"]
    assert "evaluate perturbed" not in [stage.name for stage in job._stages(plain, tmp_path, None)]


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


def test_perturbed_cells_become_controls(policy, tmp_path):  # noqa: F811
    shutil.copytree(policy, tmp_path / "rl" / "best")
    config = QuickstartConfig(workers=1)
    first = load_suite(config.suite).eval_seed0
    for _ in range(2):  # a stage that is run again measures again
        found = perturbed.judge_perturbed(config, tmp_path, ("light=0.5", "texture=1"), range(first, first + 2))
        controls = found.parts["controls"]
        assert list(controls) == ["perturbed: light=0.5", "perturbed: texture=1"]
        assert all(row["episodes"] == 2 and row["successes"] == 0 for row in controls.values())
    row = json.loads((tmp_path / "robustness" / "texture-1.json").read_text())
    assert (row["axis"], row["severity"], len(row["outcomes"])) == ("texture", 1.0, 2)
