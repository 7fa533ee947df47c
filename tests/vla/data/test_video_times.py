"""Which video frame a row is given when time stamps are not frame_index / fps: the nearest one, or an error."""

import numpy as np
import pytest

from tests.vla.data.odd_recordings import KEY, shown, write_dataset, write_video
from vla.data.lerobot_dataset import load_dataset

LENGTHS, FPS = (20, 15), 30
COUNT = sum(LENGTHS)
FRAME = np.concatenate([np.arange(length) for length in LENGTHS])
START = np.repeat([0, LENGTHS[0]], LENGTHS) / FPS
REGULAR = FRAME / FPS


def frames_read(root, lazy):
    """The numbers that the rows' pictures show, read in order (in memory) or shuffled (streamed)."""
    data = load_dataset(root, lazy=lazy)
    order = np.random.default_rng(0).permutation(COUNT)
    found = np.empty(COUNT, int)
    found[order] = shown(data.images["front"][order])
    return found.tolist()


def dataset(root, **odd):
    return write_dataset(root, LENGTHS, fps=FPS, kind="video", **odd)


@pytest.fixture(params=[False, True], ids=["memory", "streamed"])
def lazy(request):
    return request.param


def refused(root, lazy, message):
    with pytest.raises(ValueError, match=message) as problem:
        load_dataset(root, lazy=lazy)
    assert "\n" not in str(problem.value)


def test_regular_stamps_give_each_row_its_frame(tmp_path, lazy):
    assert frames_read(dataset(tmp_path), lazy) == list(range(COUNT))


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_frames_that_are_stored_out_of_order_are_found(tmp_path, lazy, codec):
    """B frames: an mp4 stores them by decoding time."""
    root = dataset(tmp_path)
    write_video(
        root / "videos" / KEY / "chunk-000" / "file-000.mp4", np.arange(COUNT) / FPS, codec=codec, size=(64, 64)
    )
    assert frames_read(root, lazy) == list(range(COUNT))


def test_jitter_below_half_a_period_gives_the_nearest_frame(tmp_path, lazy):
    jitter = np.random.default_rng(0).uniform(-0.014, 0.014, COUNT)
    assert frames_read(dataset(tmp_path, stamps=REGULAR + jitter), lazy) == list(range(COUNT))


def test_jitter_beyond_half_a_period_is_refused_by_its_stamps(tmp_path, lazy):
    jitter = np.random.default_rng(0).uniform(-0.025, 0.025, COUNT)
    root = dataset(
        tmp_path, stamps=np.sort((REGULAR + jitter)[: LENGTHS[0]]).tolist() + (REGULAR)[LENGTHS[0] :].tolist()
    )
    refused(
        root, lazy, r"has one video frame for two rows: episode 0, frame \d+ at 0\.\d+ s and episode 0, frame \d+ at"
    )


def test_stamps_that_go_back_are_refused(tmp_path, lazy):
    stamps = REGULAR.copy()
    stamps[[7, 8]] = stamps[[8, 7]]
    refused(
        dataset(tmp_path, stamps=stamps),
        lazy,
        r"episode 0, frame 8 has the timestamp 0\.233 s, before frame 7's 0\.267 s",
    )


def test_a_video_with_the_wall_clock_s_own_stamps_is_matched_exactly(tmp_path, lazy):
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, COUNT)
    jitter[[0, LENGTHS[0]]] = 0
    clock = START + REGULAR + jitter
    assert frames_read(dataset(tmp_path, stamps=REGULAR + jitter, video=clock), lazy) == list(range(COUNT))


@pytest.mark.parametrize("rate", [27, 33])
def test_a_real_rate_other_than_the_declared_one(tmp_path, lazy, rate):
    """With a video of the real stamps every frame is found and the rate is told; with a regular video it is refused."""
    begins = np.repeat([0, LENGTHS[0] / rate], LENGTHS)

    def shift(rows):
        rows[1][f"videos/{KEY}/from_timestamp"] = LENGTHS[0] / rate

    root = dataset(tmp_path / "real", stamps=FRAME / rate, video=begins + FRAME / rate, episodes=shift)
    assert frames_read(root, lazy) == list(range(COUNT))
    (note,) = load_dataset(root, lazy=lazy).warnings()
    assert f"recorded at {rate} Hz, meta/info.json declares 30 Hz" in note
    root = dataset(tmp_path / "regular", stamps=FRAME / rate)
    where = r"no video frame for episode 0, frame 18: its timestamp 0\.667 s is 0\.667 s in .*mp4, the nearest frame"
    refused(root, lazy, where if rate == 27 else r"episode 0, frame 5 at 0\.152 s and episode 0, frame 6 at 0\.182 s")


def test_an_offset_never_reads_the_next_episode(tmp_path, lazy):
    """0.1 s are three frames: the last ones of an episode would be the first of the next."""
    message = (
        r"no video frame for episode 0, frame 17: its timestamp 0\.667 s is 0\.667 s in .*, the "
        r"nearest frame is 0\.667 s, and one of this episode must be within 0\.017 s"
    )
    refused(dataset(tmp_path, stamps=REGULAR + 0.1), lazy, message)


def test_an_offset_before_the_episode_is_refused(tmp_path, lazy):
    refused(
        dataset(tmp_path, stamps=REGULAR - 0.1), lazy, r"no video frame for episode 0, frame 0: its timestamp -0\.100"
    )


def test_a_video_shorter_than_the_rows(tmp_path, lazy):
    root = dataset(tmp_path, video=np.arange(COUNT - 3) / FPS)
    refused(root, lazy, r"no video frame for episode 1, frame 12: .*the nearest frame is 1\.033 s.*cut short")


def test_a_video_of_fewer_frames_a_second_than_the_rows(tmp_path, lazy):
    """Neither cut short nor of other stamps: half of the rows have no picture."""
    root = dataset(tmp_path, video=np.arange(0, COUNT, 2) / FPS)
    refused(root, lazy, r"0\.017 s: the video has 15 frames a second, meta/info\.json declares 30: encode it anew")


def test_two_episodes_that_begin_at_one_place_of_a_video(tmp_path, lazy):
    """A merge that does not count from_timestamp on lays two episodes on one part of the video; the frames' own time
    stamps, in seconds, are right. The error names from_timestamp."""

    def merged(rows):
        rows[1][f"videos/{KEY}/from_timestamp"] = 0.0

    overlap = r"episode 0 begins at 0\.000 s of it and episode 1 at 0\.000 s, so that they overlap: correct their from_"
    refused(dataset(tmp_path, episodes=merged), lazy, overlap)


def test_an_episode_that_begins_before_the_one_before_it_ends(tmp_path, lazy):
    """Starts that were counted at another rate."""

    def early(rows):
        rows[1][f"videos/{KEY}/from_timestamp"] = 0.5

    told = r"episode 0, frame 15: .*by meta/episodes the next episode begins at 0\.500 s of it: its from_timestamp is w"
    refused(dataset(tmp_path, episodes=early), lazy, told)


def test_rows_at_a_part_of_the_video_s_rate(tmp_path, lazy):
    root = write_dataset(tmp_path, (5, 4), fps=10, kind="video", video=np.arange(27) / 30)
    data = load_dataset(root, lazy=lazy)
    assert shown(data.images["front"][np.arange(9)]) == list(range(0, 27, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_stamps_that_are_no_numbers(tmp_path, lazy, value):
    stamps = REGULAR.copy()
    stamps[22] = value
    refused(dataset(tmp_path, stamps=stamps), lazy, r"the timestamp of episode 1, frame 2 is (nan|inf)")


def test_videos_that_are_none(tmp_path, lazy):
    root = dataset(tmp_path)
    path = root / "videos" / KEY / "chunk-000" / "file-000.mp4"
    whole = path.read_bytes()
    for content in (b"", b"not a video", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(
            root, lazy, r"file-000\.mp4 (cannot be read as a video: it is damaged or cut short \(\w+\)|holds no video)"
        )


def test_a_frame_that_the_decoder_had_to_invent(tmp_path, lazy):
    """Damaged bytes inside an mp4: the decoder goes on and shows the frame before it."""
    root = write_dataset(tmp_path, kind="video")
    path = root / "videos" / KEY / "chunk-000" / "file-000.mp4"
    write_video(path, np.arange(11) / 10, size=(64, 64))
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") + 300
    content[start : start + 40] = np.random.default_rng(0).bytes(40)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"front' holds a damaged video frame at (episode 0, frame 4|0\.400 s in file-000)"
    ):
        frames = load_dataset(root, lazy=lazy).images["front"]
        assert shown(frames[np.arange(4)]) == [0, 1, 2, 3]
        frames[np.array([4])]


def test_an_episode_without_a_video_of_one_camera(tmp_path, lazy):
    def forget(rows):
        for field in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            rows[1][f"videos/{KEY}/{field}"] = None

    message = rf"episode 1 has no video of camera '{KEY}' .*--cameras, or delete the episode with lerobot-edit-dataset"
    refused(dataset(tmp_path, episodes=forget), lazy, message)


def test_an_episode_that_meta_does_not_list(tmp_path, lazy):
    refused(dataset(tmp_path, episodes=lambda rows: rows.pop()), lazy, "does not say where .* of episode 1 is")


def test_two_resolutions_in_one_camera(tmp_path, lazy):
    def second_file(rows):
        rows[1] |= {f"videos/{KEY}/file_index": 1, f"videos/{KEY}/from_timestamp": 0.0}

    root = dataset(tmp_path, episodes=second_file)
    numbers = range(LENGTHS[0], COUNT)
    path = root / "videos" / KEY / "chunk-000" / "file-001.mp4"
    write_video(path, np.arange(LENGTHS[1]) / FPS, numbers, size=(32, 48))
    refused(root, lazy, rf"'{KEY}' mixes images of \(16, 16\) and \(32, 48\): .*\(vla train --image-size 96\)")
    data = load_dataset(root, image_size=16, lazy=lazy)
    assert shown(data.images["front"][np.arange(COUNT)]) == list(range(COUNT))
