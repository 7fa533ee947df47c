"""Recording demonstrations: exact, killed-safe, and readable by the stock LeRobotDataset."""

import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from envs.demos import record as demos
from envs.demos.dataset_writer import DemoEpisode, save_episode
from envs.demos.episode import run_episode
from envs.demos.record import record
from vla.core.config import save_json
from vla.core.disk import DiskFull
from vla.core.paths import SIM_CONFIGS
from vla.data.lerobot_dataset import load_dataset

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)  # spawned workers inherit it, and import the toy world by name
import toy_demo_world as toy  # noqa: E402

SIZE = 16
SEEDS = [0, 1, 2, 4, 5, 6, 7]  # 3 fails


def toy_record(out, episodes=7, *, make_world=toy.fast_world, num_workers=2, **kwargs):
    return record("toy", episodes, out, num_workers=num_workers, image_size=SIZE, make_world=make_world, **kwargs)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return toy_record(tmp_path_factory.mktemp("demos") / "toy")


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    import lerobot.datasets

    return lerobot.datasets


def assert_same_demos(a, b):
    assert a.instruction == b.instruction and a.fps == b.fps
    for name in ("proprio", "action", "episode_index"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for camera in toy.CAMERAS:
        np.testing.assert_array_equal(a.images[camera], b.images[camera])


def test_dataset_holds_what_was_seen_and_the_experts_clean_action(recorded):
    data = load_dataset(recorded)
    assert data.num_frames == sum(toy.length(s) for s in SEEDS) and data.episodes == list(range(len(SEEDS)))
    rows = [(seed, step) for seed in SEEDS for step in range(toy.length(seed))]
    for camera in toy.CAMERAS:
        np.testing.assert_array_equal(data.images[camera], [toy.frame(s, t, camera, SIZE) for s, t in rows])
    np.testing.assert_array_equal(data.proprio, [toy.state(s, t) for s, t in rows])
    np.testing.assert_array_equal(data.privileged, rows)
    second = data.subset([1])
    np.testing.assert_array_equal(second.privileged, data.privileged[data.episode_index == 1])
    np.testing.assert_array_equal(data.action, [np.clip(toy.wish(s, t), toy.SPEC.low, toy.SPEC.high) for s, t in rows])
    assert data.instruction == [f"pick up object {s % 2}" for s, _ in rows]
    assert data.fps == 20 and data.action_names == toy.SPEC.names
    assert not (recorded / "recording").exists()
    assert json.loads((recorded / "meta" / "bascule.json").read_text())["seeds"] == SEEDS


def test_stock_lerobot_reads_the_same(recorded, lerobot):
    stock = lerobot.LeRobotDataset("local/toy", root=recorded, delta_timestamps={"action": [0, 0.05, 0.1]})
    ours = load_dataset(recorded)
    chunk, mask = ours.chunks(3)
    assert len(stock) == ours.num_frames and stock.num_episodes == len(SEEDS)
    assert stock.fps == 20 and stock.meta.robot_type == "panda"
    for i in range(len(stock)):
        item = stock[i]
        for camera in toy.CAMERAS:
            pixels = (item[f"observation.images.{camera}"] * 255).round().byte().permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(pixels, ours.images[camera][i])
        np.testing.assert_array_equal(item["observation.state"].numpy(), ours.proprio[i])
        np.testing.assert_array_equal(item["action"].numpy(), chunk[i])
        np.testing.assert_array_equal(~item["action_is_pad"].numpy(), mask[i].astype(bool))
        assert item["task"] == ours.instruction[i] and int(item["episode_index"]) == ours.episode_index[i]
        assert float(item["timestamp"]) == pytest.approx(int(item["frame_index"]) / 20)


def test_statistics_are_those_of_all_frames(recorded, lerobot):
    stats = lerobot.LeRobotDataset("local/toy", root=recorded).meta.stats
    data = load_dataset(recorded)
    for key, values in (("action", data.action), ("observation.state", data.proprio)):
        np.testing.assert_allclose(stats[key]["mean"], values.mean(0), rtol=1e-5)
        np.testing.assert_allclose(stats[key]["q99"], np.quantile(values.astype(float), 0.99, axis=0), rtol=1e-6)
    for camera in toy.CAMERAS:
        pixels = data.images[camera].reshape(-1, 3) / 255.0
        entry = stats[f"observation.images.{camera}"]
        assert entry["mean"].shape == (3, 1, 1)
        for name, expected in (("mean", pixels.mean(0)), ("std", pixels.std(0)), ("min", pixels.min(0))):
            np.testing.assert_allclose(entry[name].ravel(), expected, atol=1e-9)
        lower = np.quantile(pixels, 0.1, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(entry["q10"].ravel(), lower, atol=1e-9)


def test_stock_lerobot_can_append_to_it(recorded, lerobot, tmp_path):
    copy = shutil.copytree(recorded, tmp_path / "copy")
    stock = lerobot.LeRobotDataset.resume("local/toy", root=copy)
    frame = {f"observation.images.{c}": np.full((SIZE, SIZE, 3), 9, np.uint8) for c in toy.CAMERAS}
    frame |= {"observation.state": np.ones(4, np.float32), "action": np.full(3, 0.25, np.float32), "task": "wave"}
    for _ in range(3):
        stock.add_frame(dict(frame))
    stock.save_episode()
    stock.finalize()
    data = load_dataset(copy)
    assert data.num_frames == load_dataset(recorded).num_frames + 3 and data.episodes[-1] == len(SEEDS)
    assert data.privileged is None, "nobody knows it of the new episode"
    assert data.instruction[-1] == "wave" and (data.images["wrist"][-1] == 9).all() and (data.action[-1] == 0.25).all()


def test_noise_disturbs_what_is_executed_never_what_is_recorded():
    world = toy.ToyWorld(SIZE)
    quiet = run_episode(world, 2, 0.0)
    np.testing.assert_array_equal(world.executed, quiet.action)
    noisy = run_episode(world, 2, 0.2)
    executed = np.array(world.executed)
    np.testing.assert_array_equal(noisy.action, quiet.action)
    np.testing.assert_array_equal(executed[:, 2], quiet.action[:, 2])  # the gripper is never disturbed
    assert (executed[:, :2] != quiet.action[:, :2]).any()
    assert (executed >= toy.SPEC.low).all() and (executed <= toy.SPEC.high).all()
    run_episode(world, 2, 0.2)
    np.testing.assert_array_equal(world.executed, executed)  # the seed decides the noise
    assert run_episode(world, 3, 0.0) is None


def test_killed_recording_keeps_finished_episodes_and_continues(recorded, tmp_path):
    out = tmp_path / "killed"
    code = (
        f"import sys; sys.path.insert(0, {HERE!r}); import toy_demo_world as toy\n"
        "from envs.demos.record import record\n"
        f"record('toy', 7, {str(out)!r}, num_workers=2, image_size={SIZE}, make_world=toy.slow_world)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    folder = out / "recording"
    deadline = time.monotonic() + 30
    while len(list(folder.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        assert child.poll() is None, "the recording ended before it could be killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.5)  # orphaned workers finish the episode they are in, and go
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".parquet", ".failed")}
    assert 3 <= len(before) < 8
    with pytest.raises(ValueError, match="unfinished recording"):
        load_dataset(out)

    with pytest.raises(ValueError, match=r"holds a recording with noise 0\.15, not 0\.3"):
        toy_record(out, noise=0.3)

    ran = []
    kept = {int(name.split(".")[0]) for name in before}
    toy_record(out, num_workers=1, on_progress=ran.append)
    assert len(ran) == 8 - len(kept)  # seeds 0..7, none twice
    assert_same_demos(load_dataset(out), load_dataset(recorded))
    assert json.loads((out / "meta" / "bascule.json").read_text())["seeds"] == SEEDS


def almost_done(out):
    """`out` as a run leaves it that is killed after its last episode."""
    folder = out / "recording"
    folder.mkdir(parents=True)
    world = toy.fast_world("toy", SIZE)
    for seed in range(8):
        episode = run_episode(world, seed, 0.15)
        if episode is None:
            (folder / f"{seed:08d}.failed").touch()
        else:
            save_episode(folder / f"{seed:08d}.parquet", episode)
    save_json(folder / "request.json", demos._Request("toy", 0, 0.15, SIZE))
    save_json(folder / "facts.json", demos._facts(world, SIZE))
    return folder


def test_damaged_episode_file_is_recorded_again(recorded, tmp_path):
    out = tmp_path / "out"
    victim = almost_done(out) / "00000002.parquet"
    victim.write_bytes(victim.read_bytes()[:-20])
    ran = []
    toy_record(out, on_progress=ran.append, num_workers=1)
    assert len(ran) == 1
    assert_same_demos(load_dataset(out), load_dataset(recorded))


def test_dying_between_the_two_moves_loses_nothing(recorded, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace
    almost_done(out)

    def dies_at_meta(source, target):
        if Path(target) == out / "meta":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(demos.os, "replace", dies_at_meta)
    with pytest.raises(KeyboardInterrupt):
        toy_record(out)
    monkeypatch.undo()
    assert (out / "data").exists() and not (out / "meta").exists()
    ran = []
    toy_record(out, on_progress=ran.append)
    assert ran == []
    assert_same_demos(load_dataset(out), load_dataset(recorded))


def test_finished_dataset_is_returned_and_never_overwritten(recorded, tmp_path):
    before = (recorded / "meta" / "info.json").stat().st_mtime_ns
    assert toy_record(recorded, make_world=toy.choosy_world) == recorded  # no world is even made
    for change, message in (
        ({"noise": 0.5}, r"noise 0\.15, not 0\.5"),
        ({"seed0": 7}, "with seed 0, not 7"),
        ({"episodes": 8}, "finished dataset of 7 episodes, not 8"),
    ):
        with pytest.raises(ValueError, match=message):
            toy_record(recorded, **change)
    assert (recorded / "meta" / "info.json").stat().st_mtime_ns == before
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not empty and not a recording"):
        toy_record(tmp_path)
    with pytest.raises(ValueError, match="first seed must be 0 to 999999, got 5000000"):
        toy_record(tmp_path / "x", seed0=5_000_000)


def test_a_recording_of_a_suite_file_is_not_continued_after_the_file_was_edited(tmp_path):
    suite, out = tmp_path / "own.toml", tmp_path / "out"
    text = (SIM_CONFIGS / "suites" / "tabletop-pick.toml").read_text()
    suite.write_text(text)
    begun = partial(record, str(suite), 2, out, num_workers=1, image_size=SIZE, make_world=toy.fast_world)
    begun()
    assert begun() == out
    for was, now in (("objects_per_episode = 3", "objects_per_episode = 2"), ("horizon = 56", "horizon = 50")):
        suite.write_text(text.replace(was, now))
        with pytest.raises(ValueError, match="other scenes than .*own.toml describes now"):
            begun()


def test_worker_failures_are_named_and_keep_what_is_done(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)at seed 4.*the world broke"):
        toy_record(tmp_path / "a", make_world=toy.breaking_world, num_workers=1)
    assert len(list((tmp_path / "a" / "recording").glob("*.parquet"))) == 3
    with pytest.raises(ValueError, match="^unknown suite 'toy'$"):
        toy_record(tmp_path / "b", make_world=toy.choosy_world, num_workers=1)
    with pytest.raises(ValueError, match="succeeded in only 0 of 20.*: lower --noise"):
        toy_record(tmp_path / "c", 30, make_world=toy.hopeless_world, num_workers=1)


def test_a_killed_worker_is_replaced_and_its_episode_begun_again(recorded, tmp_path):
    out, seen = tmp_path / "out", []

    def kill_one(state):
        seen.append(state)
        if len(seen) == 3:  # from outside, wherever it is
            multiprocessing.active_children()[0].kill()

    world = partial(toy.deadly_world, tmp_path / "deaths", 1)
    assert toy_record(out, make_world=world, on_progress=kill_one) == out
    assert seen[-1].replaced in (1, 2) and len(seen) == 8, "the one killed from outside may have been done"
    assert_same_demos(load_dataset(out), load_dataset(recorded))


def test_a_seed_that_kills_every_worker_is_one_line_and_the_rest_can_be_continued(recorded, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ChildProcessError, match="3 recording workers died at seed 4 .*-9.* are kept") as caught:
        toy_record(out, make_world=partial(toy.deadly_world, tmp_path / "deaths", 9), num_workers=1)
    assert "\n" not in str(caught.value) and not multiprocessing.active_children()
    assert len(list((out / "recording").glob("*.parquet"))) == 3
    ran = []
    toy_record(out, num_workers=1, on_progress=ran.append)
    assert len(ran) == 4 and ran[-1].replaced == 0  # seeds 4 to 7
    assert_same_demos(load_dataset(out), load_dataset(recorded))


def test_two_recordings_cannot_share_a_folder(tmp_path):
    with (tmp_path / ".out.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process would
        with pytest.raises(ValueError, match="being written by another run"):
            toy_record(tmp_path / "out")
    assert toy_record(tmp_path / "out").is_dir()


def test_non_finite_values_are_refused(tmp_path):
    proprio = np.zeros((3, 2), np.float32)
    proprio[1, 0] = np.nan
    images = {"front": np.zeros((3, 8, 8, 3), np.uint8)}
    with pytest.raises(ValueError, match=r"seed 5.*observation\.state at frame 1"):
        save_episode(tmp_path / "e.parquet", DemoEpisode(5, "x", images, proprio, np.zeros((3, 1), np.float32)))
    assert not (tmp_path / "e.parquet").exists()


def test_real_suite_records(tmp_path):
    out = record("tabletop-pick", 2, tmp_path / "pick", seed0=40, num_workers=1, image_size=48)
    data = load_dataset(out)
    assert len(data.episodes) == 2 and list(data.images) == ["front", "wrist"]
    assert data.images["front"].shape[1:] == (48, 48, 3) and data.images["front"].std() > 5
    assert data.action_names == ("dx", "dy", "dz", "gripper") and np.abs(data.action).max() <= 1
    ends = np.flatnonzero(np.diff(np.append(data.episode_index, 9)))
    assert (data.action[ends, 3] < 0).all() and (data.action[[0], 3] > 0).all()  # ends holding, starts open
    assert all("pick" in text or "lift" in text or "grab" in text or "take" in text for text in data.instruction)


def test_the_tasks_asked_for_are_shown_in_turn(tmp_path):
    tasks = ("press", "close", "close")
    out = record("tabletop-ten", 3, tmp_path / "some", seed0=30, image_size=SIZE, num_workers=1, tasks=tasks)
    data = load_dataset(out)
    told = [data.instruction[int(np.flatnonzero(data.episode_index == e)[0])] for e in range(3)]
    assert ["drawer" in words for words in told] == [False, True, True], told
    with pytest.raises(ValueError, match="tasks 'press close close', not 'press'"):
        record("tabletop-ten", 3, out, seed0=30, image_size=SIZE, tasks=("press",))
    with pytest.raises(ValueError, match="has no task 'pres'"):
        record("tabletop-ten", 3, tmp_path / "none", image_size=SIZE, num_workers=1, tasks=("pres",))


@pytest.mark.parametrize("limit", [2_000, 20_000], ids=["an episode", "the dataset"])
def test_a_full_disk_is_one_line_and_the_recording_goes_on_when_there_is_room(tmp_path, recorded, limit):
    """The limit on the size of a file, which workers inherit: what it refuses is refused as a full disk does it."""
    out, before = tmp_path / "toy", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DiskFull, match="^no space left on the device holding .*toy") as caught:
            toy_record(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and not list(out.rglob("*.tmp")) and not (out / "recording" / "build").exists()
    toy_record(out)
    assert_same_demos(load_dataset(out), load_dataset(recorded))
