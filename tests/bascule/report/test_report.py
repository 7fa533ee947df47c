"""The report page: complete, self-contained, honest about intervals, safe with any text."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from bascule.report import charts
from bascule.report.page import render, write_report
from vla.runtime.machine import machine
from vla.runtime.provenance import provenance
from vla.runtime.scene_pictures import contact_sheet


def result(successes, episodes, interval, **more):
    return {
        "suite": "tabletop-pick",
        "successes": successes,
        "episodes": episodes,
        "success_rate": successes / episodes,
        "wilson95": list(interval),
        "seeds": [5_000_000, 5_000_000 + episodes - 1],
        **more,
    }


def full_report(caption="pick up the red cube"):
    frames = np.random.default_rng(0).integers(0, 255, (7, 24, 48, 3), dtype=np.uint8)
    return {
        "suite": "tabletop-pick",
        "seed": 3,
        "command": "vla quickstart --seed 3",
        "commit": "abc123",
        "machine": "a laptop",
        "stages": [{"name": "demos", "seconds": 31.0, "episodes": 90}, {"name": "online_rl", "seconds": 212.5}],
        "imitation": result(186, 300, (0.564, 0.673), per_task={"pick": result(186, 300, (0.564, 0.673))}),
        "rl": result(
            291,
            300,
            (0.944, 0.984),
            per_task={"pick": result(291, 300, (0.944, 0.984))},
            controls={"swapped_instruction": result(9, 300, (0.016, 0.056))},
        ),
        "controls": {"zero": result(0, 100, (0.0, 0.037)), "blind": result(2, 100, (0.006, 0.07))},
        "latency_ms": {"p50": 9.7, "p99": 15.4},
        "curves": {
            "imitation_loss": {"step": [0, 100, 200], "loss": [0.5, 0.1, float("nan")]},
            "rl_train": {"control_steps": [1000, 2000], "success_rate": [0.6, 0.8]},
            "rl_eval": {"control_steps": [0, 2000], "success_rate": [0.62, 0.97], "wilson95": [[0.5, 0.7], [0.9, 1.0]]},
        },
        "teacher": {"demonstrations": 20, "successes": 95, "episodes": 96, "control_steps": 36_864},
        "filmstrips": [{"caption": caption, "frames": frames, "success": True, "stage": "rl"}],
    }


class Page(HTMLParser):
    """Collects what a page asks for, and whether its tags are balanced."""

    VOID = {"meta", "img", "line", "rect", "path", "circle", "br"}

    def __init__(self, html):
        super().__init__()
        self.open, self.links, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_no_other_file(tmp_path):
    path = write_report(full_report(), tmp_path / "run")
    html = path.read_text()
    page = Page(html)
    assert page.open == []
    assert page.links and all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|<script|<link|https?://", html)
    text = " ".join(page.text)
    for expected in ("62.0%", "97.0%", "186/300", "291/300", "56.4–67.3%", "Online RL made the policy better."):
        assert expected in text
    assert page.text.count("after online RL") == 4  # headline, chart, the film of stage "rl", breakdown
    for expected in ("swapped instruction", "9/300", "blind replay", "2/100", "zero actions", "pick up the red cube"):
        assert expected in text
    for expected in ("3 min 32 s", "31.0 s", "9.7", "15.4", "vla quickstart --seed 3", "abc123", "a laptop"):
        assert expected in text


def test_perturbed_scenes_are_named_by_their_axis_and_explained_once(tmp_path):
    report = full_report()
    report["controls"] |= {f"perturbed: {cell}": result(47, 48, (0.89, 1.0)) for cell in ("texture=0.5", "light=0.5")}
    text = Page(write_report(report, tmp_path).read_text()).text
    assert "texture 0.5" in text and "light 0.5" in text and "texture 0.5, light 0.5" in text
    assert sum("scenes changed along this axis" in part for part in text) == 1
    assert not any("perturbed: " in part for part in text)


def test_json_keeps_the_names_programs_read_and_no_pictures(tmp_path):
    report = full_report()
    report["imitation"]["success_rate"] = np.float32(0.5)
    write_report(report, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert {"stages", "imitation", "rl", "controls", "latency_ms"} <= found.keys()
    assert found["rl"]["wilson95"] == [0.944, 0.984] and found["imitation"]["success_rate"] == 0.5
    assert found["latency_ms"] == {"p50": 9.7, "p99": 15.4}
    assert found["filmstrips"] == [{"caption": "pick up the red cube", "success": True, "stage": "rl"}]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        (result(291, 300, (0.944, 0.984)), "Online RL made the policy better."),
        (result(198, 300, (0.605, 0.711)), "No clear difference: the intervals overlap."),
        (result(120, 300, (0.346, 0.456)), "Online RL made the policy worse."),
    ],
)
def test_the_headline_claims_no_more_than_the_intervals(after, sentence):
    html = render({**full_report(), "rl": after})
    assert f"<h1>{sentence}</h1>" in html


def test_films_are_real_animations_of_the_frames():
    report = full_report()
    sources = [link for link in Page(render(report)).links]
    images = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    assert [image.n_frames for image in images] == [7, 1, 1, 1, 1, 1, 1]
    last = np.asarray(images[-1].convert("RGB"), dtype=float)
    errors = [np.abs(last - frame).mean() for frame in report["filmstrips"][0]["frames"]]
    assert np.argmin(errors) == 6  # stills run from the first frame to the last


def test_any_text_is_shown_not_run():
    html = render(full_report(caption='<script>alert("x")</script>'))
    assert "<script" not in html and "&lt;script&gt;" in html


def test_the_page_says_what_else_the_policy_learnt_from():
    report = full_report()
    said = "reads the simulator&rsquo;s state and practised for 36,864 control steps (counted above)"
    assert said in render(report) and "95 of 96 training scenes" in render(report)
    del report["teacher"]["control_steps"]
    assert "state and needed no practice" in render(report)
    assert "teacher" not in render(report | {"teacher": None})  # refined by the reward alone


def test_a_run_that_is_not_complete_shows_what_it_has_and_what_it_lacks():
    report = full_report()
    del report["rl"], report["latency_ms"]
    report["stages"] = [
        {"name": "imitation", "seconds": 31.0, "state": "done", "steps": 700},
        {"name": "online RL", "seconds": 2.0, "state": "failed", "reason": "no space <left> on disk"},
        {"name": "serve", "seconds": 0.0, "state": "not run", "reason": "it needs online RL"},
    ]
    html = render(report)
    assert Page(html).open == [] and "62.0%" in html and "The run is not complete." in html
    assert "<b>online RL</b>: no space &lt;left&gt; on disk" in html and "<b>serve</b>: it needs online RL" in html
    assert "--resume" in html and html.count("not run") == 2 and "state done" not in html
    assert "Not complete" not in render(full_report())


@pytest.mark.parametrize("missing", list(full_report()))
def test_every_part_may_be_missing(missing, tmp_path):
    report = full_report()
    del report[missing]
    assert Page(write_report(report, tmp_path).read_text()).open == []


def test_a_failed_write_keeps_the_old_page(tmp_path):
    write_report(full_report(), tmp_path)
    before = (tmp_path / "report.html").read_text()
    broken = {**full_report(), "stages": [{"name": "no seconds"}]}
    with pytest.raises(KeyError):
        write_report(broken, tmp_path)
    assert (tmp_path / "report.html").read_text() == before


def numbers(svg, tag, name):
    root = ET.fromstring(svg)
    return [float(element.get(name)) for element in root.iter(tag)]


def test_bar_lengths_are_proportional_and_whiskers_lie_on_the_axis():
    rows = [charts.Bar("a", 0.25, (0.2, 0.3), "1/4", "before"), charts.Bar("b <i>", 0.75, (0.7, 0.8), "3/4", "after")]
    svg = charts.bars(rows)
    short, long = numbers(svg, "rect", "width")
    assert long == pytest.approx(3 * short, rel=0.01)
    left = numbers(svg, "rect", "x")[0]
    whisker = next(e.get("d") for e in ET.fromstring(svg).iter("path"))
    assert float(whisker[1:].split()[0]) == pytest.approx(left + short * 0.2 / 0.25, rel=0.01)


def test_lines_map_data_to_the_picture():
    one = charts.Series("x", [0, 50, 100], [0.0, 0.5, 1.0], markers=True)
    xs = numbers(svg := charts.lines([one], x_label="steps", y_label="success", percent=True), "circle", "cx")
    ys = numbers(svg, "circle", "cy")
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1]) and xs[0] < xs[1]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2]) and ys[0] > ys[1]  # y grows downwards in SVG
    grid = numbers(svg, "line", "y1")
    assert (ys[0], ys[2]) == (grid[0], grid[-1])  # 0 and 1 lie on the lines labelled 0% and 100%


def test_what_was_not_measured_has_no_whisker():
    series = [charts.Series("a", [0.0, 1.0], [0.5, float("nan")], "plain", [[0.4, 0.6], [0.0, 1.0]], markers=True)]
    assert charts.lines(series, x_label="x", y_label="y", percent=True).count("whisker") == 1


def test_lines_leave_out_what_is_not_a_number():
    one = charts.Series("x", [0, 1, 2], [0.0, float("nan"), 1.0], markers=True)
    assert len(numbers(charts.lines([one], x_label="", y_label="", percent=True), "circle", "cy")) == 2


@pytest.mark.parametrize("ys", [[], [float("nan")], [0.0, -1.0]])
def test_a_log_chart_of_nothing_drawable_is_left_out(ys):
    series = charts.Series("x", list(range(len(ys))), ys)
    assert charts.lines([series], x_label="", y_label="", log_y=True) == ""


@pytest.mark.parametrize("ys", [[0.3], [0.3, 0.3], [1e-9, 5e6]])
@pytest.mark.parametrize("log_y", [False, True])
def test_charts_stand_degenerate_data(ys, log_y):
    svg = charts.lines([charts.Series("x", [0] * len(ys), ys)], x_label="", y_label="", log_y=log_y)
    assert "nan" not in svg and ET.fromstring(svg) is not None


def test_provenance_is_two_short_lines():
    found = provenance()
    assert re.fullmatch(r"unknown|[0-9a-f]{7,40}(\+changes)?", found["commit"])
    assert "cores" in machine() and "\n" not in found["machine"]


def test_contact_sheet_shows_every_scene(tmp_path):
    scenes = np.zeros((5, 40, 40, 3), np.uint8)
    scenes[4] = 255
    contact_sheet([scenes, scenes], [f"scene {i}" for i in range(5)], tmp_path / "sheets" / "s.png")
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "s.png"))
    black = (sheet == 0).all(-1).sum()
    assert 4 * 40 * 80 <= black < 4 * 40 * 80 + 3000  # four black scenes, and the captions' ink
