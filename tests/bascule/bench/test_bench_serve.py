"""`vla bench serve` on the real server, in small."""

import pytest

from bascule.main import main
from vla.core.config import load_json


@pytest.mark.slow
def test_a_load_has_no_errors_and_says_what_memory_did(tmp_path):
    out = tmp_path / "load.json"
    assert main(["bench", "serve", "--clients", "3", "--seconds", "3", "--json", str(out)]) == 0
    rows = {row["name"]: row for row in load_json(out)["results"]}
    assert rows["errors"]["value"] == 0 and rows["requests"]["value"] > 1
    assert 0.9 < rows["server memory at the end"]["ratio"] < 1.1


def test_options_of_another_bench_are_refused(capsys):
    assert main(["bench", "sim", "--clients", "3"]) == 2
    assert main(["bench", "serve", "--seconds", "3"]) == 2
    assert "--clients and --seconds go together" in capsys.readouterr().err
