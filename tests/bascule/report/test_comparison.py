"""`vla report compare` on files that `vla eval` wrote: what is paired, what is refused, and what it says."""

import json

import numpy as np
import pytest

from bascule.main import main
from bascule.report.comparison import compare, load

N = 10


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with evaluations of three agents in the same scenes."""
    folder = tmp_path_factory.mktemp("runs")
    for agent in ("expert", "blind", "zero"):
        words = ["eval", agent, "--suite", "tabletop-mixed", "--episodes", str(N), "--num-envs", "5", "--workers", "1"]
        assert main([*words, "--json", str(folder / f"{agent}.json")]) == 0
    return folder


def changed(runs, folder, *, agent="expert", name="other.json", solved=None, **fields):
    """A copy of an evaluation with other fields; `solved` (episodes,) says which episodes succeeded."""
    data = json.loads((runs / f"{agent}.json").read_text()) | fields
    if solved is not None:
        data["by_seed"] |= {"outcome": ["success" if one else "out of time" for one in solved]}
        data |= {"successes": int(np.sum(solved)), "episodes": len(solved)}
    (folder / name).write_text(json.dumps(data))
    return folder / name


def test_the_expert_is_better_than_a_blind_replay(runs, tmp_path, capsys):
    out = tmp_path / "comparison.json"
    assert (
        main(["report", "compare", str(runs / "blind.json"), f"sees={runs / 'expert.json'}", "--json", str(out)]) == 0
    )
    result = json.loads(out.read_text())
    blind, expert = load(runs / "blind.json"), load(runs / "expert.json")
    pairs = [(blind.solved[seed], expert.solved[seed]) for seed in blind.scenes]
    (one,) = result["comparisons"]
    assert [one[name] for name in ("both", "only_baseline", "only_arm", "neither")] == [
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    ]
    assert one["only_arm"] >= 7 and one["only_baseline"] == 0
    assert one["mcnemar_p"] == 2 / 2 ** one["only_arm"]
    assert one["difference"] == pytest.approx(one["only_arm"] / N) and one["interval95"][0] > 0
    assert one["sentence"].startswith(f"sees is better than blind: +{100 * one['difference']:.1f} points, 95% CI [")
    assert result["arms"]["sees"]["wilson95"] == expert.data["wilson95"]
    tasks = expert.data["per_task"]
    assert {task: part["arm"] for task, part in one["per_task"].items()} == {
        task: [part["successes"], part["episodes"]] for task, part in tasks.items()
    }
    said = capsys.readouterr()
    assert one["sentence"] in said.out and f"{one['only_arm']} : 0" in said.out
    assert "number of actions executed of a chunk" in said.err, "the expert decides at every step"


def test_what_fails_alike_is_no_difference(runs, capsys):
    assert main(["report", "compare", str(runs / "zero.json"), f"again={runs / 'zero.json'}"]) == 2
    assert "is given twice: it would count as two policies" in capsys.readouterr().err
    result = compare({"zero": [runs / "zero.json"], "blind": [runs / "blind.json"], "expert": [runs / "expert.json"]})
    blind, expert = result["comparisons"]
    assert blind["sentence"].startswith("No difference found between blind and zero: +")
    assert expert["mcnemar_p_holm"] == pytest.approx(2 * expert["mcnemar_p"]), "two comparisons, this the smaller p"


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"suite": "tabletop-pick"}, "another suite, tabletop-pick instead of tabletop-mixed"),
        ({"phrasings": "heldout"}, "another --phrasings, heldout instead of train"),
        ({"perturb": {"light": 0.5, "camera": 0.0, "draws": "test"}}, "another --perturb, light=0.5 instead of none"),
        ({"initial_states": "fresh placements"}, "another source of initial states, fresh placements instead of none"),
    ],
)
def test_other_scenes_are_refused(runs, tmp_path, capsys, fields, said):
    other = changed(runs, tmp_path, **fields)
    assert main(["report", "compare", str(runs / "blind.json"), str(other)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"vla: error: {other} cannot be paired with {runs / 'blind.json'}: {said}"


def test_other_seeds_and_other_tasks_are_refused(runs, tmp_path):
    columns = json.loads((runs / "expert.json").read_text())["by_seed"]
    moved = changed(runs, tmp_path, by_seed=columns | {"seed": [seed + 1000 for seed in columns["seed"]]})
    with pytest.raises(ValueError, match="other seeds, 5001000 to 5001009 instead of 5000000 to 5000009"):
        compare({"a": [runs / "blind.json"], "b": [moved]})
    task = columns["task"][3]
    renamed = changed(runs, tmp_path, by_seed=columns | {"task": columns["task"][:3] + ["dance"] + columns["task"][4:]})
    with pytest.raises(ValueError, match=f"seed 5000003 is another scene, 'dance' instead of '{task}'"):
        compare({"a": [runs / "blind.json"], "b": [renamed]})


def test_files_that_do_not_tell_are_refused(runs, tmp_path, capsys):
    old = json.loads((runs / "expert.json").read_text())
    del old["by_seed"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    (tmp_path / "bench.json").write_text('{"bench": "sim", "results": []}')
    damaged = changed(runs, tmp_path, name="damaged.json", successes=1)
    files = [tmp_path / "old.json", tmp_path / "bench.json", damaged, tmp_path / "none.json"]
    for file in files:
        assert main(["report", "compare", str(runs / "blind.json"), str(file)]) == 2
    assert main(["report", "compare", str(runs / "blind.json")]) == 2
    assert main(["report", "compare"]) == 2
    assert main(["report", "results", "--json", str(tmp_path / "x.json")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    words = ("run `vla eval --json` again", "no result of `vla eval --json`", "is damaged", "there is no file")
    assert len(lines) == 7 and all(word in line for word, line in zip(words, lines, strict=False))
    assert lines[4] == lines[5] == "vla: error: a comparison needs two arms or more: ARM=FILE ARM=FILE"


def test_scenes_of_one_file_only_are_left_out(runs, tmp_path):
    columns = json.loads((runs / "blind.json").read_text())["by_seed"]
    few = {name: column[:6] for name, column in columns.items()}
    short = changed(runs, tmp_path, agent="blind", by_seed=few, solved=[True, False, True, True, False, False])
    result = compare({"expert": [runs / "expert.json"], "blind": [short]})
    assert result["scenes"] == 6 and result["left_out"] == {str(runs / "expert.json"): 4}
    assert any("compared are the 6 scenes that all files have" in warning for warning in result["warnings"])
    assert result["arms"]["blind"]["successes"] == 3


def test_other_settings_are_told(runs, tmp_path):
    other = changed(runs, tmp_path, mujoco="3.3.2", horizon=7)
    told = compare({"a": [runs / "expert.json"], "b": [other]})["warnings"]
    assert [word in warning for word, warning in zip(("MuJoCo version", "horizon"), told, strict=True)] == [True, True]
    blinded = changed(runs, tmp_path, cameras="wrist=none")
    (told,) = compare({"a": [runs / "expert.json"], "b": [blinded]})["warnings"]
    assert "another --cameras" in told and "wrist=none instead of none" in told


def test_training_seeds_widen_the_interval(runs, tmp_path, capsys):
    rng = np.random.default_rng(0)
    scenes = np.arange(N)
    files = {"weak": [], "strong": []}
    for seed, (weak, strong) in enumerate([(2, 9), (3, 8), (1, 10)]):
        for arm, k in (("weak", weak), ("strong", strong)):
            solved = np.isin(scenes, rng.permutation(N)[:k])
            files[arm].append(changed(runs, tmp_path, name=f"{arm}{seed}.json", solved=solved))
    words = [f"{arm}={file}" for arm, group in files.items() for file in group]
    assert main(["report", "compare", *words]) == 0
    said = capsys.readouterr().out
    assert "2/10 3/10 1/10" in said and "strong is better than weak: +70.0 points, 95% CI [" in said
    result = compare(files)
    (one,) = result["comparisons"]
    assert "mcnemar_p" not in one and "bootstrap" in one["method"]
    low, high = one["interval95"]
    assert 0.3 < low < 0.6 < 0.8 < high <= 1.0
    assert compare(files) == result, "the resamples are the same every time"
    mixed = compare({"weak": files["weak"][:1], "strong": files["strong"]})
    assert any("weak has one training seed" in warning for warning in mixed["warnings"])


def test_equal_seeds_are_no_proof_of_equality(runs, tmp_path):
    files = {
        arm: [changed(runs, tmp_path, name=f"{arm}{k}.json", solved=[True] * N, policy=f"{arm}{k}") for k in range(3)]
        for arm in ("a", "b")
    }
    (one,) = compare(files)["comparisons"]
    assert one["interval95"][0] < -0.2 and one["interval95"][1] > 0.2, "ten scenes show no more"


def test_many_tasks_have_an_interquartile_mean(runs, tmp_path):
    columns = json.loads((runs / "expert.json").read_text())["by_seed"]
    columns |= {"task": [f"task {k // 2}" for k in range(N)]}  # five tasks of two scenes
    before = [False, False, False, False, False, False, True, True, True, True]
    after = [False, False, True, False, True, True, True, True, True, True]
    files = {
        arm: [changed(runs, tmp_path, name=f"{arm}.json", by_seed=columns, solved=solved)]
        for arm, solved in (("before", before), ("after", after))
    }
    result = compare(files)
    assert result["arms"]["before"]["iqm"] == pytest.approx((0 + 0 + 1) / 3)
    assert result["arms"]["after"]["iqm"] == pytest.approx((0.5 + 1 + 1) / 3)
    (one,) = result["comparisons"]
    assert one["iqm_difference"] == pytest.approx(0.5)
    assert one["per_task"]["task 2"]["baseline"] == [0, 2] and one["per_task"]["task 2"]["arm"] == [2, 2]


def test_an_evaluation_can_stop_early(tmp_path, capsys):
    words = ["eval", "expert", "--suite", "tabletop-pick", "--episodes", "9", "--num-envs", "3", "--workers", "1"]
    out = tmp_path / "eval.json"
    assert main([*words, "--until-width", "50", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["episodes"] == len(result["by_seed"]["seed"]) == 4, "four of four: 51 to 100%"
    assert result["until_width"] == 0.5 and result["phrasings"] == "train"
    assert main([*words[:5], "2", *words[6:], "--until-width", "10"]) == 0
    assert "points wide: raise --episodes" in capsys.readouterr().err
    for flags in (["--until-width", "0"], ["--until-width", "10", "--robustness", "--out", str(tmp_path / "r")]):
        assert main([*words, *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0] == "vla: error: --until-width must be at least 0.1, got 0.0"
    assert "--until-width is not for `vla eval --robustness`" in lines[1]


def test_one_policy_is_not_counted_as_two_training_seeds(runs, tmp_path, capsys):
    """A file manager's copy of a result lay among the files of an arm, and its episodes counted twice."""
    copy = changed(runs, tmp_path, agent="zero", name="zero (copy).json")
    words = ["report", "compare", f"a={runs / 'zero.json'}", f"a={copy}", f"b={runs / 'expert.json'}"]
    assert main(words) == 2
    line = f"vla: error: {copy} is a copy of {runs / 'zero.json'}: it would count as two policies\n"
    assert capsys.readouterr().err == line
    one = changed(runs, tmp_path, agent="zero", name="one.json", weights="12ab")
    two = changed(runs, tmp_path, agent="zero", name="two.json", weights="12ab", commit="another")
    assert main(["report", "compare", f"a={one}", f"a={two}", f"b={runs / 'expert.json'}"]) == 2
    assert f"{two} and {one} are of the same weights" in capsys.readouterr().err
    other = changed(runs, tmp_path, agent="zero", name="other.json", weights="34cd")
    assert main(["report", "compare", f"a={one}", f"a={other}", f"b={runs / 'expert.json'}"]) == 0


def test_a_suite_file_that_was_edited_is_not_the_same_scenes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (
        'description = "plates"\nscene = "counter"\ntasks = ["plate"]\nobjects_per_episode = {}\n'
        "plates_per_episode = 1\nhorizon = 5\neval_seed0 = 5_000_000\n"
    )
    words = ["eval", "zero", "--suite", "k.toml", "--episodes", "2", "--num-envs", "2", "--workers", "1", "--json"]
    for file, objects in (("a.json", 2), ("again.json", 2), ("b.json", 3)):
        (tmp_path / "k.toml").write_text(text.format(objects).replace('plates"', f'plates, {file}"'))
        assert main([*words, file]) == 0
    assert main(["report", "compare", "a.json", "again.json"]) == 0, "its description may change"
    capsys.readouterr()
    assert main(["report", "compare", "a.json", "b.json"]) == 2
    line = "vla: error: b.json cannot be paired with a.json: k.toml described other scenes when it was played\n"
    assert capsys.readouterr().err == line
