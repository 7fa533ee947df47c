"""Numbers and paths that no command can use: one line that names the flag, before any work."""

import pytest

from bascule.main import main
from tests.bascule.test_cli import assert_user_error

CHECKPOINT = "runs/policy"


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["eval", "expert", "--episodes", "0"], "--episodes 0"),
        (["eval", "expert", "--episodes", "-3"], "--episodes -3"),
        (["eval", "expert", "--episodes", "1000000000000"], "--episodes 1000000000000"),
        (["eval", "expert", "--num-envs", "0"], "--num-envs 0"),
        (["eval", "expert", "--workers", "0"], "--workers 0"),
        (["eval", "expert", "--seed0", "-1"], "--seed0 -1"),
        (["eval", "expert", "--until-width", "200"], "--until-width must be at most 99.9, got 200"),
        (["eval", "expert", "--json", "."], "--json . is a folder"),
        (["eval", "expert", "--json", "a-file/out.json"], "a-file is a file"),
        (["eval", "expert", "--perturb", "camra=1"], "did you mean 'camera'"),
        (["eval", "expert", "--perturb", "camera=nan"], "camera"),
        (["eval", "expert", "--embodiment", "x"], "--embodiment x"),
        (["demos", "tabletop-pick", "--episodes", "0"], "--episodes 0"),
        (["demos", "tabletop-pick", "--workers", "-1"], "--workers -1"),
        (["demos", "tabletop-pick", "--noise", "nan"], "--noise nan"),
        (["demos", "tabletop-pick", "--seed", "-1"], "--seed -1"),
        (["ground-data", "--scenes", "0"], "--scenes 0"),
        (["ground-data", "--workers", "0"], "--workers 0"),
        (["view", "tabletop-pick", "--scenes", "0"], "--scenes 0"),
        (["view", "tabletop-pick", "--image-size", "0"], "--image-size 0"),
        (["view", "tabletop-pick", "--workers", "0"], "--workers 0"),
        (["bench", "serve", "--clients", "0", "--seconds", "1"], "--clients 0"),
        (["bench", "serve", "--clients", "1", "--seconds", "0"], "--seconds 0"),
        (["bench", "sim", "--backend", "warp", "--worlds", "0"], "--worlds 0"),
        (["bench", "sim", "--json", "."], "--json . is a folder"),
        (["experiment", "ablation", "--episodes", "0"], "--episodes 0"),
        (["experiment", "ablation", "--demos", "0"], "--demos 0"),
        (["experiment", "ablation", "--seeds", "-1"], "--seeds -1"),
        (["experiment", "ablation", "--suite", "tabletop-pikc"], "did you mean 'tabletop-pick'"),
        (["experiment", "rl", "--control-steps", "0"], "--control-steps 0"),
        (["experiment", "latency", "--policy", "no/such"], "no/such"),
        (
            ["experiment", "robustness", "--policy", "expert", "--conditions", "high"],
            "severities from 0 to 1, got high",
        ),
        (["experiment", "robustness", "--policy", "expret"], "did you mean 'expert'"),
        (["serve", CHECKPOINT, "--port", "70000"], "--port 70000"),
        (["serve", CHECKPOINT, "--max-batch", "0"], "--max-batch 0"),
        (["serve", CHECKPOINT, "--n-action-steps", "0"], "--n-action-steps 0"),
        (["export", CHECKPOINT, "--out", "out", "--observations", "0"], "--observations 0"),
        (["export", CHECKPOINT, "--out", "out", "--n-action-steps", "0"], "--n-action-steps 0"),
        (["control", CHECKPOINT, "--hz", "0"], "--hz 0"),
        (["control", CHECKPOINT, "--duration-s", "nan"], "--duration-s nan"),
        (["control", CHECKPOINT, "--in-flight", "0"], "--in-flight 0"),
        (["control", CHECKPOINT, "--blend-steps", "-1"], "--blend-steps -1"),
        (["control", CHECKPOINT, "--json", "."], "--json . is a folder"),
        (["rl", "smoke", "--init", CHECKPOINT, "--minutes", "0"], "--minutes 0"),
        (["rl", "smoke", "--init", CHECKPOINT, "--updates", "0"], "--updates 0"),
        (["rl", "smoke", "--init", CHECKPOINT, "--num-envs", "-4"], "--num-envs -4"),
        (["rl", "smoke", "--init", CHECKPOINT, "--horizon", "0"], "--horizon 0"),
        (["rl", "smoke", "--init", CHECKPOINT, "--late-steps", "-1"], "--late-steps -1"),
        (["rl", "smoke", "--init", CHECKPOINT, "--retain", "tabletop-pikc"], "did you mean 'tabletop-pick'"),
        (["rl", "smoke", "--init", CHECKPOINT, "--curriculum", "fronteer"], "did you mean 'frontier'"),
        (["rl", "smoke", "--init", CHECKPOINT, "--demos", CHECKPOINT], "--demos runs/policy is not a folder of"),
        (["rl", "smoke", "--init", CHECKPOINT, "--perturb", "camra=1"], "did you mean 'camera'"),
        (["rl", "smoke", "--init", CHECKPOINT, "--track", "wandbb"], "unknown tracker 'wandbb'; did you mean 'wandb'"),
        (["rl", "smoke", "--init", CHECKPOINT, "--out", CHECKPOINT], "runs/policy already holds a policy: choose"),
        (["rl", "smoke", "--init", "a-run"], "a-run is the folder of a run: its policy is a-run/best"),
        (["eval", "a-run"], "a-run is the folder of a run: its policy is a-run/best"),
        (["train", "--dataset", "x", "--seed", "99999999999999999999"], "--seed 99999999999999999999"),
        (["train", "--dataset", "x", "--seed", "-1"], "--seed -1"),
        (
            ["train", "--dataset", "x", "--backbone", "./none"],
            "there is no folder ./none: give the folder of a backbone",
        ),
        (["train", "--dataset", "x", "--tune", "full", "--keep-features"], "keep_features is for a frozen backbone"),
        (["train", "--dataset", "x", "--randomise", "light", "--keep-features"], "leave out --keep-features, or"),
        (["train", "--dataset", "x", "--out", "a-run"], "a-run already holds a run of `vla rl`: choose another folder"),
        (["train", "--dataset", "x", "--out", "a-quickstart"], "a-quickstart already holds a quickstart: choose"),
        (["eval", "a-dataset"], "`vla train --dataset a-dataset`"),
        (["serve", "a-backbone"], "`vla train --backbone a-backbone`"),
        (["eval", "a-file"], "a-file is a file"),
        (["eval", "from-lerobot"], "`vla lerobot from-lerobot OUT`"),
        (["rl", "smoke", "--init", "an-export"], "an-export is a folder of `vla export`"),
        (["export", "an-export", "--out", "out"], "an-export is a folder of `vla export`"),
        (["rl", "smoke", "--init", CHECKPOINT, "--retain-episodes", "5"], "--retain-episodes changes nothing without"),
        (
            ["rl", "smoke", "--init", CHECKPOINT, "--curriculum", "frontier"],
            "draws among tasks, and suite tabletop-pick",
        ),
        (["rl", "smoke", "--init", CHECKPOINT, "--randomise", "plain=0.5"], "plain=0.5 is a share of nothing"),
        (
            ["rl", "smoke", "--init", CHECKPOINT, "--backend", "warp", "--workers", "5"],
            "--workers changes nothing with",
        ),
        (["eval", "expert", "--backend", "warp", "--workers", "5"], "--workers changes nothing with --backend warp"),
        (["view", "tabletop-pick", "--animation", "a.webp", "--out", "o"], "--out changes nothing beside --animation"),
        (["view", "tabletop-pick", "--no-films", "--policy", "zero"], "--policy changes nothing beside --no-films"),
        (
            ["rl", "reset-free", "--init", "p", "--demos", "d", "--undo", "into-tray"],
            "--undo must undo --forward, and both are 'into-tray'",
        ),
        (["experiment", "latency", "--policy", "an-export"], "an-export is a folder of `vla export`"),
        (["experiment", "xyz", "--cameras", "wrist"], "--cameras must have front"),
        (["report", "add", "x", "a-file", "--check"], "--check changes nothing of `report add`"),
        (["experiment", "peers", "--arms", "ours-rl", "--conditions", "steps"], "ours-rl learns within seconds alone"),
        (
            ["experiment", "peers", "--arms", "ours", "--conditions", "steps", "--seconds", "9"],
            "--seconds changes nothing",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_no_command_begins_with_what_it_cannot_use(words, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path, text in {
        f"{CHECKPOINT}/config.json": '{"checkpoint": {"format": 1, "files": {}}}',
        "an-export/config.json": '{"checkpoint": {"format": 1, "files": {}}, "export": {}}',
        "from-lerobot/config.json": '{"type": "bascule"}',
        "a-dataset/meta/info.json": "{}",
        "a-backbone/bascule.json": "{}",
        "a-file": "",
        "a-run/last/config.json": '{"checkpoint": {"format": 1, "files": {}}}',
        "a-run/best/config.json": '{"checkpoint": {"format": 1, "files": {}}}',
        "a-quickstart/quickstart.json": "{}",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr("vla.core.subprocesses.mp.get_context", lambda *_: pytest.fail("a process was started"))
    named = flag.split() if flag.startswith("--") and flag.count(" ") == 1 else [flag]  # --flag ..., got value
    assert_user_error(main(words), capsys.readouterr().err, *named)
