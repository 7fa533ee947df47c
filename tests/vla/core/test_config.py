"""Strict configurations, helpful lookups, atomic JSON, and a package that is light to import."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from vla.core import config as config_module
from vla.core.config import decode, difference, encode, find, load_json, lookup, make, nearest, save_json
from vla.model.config import BridgeConfig, VLAConfig

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rates: tuple[float, ...] = (0.1, 0.2)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    pair: tuple[int, str] = (1, "a")
    mode: Literal["cpu", "warp"] = "cpu"
    limit: float | None = None
    source: str | dict[str, int] = "x"
    out: Path = Path("runs")
    table: dict[str, Inner] = field(default_factory=dict)
    fast: bool = False


def test_round_trip_through_json():
    before = Outer("n", Inner(7, (1.0,)), (3, "b"), "warp", 2.0, {"k": 1}, Path("a/b"), {"t": Inner()}, True)
    assert decode(Outer, json.loads(json.dumps(encode(before)))) == before
    assert decode(VLAConfig, json.loads(json.dumps(encode(VLAConfig(bridge=BridgeConfig(taps=(0, 2))))))) == VLAConfig(
        bridge=BridgeConfig(taps=(0, 2))
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "n", "iner": {}}, "unknown field of Outer 'iner'; did you mean 'inner'"),
        ({"name": "n", "inner": {"widht": 3}}, "unknown field of Outer.inner 'widht'; did you mean 'width'"),
        ({}, "Outer lacks the field 'name'"),
        ({"name": 3}, "Outer.name must be str, got 3"),
        ({"name": "n", "inner": {"width": 2.5}}, "Outer.inner.width must be int, got 2.5"),
        ({"name": "n", "inner": {"width": True}}, "Outer.inner.width must be int, got True"),
        ({"name": "n", "inner": {"rates": [1, "a"]}}, r"Outer.inner.rates\[1\] must be float, got 'a'"),
        ({"name": "n", "pair": [1]}, "Outer.pair must have 2 entries, got 1"),
        ({"name": "n", "mode": "wrap"}, "'wrap'; did you mean 'warp'"),
        ({"name": "n", "limit": "soon"}, "Outer.limit must be float, got 'soon'"),
        ({"name": "n", "source": 3}, "Outer.source must be str or dict"),
        ({"name": "n", "table": {"t": {"with": 1}}}, "did you mean 'width'"),
        ({"name": "n", "fast": 1}, "Outer.fast must be bool, got 1"),
        ([], "Outer must be a table"),
    ],
)
def test_strict(data, message):
    with pytest.raises(ValueError, match=message):
        decode(Outer, data)


def test_lookup_names_the_nearest():
    table = {"tabletop-pick": 1, "metaworld-easy": 2}
    assert lookup("tabletop-pick", table, "suite") == 1
    with pytest.raises(ValueError, match="unknown suite 'tabletop_pik'; did you mean 'tabletop-pick'"):
        lookup("tabletop_pik", table, "suite")
    with pytest.raises(ValueError, match=r"unknown suite 'zzz'; known: metaworld-easy, tabletop-pick$"):
        lookup("zzz", table, "suite")
    assert nearest("TabletopPick", table) == "tabletop-pick" and nearest("qqq", table) is None


def test_json_takes_numpy_and_what_json_cannot_say(tmp_path):
    path = tmp_path / "new" / "report.json"
    save_json(path, {"a": np.float32(0.5), "b": np.arange(3), "c": float("nan"), "d": Inner(), "e": (1, np.int64(2))})
    assert load_json(path) == {"a": 0.5, "b": [0, 1, 2], "c": None, "d": {"width": 4, "rates": [0.1, 0.2]}, "e": [1, 2]}
    assert path.stat().st_mode & 0o044  # not left private


def test_json_writes_are_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    save_json(path, {"version": 1})
    with pytest.raises(TypeError):
        save_json(path, {"version": object()})

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(config_module.os, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        save_json(path, {"version": 2})
    monkeypatch.undo()
    assert load_json(path) == {"version": 1} and os.listdir(tmp_path) == ["report.json"]


def test_unreadable_json_names_the_file(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*nothing.json"):
        load_json(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="bad.json is not valid JSON"):
        load_json(tmp_path / "bad.json")


def test_importing_the_package_is_light():
    code = (
        "import sys; import vla;"
        "heavy = {'torch', 'numpy', 'transformers', 'lerobot'} & set(sys.modules); assert not heavy, heavy;"
        "assert vla.__version__; import vla.core.config; from vla import ActionSpec;"
        "assert 'torch' not in sys.modules; assert all(getattr(vla, name) is not None for name in vla.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_unknown_public_name():
    import vla

    with pytest.raises(AttributeError, match="no attribute 'VLAA'"):
        vla.VLAA  # noqa: B018


def test_an_object_is_found_by_name_or_by_module():
    assert find("a", {"a": 1}, "head") == 1
    assert find("vla.model.heads.registry:L1Head", {}, "head").__name__ == "L1Head"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("l2", "unknown head 'l2'; did you mean 'l1'"),
        ("no_such_module:Head", "there is no module 'no_such_module' on the Python path"),
        ("vla.model.heads.registry:L3Head", "module vla.model.heads.registry has no 'L3Head'"),
    ],
)
def test_an_object_that_is_not_found_is_one_line(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        find(name, {"l1": 1}, "head")


def _breaks(*, width):
    raise KeyError(width)


@pytest.mark.parametrize(
    ("maker", "complaint"),
    [
        (os, r"^head 'a:b' cannot be made \(width given\): TypeError: 'module' object is not callable$"),
        (os.getcwd, r"^head 'a:b' cannot be made \(width given\): TypeError: .*getcwd\(\) takes no"),
        (_breaks, r"^head 'a:b' cannot be made \(width given\): KeyError: 4$"),
        (dict, r"^head 'a:b' makes 'dict', which lacks loss: docs/extend.md says what a head must have$"),
    ],
)
def test_a_part_from_outside_that_cannot_be_made_is_one_line(maker, complaint):
    with pytest.raises(ValueError, match=complaint):
        make("a:b", maker, "head", ("keys", "loss"), width=4)


def test_a_part_is_made_and_a_fault_of_our_own_stays_one():
    assert make("a:b", dict, "head", ("keys",), width=4) == make("l1", dict, "head", width=4) == {"width": 4}
    with pytest.raises(KeyError):
        make("l1", _breaks, "head", width=4)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (1, 2, ("a", 1, 2)),
        ({"b": {"c": 1, "d": 2}, "e": 3}, {"b": {"c": 1, "d": 4}, "e": 5}, ("a.b.d", 2, 4)),
        ({"b": 1}, {"b": 1, "c": None, "d": 2}, ("a.d", None, 2)),
        ({"b": 1, "d": 2}, {"b": 1}, ("a.d", 2, None)),
        ({"b": {}}, {"b": [1]}, ("a.b", {}, [1])),
        ({"b": 1}, None, ("a", {"b": 1}, None)),
    ],
)
def test_the_first_difference_is_found_inside(before, now, told):
    assert difference("a", before, now) == told


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    """`--json /dev/stdout`; run by root, /dev/full became a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    save_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1} and pipe.is_fifo()
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
