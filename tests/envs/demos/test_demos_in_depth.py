"""Depth and calibration in demonstrations: read back as they were seen, by us and by the stock LeRobotDataset."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from envs.demos.record import record
from policies.open_loop import open_loop
from tests.vla.data.odd_recordings import edited
from vla.checking.check import check_dataset
from vla.core.types import PolicySpec
from vla.data.lerobot_dataset import load_dataset

sys.path.insert(0, str(Path(__file__).parent))  # spawned workers inherit it, and import the toy world by name
import toy_demo_world as toy  # noqa: E402

SIZE, EPISODES = 16, 3


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("depth") / "toy"
    return record("toy", EPISODES, out, num_workers=1, image_size=SIZE, make_world=toy.depth_world, depth=True)


def seen(data):
    """The toy world's depth, intrinsics and extrinsics of every frame, by camera."""
    frames = []
    for seed in data.episodes:
        world = toy.SeenInDepth(SIZE)
        world.reset(seed)
        for count in range(toy.length(seed)):
            world.count = count
            frames.append(world.geometry())
    return {camera: [np.stack(part) for part in zip(*(f[camera] for f in frames), strict=True)] for camera in frames[0]}


def test_it_is_read_as_it_was_seen(recorded):
    data = load_dataset(recorded, depth=True)
    obs = data.observation(slice(None))
    for camera, (depth, inner, outer) in seen(data).items():
        measured = np.isfinite(depth) & (depth > 0)
        assert np.abs(obs.depth[camera] - depth)[measured].max() <= 0.000501  # whole millimetres
        assert (obs.depth[camera][~measured] == 0).all() and not measured.all()
        np.testing.assert_array_equal(obs.intrinsics[camera], inner)
        np.testing.assert_array_equal(obs.extrinsics[camera], outer)
    last = data.subset([2]).observation([0])
    first = int(np.flatnonzero(data.episode_index == 2)[0])
    np.testing.assert_array_equal(last.depth["wrist"][0], obs.depth["wrist"][first])
    np.testing.assert_array_equal(last.extrinsics["wrist"][0], obs.extrinsics["wrist"][first])


def test_half_the_size_keeps_the_rays(recorded):
    full, half = (load_dataset(recorded, depth=True, image_size=size).observation([4]) for size in (SIZE, SIZE // 2))
    for camera in toy.CAMERAS:
        np.testing.assert_array_equal(half.depth[camera], full.depth[camera][:, 1::2, 1::2])
        np.testing.assert_allclose(half.intrinsics[camera][:, :2], full.intrinsics[camera][:, :2] / 2)


def test_nobody_who_does_not_ask_reads_it(recorded):
    data = load_dataset(recorded)
    assert data.geometry == {} and set(data.images) == set(toy.CAMERAS)
    assert data.observation([0]).depth is data.observation([0]).extrinsics is None
    findings = {finding.code: finding.severity for finding in check_dataset(recorded).findings}
    assert findings.get("depth_left_out") == "note"


def test_stock_lerobot_reads_it_in_millimetres(recorded, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import lerobot.datasets

    stock = lerobot.datasets.LeRobotDataset("local/toy", root=recorded)
    assert set(stock.meta.depth_keys) == {f"observation.images.{camera}_depth" for camera in toy.CAMERAS}
    ours = load_dataset(recorded, depth=True)
    item = stock[5]
    for camera in toy.CAMERAS:
        depth = item[f"observation.images.{camera}_depth"].numpy().squeeze()
        np.testing.assert_array_equal(depth, ours.geometry[camera].depth_mm[5])
        matrix = item[f"observation.extrinsics.{camera}"].numpy().reshape(4, 4)
        np.testing.assert_array_equal(matrix, ours.geometry[camera].extrinsics[5])
        stats = stock.meta.stats[f"observation.images.{camera}_depth"]
        every = ours.geometry[camera].depth_mm.astype(float)
        for name in ("mean", "std", "min", "max"):
            assert float(np.ravel(stats[name])[0]) == pytest.approx(getattr(every, name)(), rel=1e-6)


def test_a_depth_video_of_the_stock_recorder_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import lerobot.datasets

    side, names = 64, ["height", "width", "channels"]
    key = "observation.images.top"
    features = {
        key: {"dtype": "video", "shape": (side, side, 3), "names": names},
        f"{key}_depth": {
            "dtype": "video", "shape": (side, side, 1), "names": names, "info": {"is_depth_map": True},
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "observation.intrinsics.top": {"dtype": "float32", "shape": (9,), "names": [f"k{i}" for i in range(9)]},
        "observation.extrinsics.top": {"dtype": "float32", "shape": (16,), "names": [f"e{i}" for i in range(16)]},
    }  # fmt: skip
    recorder = lerobot.datasets.LeRobotDataset.create("local/x", fps=10, root=tmp_path / "x", features=features)
    rng, maps = np.random.default_rng(0), []
    for _ in range(2):
        for _ in range(4):
            ramp = np.add.outer(40 * np.arange(side), 15 * np.arange(side)) + 150 * len(maps) + 300
            maps.append(ramp.astype(np.uint16)[..., None])  # noise is what the codec itself does not keep
            maps[-1][0, 0] = 0  # not measured
            frame = {key: rng.integers(0, 256, (side, side, 3), np.uint8), f"{key}_depth": maps[-1], "task": "go"}
            frame |= {name: rng.normal(size=2).astype(np.float32) for name in ("observation.state", "action")}
            frame["observation.intrinsics.top"] = np.eye(3, dtype=np.float32).ravel()
            frame["observation.extrinsics.top"] = np.eye(4, dtype=np.float32).ravel()
            recorder.add_frame(frame)
        recorder.save_episode()
    recorder.finalize()
    read = load_dataset(tmp_path / "x", depth=True).geometry["top"].depth_mm
    true = np.stack(maps)[..., 0].astype(float)
    step = 1000 * (np.log(13.5) - np.log(3.51)) / 4095 * (true / 1000 + 3.5)  # mm from one code to the next
    assert (read[true == 0] == 0).all() and (np.abs(read - true) < 0.5 * step + 0.51)[true > 0].all()
    stock = lerobot.datasets.LeRobotDataset("local/x", root=tmp_path / "x")[5][f"{key}_depth"].numpy().squeeze()
    assert np.abs(stock - read[5])[true[5] > 0].max() <= 1
    half = load_dataset(tmp_path / "x", depth=True, image_size=32).geometry["top"]
    np.testing.assert_array_equal(half.depth_mm, read[:, 1::2, 1::2])
    assert half.intrinsics[0, 0, 0] == 0.5
    _check_looks_into(tmp_path, monkeypatch)


def _check_looks_into(tmp_path, monkeypatch):
    """`vla check` looks into the depth video of the recording at x, and says what is wrong with it."""

    def told(root):
        found = [finding for finding in check_dataset(root).findings if finding.code.startswith("depth_")]
        return {finding.code: finding.text for finding in found if finding.severity == "warning"}

    assert told(tmp_path / "x") == {}

    def encoding(features):
        features["observation.images.top_depth"]["info"]["video.depth_max"] = -1

    odd = edited(tmp_path / "x", tmp_path, encoding)
    assert "its depth goes from 0.01 to -1 m" in told(odd)["depth_missing"]
    with pytest.raises(ValueError, match=r"says in its info in meta/info.json that .* to -1 m .*: correct it"):
        load_dataset(odd, depth=True)
    small = edited(
        tmp_path / "x", tmp_path / "b", lambda f: f["observation.images.top_depth"].update(shape=[32, 64, 1])
    )
    assert "pictures of 64x64 pixels and depth of 32x64" in told(small)["depth_shape"]
    monkeypatch.setattr("vla.checking.cameras.measured", lambda maps: np.zeros(len(maps), bool))
    assert "of 8 frames looked at" in told(tmp_path / "x")["depth_missing"]
    monkeypatch.setattr("vla.data.camera_geometry._BITS", 13)
    assert "a video of 12 bits a pixel, which holds pictures" in told(tmp_path / "x")["depth_missing"]


def test_depth_of_two_sizes_or_more_than_the_memory_is_one_line(recorded, tmp_path, monkeypatch):
    def small(cell):
        picture = io.BytesIO()
        Image.fromarray(np.full((SIZE // 2, SIZE), 700, np.uint16)).save(picture, "PNG")
        return {"bytes": picture.getvalue(), "path": None}

    folder = written(recorded, tmp_path / "two", "observation.images.front_depth", from_row(5, small))
    with pytest.raises(
        ValueError, match=r"mixes depth maps of 16x16 and 8x16 pixels, the second at episode 1, frame 1"
    ):
        load_dataset(folder, depth=True)
    monkeypatch.setattr("vla.data.camera_geometry.free_memory", lambda: 1 << 20)
    load_dataset(recorded, depth=True)  # little is always tried
    many = edited(recorded, tmp_path, lambda f: f["observation.images.front_depth"].update(shape=[40_000, 40_000, 1]))
    with pytest.raises(ValueError, match="GiB of memory, 0.0 are free: give a smaller --image-size or fewer --cameras"):
        load_dataset(many, depth=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("observation.extrinsics.front"), "no feature 'observation.extrinsics.front'.*vla demos"),
        (lambda f: f.pop("observation.images.front_depth"), "no feature 'observation.images.front_depth'"),
        (lambda f: f["observation.images.front_depth"].pop("info"), "not marked as a depth map: set is_depth_map"),
        (lambda f: f["observation.images.front_depth"]["info"].pop("depth_unit"), "does not say its depth_unit"),
        (lambda f: f["observation.intrinsics.wrist"].update(shape=[4]), "has 4 components, 9 are needed"),
    ],
)
def test_what_is_missing_is_named(recorded, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(edited(recorded, tmp_path, change), ["front", "wrist"], depth=True)


def written(recorded, folder, key, change):
    """A copy whose column `key` is changed: a function of its values in order, one for each frame."""
    shutil.copytree(recorded, folder)
    for path in sorted((folder / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        column = pa.array(change(table.column(key).to_pylist()), table.column(key).type)
        pq.write_table(table.set_column(table.column_names.index(key), key, column), path)
    return folder


def from_row(row, value):
    return lambda values: [value(v) if i >= row else v for i, v in enumerate(values)]


def dark(cell):
    picture = io.BytesIO()
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint16)).save(picture, "PNG")
    return {"bytes": picture.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("key", "change", "code", "message"),
    [
        ("images.front_depth", from_row(0, dark), "depth_missing", "depth_unit right"),
        ("extrinsics.front", from_row(6, lambda v: [0.0] * 16), "calibration", "episode 1, frame 2 are no pose: the"),
        (
            "extrinsics.wrist", from_row(0, lambda v: [1000 * x if i in (3, 7, 11) else x for i, x in enumerate(v)]),
            "calibration", "episode 0, frame 0 put the camera .* must be in metres",
        ),
        ("intrinsics.wrist", from_row(4, lambda v: [0.0] * 9), "calibration", "episode 1, frame 0 have no focal"),
    ],
)  # fmt: skip
def test_depth_and_calibration_that_cannot_be_true_are_refused_and_found(
    recorded, tmp_path, key, change, code, message
):
    camera = key.split(".")[1].removesuffix("_depth")
    folder = written(recorded, tmp_path / "x", f"observation.{key}", change)
    with pytest.raises(ValueError, match=rf"feature 'observation\.{key}'.*{message}.*leave the camera out"):
        load_dataset(folder, depth=True)
    assert load_dataset(folder).geometry == {}, "nobody who does not ask is troubled"
    found = [finding for finding in check_dataset(folder).findings if finding.code == code]
    assert [finding.cameras for finding in found] == [(camera,)] and found[0].severity == "warning"


def test_frames_without_a_measurement_and_lenses_of_another_size_are_told(recorded, tmp_path):
    def told(folder, code):
        return [line for line in load_dataset(folder, depth=True).noticed if line.code == code]

    assert not told(recorded, "depth_missing")
    folder = written(recorded, tmp_path / "a", "observation.images.wrist_depth", from_row(5, dark))
    (said,) = told(folder, "depth_missing")
    count = sum(map(toy.length, range(EPISODES)))
    assert f"camera 'wrist' measures no depth between 0.01 and 10 m in any pixel of {count - 5} of {count}" in said.text
    centred = from_row(0, lambda v: [20, 0, SIZE / 2, 0, 21, SIZE / 2, 0, 0, 1])
    folder = written(recorded, tmp_path / "b", "observation.intrinsics.front", centred)
    assert [finding.cameras for finding in told(folder, "intrinsics_off")] == [("wrist",)]  # the toy's point is at 0
    found = [finding for finding in check_dataset(folder).findings if finding.code == "intrinsics_off"]
    assert [finding.cameras for finding in found] == [("wrist",)]


def test_a_recording_with_depth_is_not_continued_without(recorded):
    with pytest.raises(ValueError, match="depth True, not None"):
        record("toy", EPISODES, recorded, num_workers=1, image_size=SIZE, make_world=toy.depth_world)


def test_a_policy_that_reads_depth_is_compared_with_a_recording_that_has_some(recorded, tmp_path):
    data, asked = load_dataset(recorded, depth=True), []

    class Sees:
        spec = PolicySpec(data.action_spec, 4, 2, cameras=("front",), depth=True, routes=True)

        def reset(self, env_ids=None):
            pass

        def act(self, obs, *, prefix=None):
            assert obs.batch_size == 1, "a choice is made at the first frame and kept"
            (row,) = np.flatnonzero((data.proprio == obs.proprio).all(1))
            known = data.geometry["front"].take([row])
            np.testing.assert_array_equal(obs.depth["front"], known.depth_mm.astype(np.float32) / 1000)
            np.testing.assert_array_equal(obs.extrinsics["front"], known.extrinsics)
            asked.append(row)
            return np.zeros((1, 4, data.action.shape[1]), np.float32)

    found = open_loop(Sees(), "sees", check_dataset(recorded, pictures=0), [1], say=print)
    assert found.predicted[1].shape == (toy.length(1), data.action.shape[1]) and len(asked) > 2
    colours = edited(recorded, tmp_path, lambda f: f.pop("observation.images.front_depth"))
    with pytest.raises(ValueError, match="no feature 'observation.images.front_depth'"):
        open_loop(Sees(), "sees", check_dataset(colours, pictures=0), [1], say=print)


def test_extrinsics_of_the_wrong_way_round_are_told_before_training_and_by_check(recorded, tmp_path):
    """Where two cameras look at one wall, and one has the inverse of its pose."""
    frames = load_dataset(recorded).num_frames
    cameras, lens = toy.CAMERAS[:2], np.array([SIZE, 0, SIZE / 2, 0, SIZE, SIZE / 2, 0, 0, 1], np.float32)
    turn, away = np.diag([1.0, -1.0, -1.0, 1.0]), np.diag([-1.0, 1.0, -1.0, 1.0])
    turn[:3, 3], away[:3, 3] = [0.5, 0.4, 1.0], [0.6, 0.5, 1.0]

    def measured(table, poses):
        wall = io.BytesIO()
        Image.fromarray(np.full((SIZE, SIZE), 1000, np.uint16)).save(wall, "png")
        cells = [{"bytes": wall.getvalue(), "path": None}] * len(table)
        for camera, pose in zip(cameras, poses, strict=True):
            for key, column in (
                (f"observation.images.{camera}_depth", cells),
                (f"observation.intrinsics.{camera}", [lens.tolist()] * len(table)),
                (f"observation.extrinsics.{camera}", [pose.ravel().astype(np.float32).tolist()] * len(table)),
            ):
                place = table.column_names.index(key)
                table = table.set_column(place, key, pa.array(column, table.schema.field(key).type))
        return table

    for name, poses in (("right", (turn, away)), ("wrong", (np.linalg.inv(turn), away))):
        root = tmp_path / name
        shutil.copytree(recorded, root)
        for path in (root / "data").rglob("*.parquet"):
            pq.write_table(measured(pq.read_table(path), poses), path)
        warned = [line for line in load_dataset(root, depth=True).warnings() if "place what they see apart" in line]
        told = [f for f in check_dataset(root).findings if "place what they see apart" in f.text]
        assert len(load_dataset(root, depth=True).geometry[cameras[0]].depth_mm) == frames
        if name == "right":
            assert warned == told == []
        else:
            assert [f.cameras for f in told] == [(cameras[0],)] and told[0].severity == "warning"
            assert told[0].code == "calibration" and len(warned) == 1
