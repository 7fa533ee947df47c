"""Recordings that are odd in their tables, names and pictures: the right values, or one line that says what to do."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bascule.main import main
from tests.vla.data.odd_recordings import KEY, SIZE, brightness, png, shown, train_arguments, write_dataset, write_video
from vla.data.lerobot_dataset import load_dataset, load_datasets
from vla.runtime.console import say

GREY = np.full((SIZE, SIZE), 100, np.uint8)


@pytest.fixture(params=[False, True], ids=["memory", "streamed"])
def lazy(request):
    return request.param


def refused(root, message, **options):
    with pytest.raises(ValueError, match=message) as problem:
        data = load_dataset(root, **options)
        data.images["front"][np.arange(data.num_frames)]
    assert "\n" not in str(problem.value)


def test_ordinary_recordings_warn_of_nothing(tmp_path):
    assert load_dataset(write_dataset(tmp_path)).warnings() == []


@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_a_motion_lost_in_32_bits_is_told(tmp_path, kind):
    """An absolute encoder, or seconds since 1970: all frames become the same number."""
    state = (1000 * np.random.default_rng(0).normal(size=(11, 2))).astype(kind)
    state[:, 1] += 2**40
    (warning,) = load_dataset(write_dataset(tmp_path, state=state)).warnings()
    assert "component 'observation.state_1' changes by" in warning and "subtract a constant" in warning


def test_episodes_of_one_frame_are_read_without_a_word_from_numpy(tmp_path, recwarn):
    assert load_dataset(write_dataset(tmp_path, (1, 1, 1))).warnings() == [] and not recwarn.list


# --- names ---


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"delta_x": 0, "delta_y": 1, "gripper": 2}, "delta_x delta_y gripper"),
        ({"gripper": 2, "delta_x": 0, "delta_y": 1}, "delta_x delta_y gripper"),
        ({"motors": ["waist", "elbow", "gripper"]}, "waist elbow gripper"),
        ({"axes": ["x", "y", "z"]}, "x y z"),
        ({"motors": {"waist": 0, "gripper": 2, "elbow": 1}}, "waist elbow gripper"),
        ({"arm": ["waist", "elbow"], "hand": ["gripper"]}, "waist elbow gripper"),
        ({"left": ["gripper"], "right": ["gripper", "waist"]}, "left.gripper right.gripper right.waist"),
        ({"left": {"gripper": 0}, "right": {"waist": 1, "gripper": 0}}, "left.gripper right.gripper right.waist"),
        ([["waist", "elbow", "gripper"]], "waist elbow gripper"),
        (["waist", "elbow", "gripper"], "waist elbow gripper"),
        (None, "action_0 action_1 action_2"),
    ],
)
def test_components_are_named_in_every_shape_that_datasets_have(tmp_path, names, found):
    data = load_dataset(write_dataset(tmp_path, names=names))
    assert data.action_names == tuple(found.split()) and data.warnings() == []


@pytest.mark.parametrize(
    "names", [["dx", "dy"], {"dx": 0, "dy": 1}, {"motors": list("abcd")}, {"a": 0, "b": 0, "c": 1}]
)
def test_names_of_another_number_are_not_used_and_told(tmp_path, names):
    data = load_dataset(write_dataset(tmp_path, names=names))
    assert data.action_names == ("action_0", "action_1", "action_2")
    assert re.search(r"feature 'action' has 3 components but [024] names in meta/info\.json", data.warnings()[0])


@pytest.mark.parametrize("names", [["", "", ""], ["a", " ", "c"]])
def test_components_without_a_name_are_numbered_and_told(tmp_path, names):
    data = load_dataset(write_dataset(tmp_path, names=names))
    assert data.action_names == ("action_0", "action_1", "action_2")
    assert data.warnings() == [
        "feature 'action' has components without a name in meta/info.json: its names are not used"
    ]


def test_a_line_break_in_a_name_breaks_no_line(tmp_path, capsys):
    data = load_dataset(write_dataset(tmp_path, names=["a\nb", "c", "d"]))
    say(data.summary("x")[1])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_component_named_twice_is_told(tmp_path):
    data = load_dataset(write_dataset(tmp_path, names=["a", "a", "b"]))
    assert data.warnings() == ["feature 'action' names a component twice: a, a, b"]


# --- pictures ---


def test_sixteen_bit_depth_is_refused_with_the_remedy(tmp_path, lazy):
    depth = np.full((SIZE, SIZE), 1500, np.uint16)
    root = write_dataset(tmp_path, cell=lambda row: {"bytes": png(depth), "path": None})
    message = rf"'{KEY}' holds a picture at episode 0, frame 0 of more than 8 bits .*--cameras.*is_depth_map"
    refused(root, message, lazy=lazy)


@pytest.mark.parametrize("mark", [{"info": {"is_depth_map": True}}, {"video_info": {"video.is_depth_map": True}}])
def test_a_marked_depth_map_is_no_camera(tmp_path, mark):
    def add(features):
        features["observation.images.depth"] = {"dtype": "image", "shape": [SIZE, SIZE, 1], "names": None} | mark

    root = write_dataset(tmp_path, features=add)
    assert list(load_dataset(root).images) == ["front"]
    refused(root, r"'depth' is a depth map, policies read colour cameras; it has: front$", cameras=["depth"])


def test_a_sixteen_bit_grey_video_is_refused(tmp_path, lazy):
    root = write_dataset(tmp_path, kind="video")
    path = root / "videos" / KEY / "chunk-000" / "file-000.mkv"
    write_video(path, np.arange(11) / 10, codec="ffv1", pixels="gray16le")
    path.rename(path.with_suffix(".mp4"))
    refused(root, r"holds frames in file-000\.mp4 of more than 8 bits", lazy=lazy)


@pytest.mark.parametrize("picture", [GREY, np.dstack([GREY] * 3), np.dstack([GREY] * 4), np.dstack([GREY, GREY])])
def test_eight_bit_pictures_of_any_mode_become_rgb(tmp_path, lazy, picture):
    root = write_dataset(tmp_path, cell=lambda row: {"bytes": png(picture), "path": None})
    pixels = load_dataset(root, lazy=lazy).images["front"][np.arange(11)]
    assert pixels.shape == (11, SIZE, SIZE, 3) and (pixels == 100).all()


def test_two_resolutions_and_the_option_that_mends_them(tmp_path, lazy, capsys):
    def cell(row):
        size = SIZE if row < 6 else 2 * SIZE
        return {"bytes": png(np.full((size, size, 3), brightness(row), np.uint8)), "path": None}

    root = write_dataset(tmp_path / "data", cell=cell)
    message = r"mixes images of \(16, 16\) and \(32, 32\): read all at one size \((vla train --image-size 96)\)"
    with pytest.raises(ValueError, match=message) as problem:
        load_dataset(root, lazy=lazy).images["front"][np.arange(11)]
    if not lazy:
        option = re.search(message, str(problem.value))[1].split()[2:]
        arguments = train_arguments(tmp_path / "out", root)
        assert main(arguments) == 2 and "--image-size" in capsys.readouterr().err
        assert main([*arguments, *option]) == 0
    assert shown(load_dataset(root, image_size=16, lazy=lazy).images["front"][np.arange(11)]) == list(range(11))


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
def test_a_frame_without_a_picture(tmp_path, lazy, cell):
    plain = {"bytes": png(np.dstack([GREY] * 3)), "path": None}
    root = write_dataset(tmp_path, cell=lambda row: cell if row == 7 else plain)
    refused(root, r"no picture at episode 1, frame 1: choose .*--cameras.*lerobot-edit-dataset", lazy=lazy)


@pytest.mark.parametrize("size", [0, -3, 8.5])
def test_image_sizes_that_are_none(tmp_path, size):
    message = f"image_size must be a whole number of pixels, at least 1, got {size}"
    refused(write_dataset(tmp_path), message, image_size=size)


# --- tables ---


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint8", "float64"])
def test_numbers_of_any_kind_are_actions(tmp_path, dtype):
    action = (np.random.default_rng(0).uniform(0, 3, (11, 3)) > 1).astype(dtype)
    root = write_dataset(tmp_path, action=action, features=lambda about: about["action"].update(dtype=dtype))
    data = load_dataset(root)
    assert data.action.dtype == np.float32
    np.testing.assert_array_equal(data.action, action.astype(np.float32))


def change(name, edit):
    def data(columns):
        columns[name] = edit(list(columns[name]))

    return {"data": data}


def swap(values, a, b):
    values[a], values[b] = values[b], values[a]
    return values


def put(values, at, value):
    values[at] = value
    return values


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (change("index", lambda v: put(v, 7, v[6])), r"episode 1, frame 1 both have the index 6: number"),
        (change("frame_index", lambda v: swap(v, 2, 3)), r"episode 0, frame 2 follows episode 0, frame 3 in data/"),
        (change("frame_index", lambda v: put(v, 3, 2)), r"episode 0, frame 2 follows episode 0, frame 2 in data/"),
        (change("episode_index", lambda v: put(v, 3, 1)), r"the frames of episode 0 are not together"),
        (change("episode_index", lambda v: put(v, 3, None)), r"column 'episode_index' of data/ has no value in row 3"),
        (change("task_index", lambda v: put(v, 3, None)), r"column 'task_index' of data/ has no value in row 3"),
        (change("task_index", lambda v: put(v, 3, 5)), r"no task string for task_index 5"),
        (change("task_index", lambda v: ["a"] * len(v)), r"column 'task_index' of data/ must hold numbers"),
        (change("task_index", lambda v: [0.5] * len(v)), r"numbers without a fraction \(int64\), it holds double"),
        (change("timestamp", lambda v: put(v, 8, np.nan)), r"the timestamp of episode 1, frame 2 is nan"),
        (change("action", lambda v: put(v, 8, None)), r"feature 'action' has no value at episode 1, frame 2"),
        (change("action", lambda v: [["a", "b", "c"]] * len(v)), r"feature 'action' must be a vector of numbers"),
        ({"data": lambda c: c.pop("frame_index")}, r"feature 'frame_index' is in meta/info\.json but not in data/"),
        ({"data": lambda c: c.pop("action")}, r"feature 'action' is in meta/info\.json but not in data/"),
        ({"features": lambda f: f["action"].update(shape=[4])}, r"'action' should have 4 components but has 3 at"),
        ({"features": lambda f: f["action"].update(shape=[])}, r"'action' must be a vector of numbers, .* shape \(\)"),
        ({"features": lambda f: f["action"].pop("shape")}, r"'action' must have a shape of positive whole .*None"),
        ({"features": lambda f: f["action"].update(shape=[3.0])}, r"'action' must have a shape of positive whole num"),
        ({"features": lambda f: f[KEY].update(shape=["a"])}, r"front' must have a shape of positive whole numbers"),
        ({"features": lambda f: f["action"].pop("dtype")}, r"must give feature 'action' a dtype"),
        ({"features": lambda f: f.update(front=f[KEY])}, r"features '.*front' and 'front' are both camera 'front'"),
        ({"cell": lambda row: [[1, 2], [3, 4]]}, r"holds a list at episode 0, frame 0, pictures must be encoded"),
        ({"kind": "video", "episodes": lambda e: [row.update({f"videos/{KEY}/from_timestamp": "a"}) for row in e]},
         r"does not say where .* of episode 0 is: .* start 'a'"),
        ({"features": lambda f: f["action"].update(dtype="string")}, r"'action' must be a vector of numbers, it is"),
        ({"features": lambda f: f.pop("action")}, r"has no feature 'action'; it has: observation\.images"),
        ({"tasks": (" ",)}, r"no task string for task_index 0"),
    ],
)  # fmt: skip
def test_tables_with_holes_and_disorder(tmp_path, odd, message):
    refused(write_dataset(tmp_path, **odd), message)


@pytest.mark.parametrize("name", ["index", "frame_index", "episode_index"])
def test_unsigned_bookkeeping_is_put_in_order_alike(tmp_path, lazy, name):
    """Differences of unsigned numbers are never negative: shuffled rows looked sorted."""
    order = np.random.default_rng(0).permutation(11)

    def data(columns):
        for key, values in columns.items():
            columns[key] = [values[i] for i in order]
        columns[name] = np.array(columns[name], np.uint32)

    root = write_dataset(tmp_path, data=data)
    assert shown(load_dataset(root, lazy=lazy).images["front"][np.arange(11)]) == list(range(11))


@pytest.mark.parametrize(
    "as_cell", [lambda file: str(file.name), lambda file: file.read_bytes(), lambda file: {"path": file.name}]
)
def test_a_picture_that_is_only_bytes_or_only_a_path(tmp_path, lazy, as_cell):
    file = tmp_path / "one.png"
    file.write_bytes(png(np.dstack([GREY] * 3)))
    root = write_dataset(tmp_path, cell=lambda row: as_cell(file))
    assert (load_dataset(root, lazy=lazy).images["front"][np.arange(11)] == 100).all()


def test_files_of_different_types(tmp_path):
    root = write_dataset(tmp_path)
    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    words = table.slice(6).set_column(table.column_names.index("action"), "action", pa.array([["a"] * 3] * 5))
    pq.write_table(table.slice(0, 6), path)
    pq.write_table(words, path.with_name("file-001.parquet"))
    refused(root, r"the files in data/ have columns of different types: .*action")


def test_a_null_in_a_vector_of_fixed_size(tmp_path):
    def data(columns):
        rows = [list(map(float, row)) for row in columns["action"]]
        columns["action"] = pa.array(put(rows, 4, None), pa.list_(pa.float32(), 3))

    refused(write_dataset(tmp_path, data=data), r"feature 'action' has no value at episode 0, frame 4")


def test_bookkeeping_stored_as_lists_of_one(tmp_path):
    root = write_dataset(tmp_path, data=lambda c: c.update({"index": [[int(i)] for i in c["index"]]}))
    assert load_dataset(root).episodes == [0, 1]


@pytest.mark.parametrize("fps", [0, -3, "30", None])
def test_a_rate_that_is_none(tmp_path, fps):
    root = write_dataset(tmp_path)
    path = root / "meta" / "info.json"
    path.write_text(
        re.sub(r'"fps": 10', f'"fps": {"null" if fps is None else repr(fps)}'.replace("'", '"'), path.read_text())
    )
    refused(root, rf"fps as a positive number, it says {re.escape(repr(fps))}")


def test_a_number_of_frames_that_is_not_given_and_the_mark_of_an_editor(tmp_path):
    root = write_dataset(tmp_path)
    path = root / "meta" / "info.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert load_dataset(root).episodes == [0, 1]
    path.write_text(path.read_text(encoding="utf-8-sig").replace("total_frames", "frames"))
    refused(root, "does not give total_frames, the number of frames in data/: add it")


def test_frames_missing_inside_an_episode_are_told(tmp_path):
    data = load_dataset(write_dataset(tmp_path, **change("frame_index", lambda v: [i + 2 * (i > 3) for i in v])))
    assert re.search(
        r"episode 0, frame 6 follows frame 3: the frames between are missing, .*\(2 in all\)", data.warnings()[0]
    )


@pytest.mark.parametrize("rate", [9, 12])
def test_a_recorded_rate_other_than_the_declared_one_is_told(tmp_path, rate):
    frame = np.concatenate([np.arange(6), np.arange(5)])
    (note,) = load_dataset(write_dataset(tmp_path, stamps=frame / rate)).warnings()
    assert f"recorded at {rate} Hz, meta/info.json declares 10 Hz" in note


@pytest.mark.parametrize(
    ("stamps", "message"),
    [
        ([0, 0.1, 0.2, 0.3, 30.4, 30.5], r"30\.1 s pass before episode 0, frame 4, .* split the episode \(1 in all\)"),
        ([0, 0.1, 0.05, 0.3, 0.4, 0.5], r"timestamp of episode 0, frame 2 \(0\.05 s\) is not after .* \(1 in all\)"),
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0], r"timestamp of episode 0, frame 1 \(0\.4 s\) is not after .* \(5 in all\)"),
        ([0, 0, 0, 0, 0, 0], r"frame 1 \(0 s\) is not after that of the frame before it \(0 s\)"),
    ],
)
def test_time_that_jumps_or_runs_backwards_is_told(tmp_path, stamps, message):
    (note,) = load_dataset(write_dataset(tmp_path, lengths=(6,), stamps=stamps)).warnings()
    assert re.search(message, note) and "\n" not in note


def test_a_task_index_with_two_texts_is_refused(tmp_path):
    root = write_dataset(tmp_path)
    pq.write_table(pa.table({"task_index": [0, 0], "task": ["push", "pull"]}), root / "meta" / "tasks.parquet")
    refused(root, "two task strings for task_index 0, 'push' and 'pull': number them apart")


def test_actions_and_cameras_that_never_change_are_told(tmp_path, lazy):
    black = png(np.zeros((SIZE, SIZE, 3), np.uint8))
    same = png(np.arange(SIZE * SIZE * 3).reshape(SIZE, SIZE, 3).astype(np.uint8))
    for name, picture, words in (("black", black, "one colour"), ("frozen", same, "the same picture")):
        root = write_dataset(tmp_path / name, cell=lambda row, picture=picture: {"bytes": picture, "path": None})
        (note,) = load_dataset(root, lazy=lazy).warnings()
        assert note.startswith(f"camera 'front' shows {words} in all of 11 frames looked at")
    (note,) = load_dataset(write_dataset(tmp_path / "still", action=np.ones((11, 3), np.float32))).warnings()
    assert note == "feature 'action' is the same in all 11 frames: there is nothing to imitate"
    (note,) = load_dataset(write_dataset(tmp_path / "blind", state=np.ones((11, 4), np.float32))).warnings()
    assert note.startswith("feature 'observation.state' is the same in all 11 frames, in which actions differ")


def test_several_folders_are_read_at_one_size(tmp_path):
    found = load_datasets([write_dataset(tmp_path / name) for name in ("a", "b")], image_size=8)
    assert {data.images["front"].shape for data in found.values()} == {(11, 8, 8, 3)}


# --- files that a Mac put beside the dataset's ---


@pytest.mark.parametrize("kind", ["image", "video"])
def test_files_of_a_copy_from_a_mac_are_ignored_and_named(tmp_path, lazy, kind):
    root = write_dataset(tmp_path, kind=kind)
    plain = load_dataset(root, lazy=lazy)
    for path in list(root.rglob("*.parquet")):
        (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    copied = load_dataset(root, lazy=lazy)
    np.testing.assert_array_equal(copied.action, plain.action)
    np.testing.assert_array_equal(copied.images["front"][np.arange(11)], plain.images["front"][np.arange(11)])
    (note,) = copied.warnings()
    assert note.startswith("data/chunk-000/._file-000.parquet and 1 more: left behind by a copy from a Mac, ignored")


def test_the_aspect_of_the_recorded_pictures_is_known_unless_they_are_read_at_another_size(tmp_path, lazy):
    wide = png(np.zeros((20, 30, 3), np.uint8))

    def shaped(features):
        features["observation.images.front"]["shape"] = [20, 30, 3]

    root = write_dataset(tmp_path, cell=lambda row: {"bytes": wide, "path": None}, features=shaped)
    assert load_dataset(root, lazy=lazy).aspects == {"front": 1.5}
    assert load_dataset(root, lazy=lazy, image_size=16).aspects == {}
