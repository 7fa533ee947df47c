"""`vla experiment words`, with a policy that knows the plain colours and lifts the object of the one it hears."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bascule import agents
from bascule.experiments.spoken import Heard, SpokenEnv
from bascule.experiments.unseen import load_unseen
from bascule.experiments.words import WordsConfig, _said, _scene, words
from bascule.main import main
from bascule.report.runs import rows_of
from envs.backends.cpu_worlds import TabletopWorlds
from envs.experts.registry import make_expert
from envs.registry import load_suite
from envs.tabletop.control import action_spec
from envs.tabletop.episode_source import EpisodeSource
from envs.tabletop.goals import Goal, GoalKind
from envs.tabletop.scene import COLORS, SCENES
from vla.core.types import PolicySpec

SUITE = load_suite("tabletop-pick")
SPEC = action_spec(20.0)
SENTENCES = """
common = ["the"]
[color_synonyms]
red = ["crimson"]
green = ["jade"]
blue = ["cobalt"]
yellow = ["canary"]
purple = ["violet"]
[thing_synonyms]
cube = ["die"]
can = ["tin"]
brick = ["slab"]
[color_typos]
red = ["redd"]
green = ["gren"]
blue = ["bleu"]
yellow = ["yelow"]
purple = ["purpel"]
[thing_typos]
cube = ["cueb"]
can = ["cann"]
brick = ["brik"]
[present]
heard = ["the {color} {thing} please", "{color}"]
misheard = ["not the {other_color} one but its neighbour"]
unheard = ["the {color_synonym} {thing_synonym}"]
silent = ["the {thing}"]
[absent]
there_is_another = ["the {other_color} {thing}"]
there_is_none = ["the {absent_color} {thing}", "how are you?"]
"""
PRESENT, ABSENT = 5, 3
CHUNK = 8


class Lifting(EpisodeSource):
    """The suite's episodes, in which the object of a colour is to be lifted."""

    color = None
    """None: the suite's own object."""

    def sample(self, seed, task=None):
        episode = super().sample(seed, task)
        if self.color is None:
            return episode
        slot = episode.slots[episode.colors.index(self.color)]
        return replace(episode, target=slot, goals=(Goal(GoalKind.LIFT, slot),))


@cache
def lifting_worlds(count=1):
    worlds = TabletopWorlds(SUITE, count, source=Lifting)
    worlds.render_images = False
    return worlds


@cache
def actions_for(seed, color):
    """(T, A) actions of the scripted expert that lift the object of this colour in the scene of `seed`."""
    worlds = lifting_worlds()
    worlds.source.color = color
    worlds.reset(seeds=[seed])
    expert, actions = make_expert("tabletop-pick", 1), []
    while not worlds.over[0]:
        chunk = expert.act(worlds.observation())
        actions.append(chunk[0, 0])
        worlds.step_chunk(chunk)
    return np.stack([*actions, actions[-1]])


class Listening:
    """One environment's policy: lifts the object whose colour it hears, and does nothing if there is none."""

    def __init__(self, spec, seeds, confident=True):
        self.spec = PolicySpec(spec, CHUNK, grounding_threshold=0.5 if confident else None)
        self.confident, self.confidence, self.seeds = confident, None, seeds

    def reset(self, env_ids=None):
        self.seeds = self.seeds if env_ids is None else self.seeds[1:]
        self.seed = self.seeds[0]
        self.step, self.actions = 0, None

    def act(self, obs, *, prefix=None):
        if self.actions is None:
            episode = EpisodeSource(SUITE).sample(self.seed)
            color = next((name for name in obs.instruction[0].split() if name in COLORS), None)
            known = color in episode.colors
            self.actions = actions_for(self.seed, color) if known else np.zeros((1, self.spec.action_spec.dim))
            self.sure = 0.9 if known else 0.1
        if self.confident:  # once the arm is there, nothing is in sight any more: the first picture counts
            self.confidence = np.float32([self.sure if self.step == 0 else 0.0])
        rows = np.minimum(np.arange(self.step, self.step + CHUNK), len(self.actions) - 1)
        self.step += CHUNK
        return self.actions[None, rows].astype(np.float32)


@pytest.fixture
def sentences(tmp_path):
    file = tmp_path / "sentences.toml"
    file.write_text(SENTENCES)
    return file


def played(out, sentences, confident):
    config = WordsConfig((Path("policy"),), episodes=PRESENT, num_envs=1, workers=1, sentences=sentences)
    parts = iter(_said(config, load_unseen(sentences)).values())

    def listening(name, env, suite):
        return Listening(SPEC, [heard.seed for heard in next(parts)], confident)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents, "resolve_policy", listening)
        return words(config, out)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The output folder and the result of `words`, by whether the policy has a confidence."""
    found = {}
    for confident in (False, True):
        out = tmp_path_factory.mktemp("words")
        (out / "sentences.toml").write_text(SENTENCES)
        found[confident] = out, played(out, out / "sentences.toml", confident)
    return found


def test_a_sentence_is_said_in_a_scene_where_it_means_one_thing(sentences):
    """Two of picking's four objects are cubes: "the cube" is not said where both stand, nor "the blue cube" where it is
    to be nothing."""
    config = WordsConfig((), episodes=20 * PRESENT, sentences=sentences)
    parts, source = _said(config, load_unseen(sentences)), EpisodeSource(SUITE)
    assert [one.seed for one in parts["plain"]] == list(range(SUITE.eval_seed0, SUITE.eval_seed0 + 20 * PRESENT))
    later = 0
    for part in list(parts.values())[1:]:
        assert len({one.seed for one in part}) == len(part)
        for k, heard in enumerate(part):
            episode = source.sample(heard.seed)
            scene = _scene(episode, SCENES[SUITE.scene].objects)
            kind = scene.kinds[scene.target]
            if heard.sentence == "the {thing}":
                assert scene.kinds.count(kind) == 1
            if heard.group == "there_is_another":
                color = heard.instruction.split()[1]
                assert color in scene.colors and scene.kinds[scene.colors.index(color)] != kind
            later += heard.seed != SUITE.eval_seed0 + k
    assert 0 < later < 20, "mostly scene k itself"


def test_right_wrong_and_no_objects_are_told_apart(results):
    _, result = results[False]
    found = {name: (row["successes"], row["wrong_object"], row["episodes"]) for name, row in result["arms"].items()}
    assert found == {
        "plain": (5, 0, 5),
        "unseen": (2, 1, 5),
        "unseen: heard": (2, 0, 2),
        "unseen: misheard": (0, 1, 1),
        "unseen: unheard": (0, 0, 1),
        "unseen: silent": (0, 0, 1),
        "nothing in sight, left alone": (2, 1, 3),
        "nothing in sight, left alone: there_is_another": (0, 1, 1),
        "nothing in sight, left alone: there_is_none": (2, 0, 2),
    }
    assert result["columns"] == ["wrong_object"]
    unseen = result["arms"]["unseen"]
    assert unseen["wrong_object_rate"] == 0.2
    assert unseen["wrong_object_wilson95"] == pytest.approx([0.0362, 0.6245], abs=1e-4)
    assert result["sentences"]["{color}"]["successes"] == 1 and len(result["sentences"]) == PRESENT + ABSENT


def test_a_confidence_holds_what_is_not_in_sight(results):
    _, result = results[True]
    arms = result["arms"]
    assert {name: arms[name]["held"] for name in ("plain", "unseen", "nothing in sight, left alone")} == {
        "plain": 0, "unseen": 2, "nothing in sight, left alone": 2,
    }  # fmt: skip
    assert arms["unseen, holding"]["successes"] == 2 and arms["unseen: unheard"]["held_rate"] == 1.0
    assert result["columns"] == ["wrong_object", "held"]


def test_episodes_are_kept_and_other_sentences_are_other_results(results, tmp_path):
    folder, first = results[False]
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    file, sentences = out / "policy-unseen.json", out / "sentences.toml"
    kept = json.loads(file.read_text())
    kept["played"][3]["lifted"] = "target"
    file.write_text(json.dumps(kept))
    again = played(out, sentences, confident=False)
    assert again["arms"]["unseen"]["successes"] == first["arms"]["unseen"]["successes"] + 1
    sentences.write_text(SENTENCES.replace("please", "thanks"))
    with pytest.raises(ValueError, match="another --out"):
        played(out, sentences, confident=False)


def test_a_result_becomes_a_claim(results):
    folder, result = results[True]
    counts, figures = rows_of(folder / "result.json", result)
    assert ("unseen", 2, 5) in [(row.arm, row.k, row.n) for row in counts]
    assert ("wrong object", 1, "unseen") in [(row.name, row.value, row.arm) for row in figures]
    assert not [row.name for row in figures if "rate" in row.name]  # a rate is computed when a claim is shown


def test_policies_of_one_name_are_training_seeds(results, tmp_path):
    folder, first = results[True]
    for file in folder.glob("policy-*.json"):  # two seeds, already played: the second lifts the target once more
        row = json.loads(file.read_text())
        row["asked"]["policy"] = "first"
        (tmp_path / file.name).write_text(json.dumps(row))
        row["asked"]["policy"] = "second"
        if file.name == "policy-unseen.json":
            row["played"][3]["lifted"] = "target"
        (tmp_path / file.name.replace("policy-", "policy-1-")).write_text(json.dumps(row))
    config = WordsConfig(
        (Path("policy=first"), Path("policy=second")), episodes=PRESENT, sentences=folder / "sentences.toml"
    )
    both = words(config, tmp_path)
    unseen = both["arms"]["unseen"]
    assert both["seeds"] == [0, 1] and both["columns"][0] == "per_seed"
    assert unseen["per_seed"] == {"0": [2, 5], "1": [3, 5]} and unseen["episodes"] == 10
    assert unseen["held"] == 2 * first["arms"]["unseen"]["held"]
    counts, _ = rows_of(tmp_path / "result.json", both)
    assert [(row.k, row.n, row.seed) for row in counts if row.arm == "unseen"] == [(2, 5, 0), (3, 5, 1)]


def test_spare_environments_leave_no_mark():
    seed = SUITE.eval_seed0
    spoken = SpokenEnv(lifting_worlds(2), [Heard(seed, "", "", "a"), Heard(seed + 1, "", "", "b")])
    assert spoken.reset(seeds=[seed, seed]).instruction == ["a", "a"]
    assert [one and one.seed for one in spoken.playing] == [seed, None]
    assert spoken.reset(seeds=[seed + 1], env_ids=[1]).instruction == ["a", "b"]
    assert [one and one.seed for one in spoken.playing] == [seed, seed + 1]


def test_mistakes_are_one_line(tmp_path, capsys, sentences):
    sentences.write_text(SENTENCES.replace('"{color}"', '"the {color} {thing} please"'))
    with pytest.raises(ValueError, match="sentences.toml: 'the .color. .thing. please' is there twice"):
        words(WordsConfig((tmp_path,), sentences=sentences), tmp_path)
    for wrong, message in (
        ([], "--policy"),
        (["--policy", "expert", "--episodes", "100"], "multiple of 80"),
        (["--policy", "expert", "--suite", "tabletop-ten"], "--suite tabletop-pick"),
        (["--policy", "expert", "--arms", "plain"], "unknown option '--arms'"),
        (["--policy", "exprt"], "exprt"),
    ):
        assert main(["experiment", "words", *wrong, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
