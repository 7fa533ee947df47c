"""`vla rl`, whole: from a checkpoint through the worlds to a better one, with its books and its retention report."""

import json

import numpy as np

from envs.control import action_spec
from envs.worlds import PROPRIO_NAMES
from vla.cli import main
from vla.model import VLA, VLAConfig
from vla.processor import Stats


def test_the_command_refines_keeps_books_and_reports(tmp_path, capsys):
    """`vla rl smoke` on the real worlds, from an untrained policy."""
    spec = action_spec(20.0)
    rng = np.random.default_rng(0)
    proprio = rng.normal(size=(50, len(PROPRIO_NAMES)))
    stats = Stats.from_arrays(proprio, rng.uniform(spec.low, spec.high, (50, spec.dim)))
    vla = VLA.build(VLAConfig(), stats=stats, action_spec=spec, cameras=("front", "wrist"))
    vla.save(tmp_path / "init")
    out = tmp_path / "rl"
    arguments = ["rl", "smoke", "--init", str(tmp_path / "init"), "--out", str(out), "--workers", "1"]
    extra = ["--curriculum", "vla-rl", "--track", "tensorboard", "--retain", "tabletop-pick", "--retain-episodes", "3"]
    assert main([*arguments, *extra]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and "share/pick" in rows[0]
    assert list((out / "tensorboard").iterdir()) and (out / "best" / "config.json").is_file()
    kept = json.loads((out / "retention.json").read_text())
    assert kept["tasks"][0]["before"]["episodes"] == 3
    assert main(arguments) == 2
    assert "resume it" in capsys.readouterr().err
