"""Datasets written by the stock recorder, read by ours: exact for images, close for video, clear when broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla.data import decoding as frames
from vla.data.lerobot_dataset import DemoSet, load_dataset

SIZE, LENGTHS = 32, (6, 9, 7)
CAMERAS = ("front", "wrist")
EPISODE = np.repeat(np.arange(3), LENGTHS)
STEP = np.concatenate([np.arange(n) for n in LENGTHS])
RNG = np.random.default_rng(0)
STATE = RNG.normal(size=(len(STEP), 5)).astype(np.float32)
ACTION = RNG.normal(size=(len(STEP), 3)).astype(np.float32)


def picture(row, camera):
    """Smooth, and brighter with every row, so that a video keeps it and a frame shift shows."""
    ramp = np.linspace(0, 60, SIZE, dtype=np.float32)
    base = 20.0 + 6 * row
    red, green = np.broadcast_arrays(ramp[None] + base, ramp[:, None] + base)
    image = np.stack([red, green, np.full_like(red, 200 if camera == "wrist" else 30)], axis=-1)
    return image.clip(0, 255).astype(np.uint8)


IMAGES = {camera: np.stack([picture(row, camera) for row in range(len(STEP))]) for camera in CAMERAS}


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    import lerobot.datasets

    return lerobot.datasets


def write_stock(lerobot, root, kind):
    features = {
        f"observation.images.{c}": {"dtype": kind, "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
        for c in CAMERAS
    }
    features["observation.state"] = {"dtype": "float32", "shape": (5,), "names": [f"joint{i}" for i in range(5)]}
    features["action"] = {"dtype": "float32", "shape": (3,), "names": ["dx", "dy", "gripper"]}
    recorder = lerobot.LeRobotDataset.create(
        "local/x", fps=10, root=root, features=features, use_videos=kind == "video"
    )
    for episode in range(3):
        if episode == 2:  # a second session: LeRobot starts new files
            recorder.finalize()
            recorder = lerobot.LeRobotDataset.resume("local/x", root=root)
        for row in np.flatnonzero(episode == EPISODE):
            frame = {f"observation.images.{c}": IMAGES[c][row] for c in CAMERAS}
            frame |= {"observation.state": STATE[row], "action": ACTION[row], "task": f"task {episode % 2}"}
            recorder.add_frame(frame)
        recorder.save_episode()
    recorder.finalize()
    return root


@pytest.fixture(scope="module")
def image_root(lerobot, tmp_path_factory):
    return write_stock(lerobot, tmp_path_factory.mktemp("data") / "images", "image")


@pytest.fixture(scope="module")
def video_root(lerobot, tmp_path_factory):
    return write_stock(lerobot, tmp_path_factory.mktemp("data") / "videos", "video")


@pytest.fixture
def broken(image_root, tmp_path):
    return shutil.copytree(image_root, tmp_path / "broken")


def edit_info(root, change):
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_column(root, key, change):
    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    values = table.column(key).to_pylist()
    change(values)
    at = table.column_names.index(key)
    pq.write_table(table.set_column(at, key, pa.array(values)), path)


def check_numbers(data):
    assert data.num_frames == len(STEP) and data.fps == 10 and data.episodes == [0, 1, 2]
    np.testing.assert_array_equal(data.proprio, STATE)
    np.testing.assert_array_equal(data.action, ACTION)
    np.testing.assert_array_equal(data.episode_index, EPISODE)
    assert data.instruction == [f"task {e % 2}" for e in EPISODE]
    assert data.action_names == ("dx", "dy", "gripper") and data.proprio_names[4] == "joint4"


def test_image_dataset_is_read_exactly(image_root, monkeypatch):
    assert len(list((image_root / "data").glob("*/*.parquet"))) == 2
    monkeypatch.setattr(frames, "_BATCH", 4)  # several tasks per file, some starting inside it
    seen = []
    data = load_dataset(image_root, on_progress=lambda done, total: seen.append((done, total)))
    check_numbers(data)
    assert list(data.images) == list(CAMERAS)
    for camera in CAMERAS:
        np.testing.assert_array_equal(data.images[camera], IMAGES[camera])
    assert seen[-1] == (2 * len(STEP), 2 * len(STEP))


def test_video_dataset_is_read_frame_for_frame(video_root):
    assert len(list((video_root / "videos").rglob("*.mp4"))) == 4
    data = load_dataset(video_root)
    check_numbers(data)
    for camera in CAMERAS:
        error = np.abs(data.images[camera].astype(float) - IMAGES[camera]).mean((1, 2, 3))
        # A shift by one frame would be an error of 4 on average (6 in two of three channels), at every frame.
        assert error.max() < 2.0, error


def test_cameras_are_selected_ordered_and_resized(image_root):
    data = load_dataset(image_root, ["wrist", "observation.images.front"], image_size=8)
    assert list(data.images) == ["wrist", "front"]
    assert data.images["wrist"].shape == (len(STEP), 8, 8, 3)
    block_mean = IMAGES["wrist"].reshape(len(STEP), 8, 4, 8, 4, 3).mean((2, 4))
    assert np.abs(data.images["wrist"] - block_mean).max() < 8


def test_wrong_requests_name_the_feature(image_root):
    with pytest.raises(ValueError, match=r"no camera 'frnt'; did you mean 'front'\? \(it has: front, wrist\)"):
        load_dataset(image_root, ["frnt"])
    with pytest.raises(ValueError, match="feature 'action' has 3 components, 7 are needed: dx, dy, gripper"):
        load_dataset(image_root, action_dim=7)
    with pytest.raises(ValueError, match="feature 'observation.state' has 5 components, 4 are needed"):
        load_dataset(image_root, proprio_dim=4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_numbers_are_located(broken, bad):
    def poison(values):
        values[8][1] = float(bad)

    edit_column(broken, "action", poison)
    with pytest.raises(ValueError, match=r"feature 'action' holds (nan|inf) at episode 1, frame 2 \(component 1\)"):
        load_dataset(broken)


def test_ragged_vectors_are_located(broken):
    edit_column(broken, "observation.state", lambda values: values[3].pop())
    with pytest.raises(
        ValueError, match="'observation.state' should have 5 components but has 4 at episode 0, frame 3"
    ):
        load_dataset(broken)


def test_missing_features_and_tasks(broken):
    tasks = broken / "meta" / "tasks.parquet"
    keep = tasks.read_bytes()
    tasks.unlink()
    with pytest.raises(ValueError, match="no task strings"):
        load_dataset(broken)
    tasks.write_bytes(keep)
    table = pq.read_table(tasks)
    blank = pa.array(["", *table.column("task").to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("task"), "task", blank), tasks)
    with pytest.raises(ValueError, match="no task string for task_index 0"):
        load_dataset(broken)
    edit_info(broken, lambda info: info["features"].pop("observation.state"))
    with pytest.raises(ValueError, match="no feature 'observation.state'; it has: action"):
        load_dataset(broken)


def test_unfinished_datasets_are_recognised(broken, tmp_path):
    path = broken / "data" / "chunk-000" / "file-001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"unfinished: data/chunk-000/file-001\.parquet has no readable footer"):
        load_dataset(broken)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(ValueError, match=r"file-001\.parquet is a pointer of git-lfs.*run `git lfs pull`"):
        load_dataset(broken)
    path.unlink()
    with pytest.raises(ValueError, match="promises 22 frames, data/ holds 15"):
        load_dataset(broken)
    with pytest.raises(ValueError, match="does not exist"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a LeRobotDataset folder"):
        load_dataset(tmp_path)
    edit_info(broken, lambda info: info.update(codebase_version="v2.1"))
    with pytest.raises(ValueError, match=r"v2\.1, not v3"):
        load_dataset(broken)


def test_damaged_pictures_are_located(broken, video_root, tmp_path):
    def damage(values):
        values[7]["bytes"] = b"not a PNG"

    edit_column(broken, "observation.images.wrist", damage)
    with pytest.raises(
        ValueError, match=r"'observation\.images\.wrist' holds an unreadable image at episode 1, frame 1"
    ):
        load_dataset(broken)
    videos = shutil.copytree(video_root, tmp_path / "videos")
    short = videos / "videos" / "observation.images.front" / "chunk-000"
    shutil.copy(short / "file-001.mp4", short / "file-000.mp4")  # 7 frames where 15 should be
    with pytest.raises(ValueError, match=r"'observation\.images\.front' has no video frame for episode 1, frame 1"):
        load_dataset(videos)
    (short / "file-000.mp4").unlink()
    with pytest.raises(ValueError, match=r"'observation\.images\.front' lacks its video file"):
        load_dataset(videos)


def test_too_large_for_memory_is_refused_before_decoding(broken):
    def enlarge(info):
        for camera in CAMERAS:
            info["features"][f"observation.images.{camera}"]["shape"] = [200_000, 200_000, 3]

    edit_info(broken, enlarge)
    with pytest.raises(ValueError, match="GiB of memory.*--stream True.*smaller --image-size"):
        load_dataset(broken)
    assert load_dataset(broken, image_size=8).num_frames == len(STEP)


def test_reading_imports_no_torch_and_no_hub(image_root):
    code = (
        "import sys; from vla.data.lerobot_dataset import load_dataset; load_dataset(sys.argv[1]);"
        "print([m for m in ('torch', 'lerobot', 'datasets', 'huggingface_hub') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(image_root)], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def small_set():
    action = np.arange(7, dtype=np.float32)[:, None] * [1, 10]
    return DemoSet(
        images={"front": np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)},
        proprio=action[:, :1].astype(np.float32),
        action=action.astype(np.float32),
        instruction=list("aaabbcc"),
        episode_index=np.array([4, 4, 4, 6, 6, 9, 9]),
        fps=20.0,
        action_names=("x", "y"),
        proprio_names=("p",),
    )


def test_chunks_stop_at_the_episodes_end():
    chunk, mask = small_set().chunks(3)
    assert chunk.shape == (7, 3, 2) and chunk.dtype == mask.dtype == np.float32
    assert chunk[..., 0].tolist() == [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 4, 4], [4, 4, 4], [5, 6, 6], [6, 6, 6]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="chunk_size"):
        small_set().chunks(0)


def test_subset_keeps_whole_episodes_and_their_numbers():
    data = small_set().subset([9, 4])
    assert data.episodes == [4, 9] and data.instruction == list("aaacc")
    assert data.action[:, 0].tolist() == [0, 1, 2, 5, 6] == data.images["front"][:, 0, 0, 0].tolist()
    assert data.chunks(2)[1].tolist() == [[1, 1], [1, 1], [1, 0], [1, 1], [1, 0]]
    with pytest.raises(ValueError, match="no episode 5"):
        small_set().subset([4, 5])


def test_observation_stats_and_bounds():
    data = small_set()
    obs = data.observation([5, 0])
    assert obs.instruction == ["c", "a"] and obs.images["front"][:, 0, 0, 0].tolist() == [5, 0]
    assert data.observation(slice(2, 4)).proprio.ravel().tolist() == [2, 3]
    assert data.action_spec.names == ("x", "y") and data.action_spec.high == (6.0, 60.0)
    assert data.stats().frames == 7 and data.stats().action.max == (6.0, 60.0)
