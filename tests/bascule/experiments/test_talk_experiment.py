"""`vla experiment talk`: what it counts, and that its counts are of what they say."""

import json

import numpy as np
import pytest

from bascule.experiments.talk import rollout
from bascule.experiments.talk.config import TalkExperimentConfig
from bascule.experiments.talk.experiment import _most_common, _summed, talk
from bascule.experiments.talk.rollout import Asked, WatchedWorlds
from bascule.main import main
from envs.evaluation.evaluate import evaluate
from envs.experts.registry import make_expert
from envs.grounding.episode_questions import Moment
from envs.registry import load_suite
from envs.sim.render_options import RenderOptions
from vla.core.types import PolicySpec
from vla.language.talking import Said

SCENES = range(5_000_000, 5_000_004)


class Oracle:
    """The expert's hand, and a mouth that says the truth of the instruction, whatever it is asked."""

    spec = PolicySpec(talks=True)

    def __init__(self, worlds):
        self.expert = make_expert("tabletop-pick", worlds.num_envs)
        self.reset, self.act = self.expert.reset, self.expert.act

    def answer(self, obs, questions):
        return [Said(f"the {' '.join(text.split()[-2:])}".replace("block", "cube"), 1.0) for text in obs.instruction]


class Plain:
    """Episodes told in one wording, so that the oracle need not understand any other."""

    def __init__(self, worlds):
        self.worlds, sample = worlds, worlds.source.sample

        def told(seed, task):
            from dataclasses import replace

            episode = sample(seed, task)
            kinds = worlds.scene.objects
            names = {s: f"{c} {kinds[s]}" for s, c in zip(episode.slots, episode.colors, strict=True)}
            other = episode.swapped_goals[0].object if episode.swapped_goals else episode.slots[0]
            return replace(
                episode, instruction=f"lift the {names[episode.target]}", swapped_instruction=f"lift the {names[other]}"
            )

        worlds.source.sample = told


def worlds():
    made = WatchedWorlds(load_suite("tabletop-pick"), 2, render=RenderOptions(16))
    Plain(made)
    return made


def test_the_object_that_the_hand_takes_is_the_one_that_is_noted():
    made = worlds()
    asked = Asked(Oracle(made), made)
    report = evaluate(asked, made, SCENES, suite="tabletop-pick")
    assert report.successes == len(SCENES) and set(made.touched) == set(SCENES)
    assert asked.named == asked.named_as_told == made.touched  # the expert takes what the instruction names
    assert 0 < asked.right < asked.asked  # "which object" is one question of several


def test_told_another_object_the_mouth_and_the_hand_disagree():
    made = worlds()
    asked = Asked(Oracle(made), made)
    evaluate(asked, made, SCENES, suite="tabletop-pick", swap_instruction=True)  # the expert's hand does not listen
    assert asked.named == made.touched and not any(asked.named_as_told[seed] == made.touched[seed] for seed in SCENES)
    assert asked.asked == 0  # nothing that is asked in between would be about what it was told


def test_what_is_held_is_seen_at_every_step():
    made = worlds()
    made.reset(seeds=SCENES[:2])
    slot = made.episodes[1].slots[0]
    made.state.grip[1], made._gripper[1] = made.state.objects[1, slot], -1.0
    assert Moment(made, 1, made.episodes[1]).held == slot and Moment(made, 0, made.episodes[0]).held == -1


def test_counts_are_added_over_seeds_and_the_most_common_answer_is_the_prior():
    rows = [{"seed": 0, "counts": {"a": [1, 2], "b": [3, 3]}}, {"seed": 1, "counts": {"a": [2, 4]}}]
    found = _summed(rows)
    assert (found["a"]["successes"], found["a"]["episodes"]) == (3, 6) and found["b"]["episodes"] == 3
    assert found["a"]["per_seed"] == {"0": [1, 2], "1": [2, 4]}

    class Data:
        asked = [[["done", "?", "no"], ["held", "?", "x"]], [["done", "?", "no"]], [["done", "?", "yes"]]]

    assert _most_common(Data()) == {"done": [2, 3], "held": [1, 1]}


def test_an_unknown_arm_is_refused_before_anything_is_made(tmp_path, capsys):
    assert main(["experiment", "talk", "--arms", "adaptor", "--out", str(tmp_path / "out")]) == 2
    assert "did you mean 'adapter'" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_arm_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "_TIMED", 2)
    config = TalkExperimentConfig(
        arms=("adapter",), seeds=(0,), demos=1, backbone="tiny", steps=2, talk_episodes=4, episodes=2, num_envs=2,
        workers=1,
    )  # fmt: skip
    result = json.loads(json.dumps(talk(config, tmp_path)))
    counted = {name.removeprefix("adapter: "): row for name, row in result["arms"].items()}
    assert counted["success"]["episodes"] == 2
    for kind in ("object", "done", "held", "where", "beside"):
        assert counted[f"answers right, {kind}"]["episodes"] > 0
    assert counted["answers right, wordings not trained on"]["episodes"] > 0
    assert counted["most common answer, done"]["successes"] > 0
    figures = result["figures"]
    timed = ("alone", "talking", "served, another client asks")
    assert {f"adapter: {name} ms p50" for name in timed} <= set(figures)
    assert np.isfinite([value for row in figures.values() for value in row.values()]).all()
