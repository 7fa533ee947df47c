"""A recording against what its meta/ keeps of it: values, pictures, their order, texts, names and rates."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.vla.checking.recordings import FPS, FRONT, LENGTH, WRIST, Arm
from vla.checking.check import check_dataset, training_warnings
from vla.checking.commands import _crosswise
from vla.checking.motion import Pair
from vla.checking.recording import open_recording
from vla.checking.timing import bookkeeping_findings
from vla.core.config import save_json
from vla.data.lerobot_dataset import ACTION, PROPRIO, load_dataset
from vla.data.tables import simulator_state

EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def change(file, **columns):
    """Set these columns of a Parquet file ("__" stands for "/")."""
    table = pq.read_table(file)
    for name, values in columns.items():
        name = name.replace("__", "/")
        if name in table.column_names:
            table = table.drop([name])
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, file)


def with_statistics(root, arm):
    """The folder, its statistics kept as LeRobot keeps them."""
    kept = {}
    for key, parts in (("observation.state", arm.state), ("action", arm.action)):
        kept |= {f"stats__{key}__{name}": [getattr(p, name)(0) for p in parts] for name in ("min", "max", "mean")}
    for key in (FRONT, WRIST):
        means = [part[key].mean((0, 1, 2)) / 255 for part in arm.pictures]
        kept[f"stats__{key}__mean"] = [[[[float(v)]] for v in mean] for mean in means]
    change(root / EPISODES, **kept)
    return root


def told(root, code, **options):
    return [finding for finding in check_dataset(root, **options).findings if finding.code == code]


def test_values_and_pictures_that_are_not_those_recorded(tmp_path):
    assert told(with_statistics(Arm(4).write(tmp_path / "as-it-was"), Arm(4)), "statistics_differ") == []
    arm = Arm(4)
    arm.action[2][:, [0, 1]] = arm.action[2][:, [1, 0]]
    for part in arm.pictures:
        part[FRONT], part[WRIST] = part[WRIST], part[FRONT]
    root = with_statistics(arm.write(tmp_path / "changed"), Arm(4))
    arm.action[1][20:40, 0] = arm.action[1][20, 0]  # a stick that froze, within the episode's extremes
    root = with_statistics(arm.write(tmp_path / "frozen"), Arm(4))
    assert told(root, "statistics_differ", pictures=0)[0].episodes == (1, 2)
    root = tmp_path / "changed"
    values, *cameras = told(root, "statistics_differ")
    assert values.episodes == (2,) and values.components == ("action",) and "(1 such episode)" in values.text
    assert {finding.cameras for finding in cameras} == {("front",), ("wrist",)} and len(cameras) == 2
    assert "are they those of camera 'wrist'?" in next(f.text for f in cameras if f.cameras == ("front",))
    warned = training_warnings(root, load_dataset(root))
    assert sum("mean colour" in line for line in warned) == 2 and values.text in warned


def test_statistics_of_another_recording_are_told(tmp_path):
    """meta/stats.json alone was exchanged: LeRobot's tools would learn by it."""
    arm = Arm(4)
    root = with_statistics(arm.write(tmp_path), arm)
    whole = {
        key: {name: getattr(np.concatenate(parts), name)(0).tolist() for name in ("min", "max")}
        for key, parts in (("observation.state", arm.state), ("action", arm.action))
    }
    save_json(root / "meta" / "stats.json", whole)
    assert told(root, "statistics_differ", pictures=0) == []
    whole["action"]["max"][1] += 50
    save_json(root / "meta" / "stats.json", whole)
    (finding,) = told(root, "statistics_differ", pictures=0)
    assert finding.text.startswith("meta/stats.json tells ") and "greatest value of 'action'" in finding.text


def test_episodes_that_a_video_holds_in_another_order(tmp_path):
    root = Arm(3).write(tmp_path, kind="video")
    column = f"videos/{FRONT}/from_timestamp"
    starts = pq.read_table(root / EPISODES).column(column).to_pylist()
    assert not any(f.code == "film_order" for f in bookkeeping_findings(open_recording(root)))
    change(root / EPISODES, **{column: [starts[0], starts[2], starts[1]]})
    (found,) = [f for f in bookkeeping_findings(open_recording(root)) if f.code == "film_order"]
    assert found.episodes == (1, 2) and found.cameras == ("front",)


def test_frames_of_a_task_that_their_episode_does_not_have(tmp_path):
    arm = Arm(4)
    arm.task[2][-1] = 1
    root = arm.write(tmp_path)
    change(root / EPISODES, tasks=[[arm.texts[i % 2]] for i in range(4)])
    (found,) = told(root, "task_disagrees", pictures=0)
    assert found.episodes == (2,) and found.severity == "error"


@pytest.mark.parametrize(("jitter", "counts"), [(0.0, 1), (0.2, 0)])
def test_even_time_stamps_tell_a_rate_that_is_a_little_off(tmp_path, jitter, counts):
    arm, rng = Arm(3), np.random.default_rng(0)
    arm.stamps = [1.03 * (np.arange(len(s)) + rng.uniform(0, jitter, len(s))) / FPS for s in arm.stamps]
    assert len(told(arm.write(tmp_path), "rate", pictures=0)) == counts


def test_actions_named_by_another_axis_than_they_move():
    names = {ACTION: ("dx", "dy", "dz"), PROPRIO: ("grip_x", "grip_y", "grip_z")}
    pairs = [Pair(i, j, "relative", 0, 0.9) for i, j in ((0, 1), (1, 0), (2, 2))]
    (found,) = _crosswise(pairs, names)
    assert "'dx', 'dy' move" in found.text
    assert _crosswise(pairs[1:], names) == [], "of one alone nothing is said"
    assert _crosswise(pairs, {**names, PROPRIO: ("joint_x", "grip_y", "grip_z")}) == []


def test_a_simulators_state_that_is_no_number_is_refused(tmp_path):
    values = np.zeros((LENGTH, 2), np.float32)
    values[7, 1] = np.nan
    (tmp_path / "meta").mkdir()
    table = pa.table({"index": np.arange(LENGTH), "privileged": list(values)})
    pq.write_table(table, tmp_path / "meta" / "privileged.parquet")
    with pytest.raises(ValueError, match="holds a number in row 7, 'privileged', that is not finite"):
        simulator_state(tmp_path, table, "privileged")
