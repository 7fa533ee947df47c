"""A LeRobotDataset v3 folder written by hand, in seconds, so that a test can make any part of it odd.

Every picture shows its frame's number as brightness (`brightness`), which survives a video codec: tests read back which
frame a row was given.
"""

import io
import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

KEY = "observation.images.front"
SIZE = 16
SHADE = 4
"""Grey levels between two frames."""


def brightness(number):
    return (8 + SHADE * number) % 240


def shown(pictures):
    """The frame numbers that pictures (F, H, W, 3) show, of less than 58."""
    return np.round((np.asarray(pictures, float).mean((1, 2, 3)) - 8) / SHADE).astype(int).tolist()


def write_video(path, seconds, numbers=None, size=(SIZE, SIZE), codec="mpeg4", pixels="yuv420p"):
    """An mp4 with a frame at each of these times, showing these numbers (default: counting from 0)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(30))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.time_base = stream.time_base = Fraction(1, 10_000)
        stream.codec_context.gop_size = 5
        stream.codec_context.bit_rate = 2_000_000
        for number, second in zip(numbers if numbers is not None else range(len(seconds)), seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), brightness(number), np.uint8), "rgb24")
            frame.pts, frame.time_base = round(second * 10_000), Fraction(1, 10_000)
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())


def png(picture):
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def write_dataset(
    root: Path, lengths=(6, 5), *, fps=10, kind="image", stamps=None, video=None, cell=None, action=None, state=None,
    names=None, data=None, features=None, episodes=None, tasks=("push the cube",),
):  # fmt: skip
    """The folder; every argument makes one part odd.

    `stamps`: the column timestamp; `video`: seconds of the video's frames (default: all at n / fps); `cell(row)`: the
    image cell of a row; `action`, `state`: (F, X); `names`: of the action in info.json; `data(columns)`, `features(
    dict)`, `episodes(rows)`: change what is written.
    """
    episode = np.repeat(np.arange(len(lengths)), lengths)
    frame = np.concatenate([np.arange(length) for length in lengths])
    count = len(episode)
    rng = np.random.default_rng(0)
    action = rng.normal(size=(count, 3)).astype(np.float32) if action is None else np.asarray(action)
    state = rng.normal(size=(count, 2)).astype(np.float32) if state is None else np.asarray(state)
    columns = {
        "index": np.arange(count), "episode_index": episode, "frame_index": frame,
        "timestamp": (frame / fps if stamps is None else np.asarray(stamps)).astype(np.float32),
        "task_index": np.zeros(count, np.int64), "observation.state": list(state), "action": list(action),
    }  # fmt: skip
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    located = [
        {"episode_index": i, "length": int(length), f"videos/{KEY}/chunk_index": 0, f"videos/{KEY}/file_index": 0,
         f"videos/{KEY}/from_timestamp": start / fps, f"videos/{KEY}/to_timestamp": (start + length) / fps}
        for i, (length, start) in enumerate(zip(lengths, starts.tolist(), strict=True))
    ]  # fmt: skip
    if kind == "image":
        plain = [{"bytes": png(np.full((SIZE, SIZE, 3), brightness(i), np.uint8)), "path": None} for i in range(count)]
        columns[KEY] = plain if cell is None else [cell(i) for i in range(count)]
    else:
        times = np.arange(count) / fps if video is None else video
        write_video(root / "videos" / KEY / "chunk-000" / "file-000.mp4", times)
    about = {
        KEY: {"dtype": kind, "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": [state.shape[1]], "names": None},
        "action": {"dtype": "float32", "shape": [action.shape[1]], "names": names},
    }
    for part, change in ((columns, data), (about, features), (located, episodes)):
        if change is not None:
            change(part)
    return write_folder(root, columns, located, about, fps, tasks)


def write_folder(root, columns, rows, features, fps, tasks, *, row_group_size=None, **info):
    """The files of a v3 folder but for its videos; `rows`: of the table of episodes; `info`: of info.json besides."""
    info = {
        "codebase_version": "v3.0", "fps": fps, "total_frames": len(columns["index"]), "total_episodes": len(rows),
        "features": features, "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        **info,
    }  # fmt: skip
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    data = root / "data" / "chunk-000" / "file-000.parquet"
    pq.write_table(pa.table(columns), data, row_group_size=row_group_size)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    told = pa.table({"task_index": list(range(len(tasks))), "task": list(tasks)})
    pq.write_table(told, root / "meta" / "tasks.parquet")
    return root


def train_arguments(out, root, *more):
    """The command line of two steps of training on `root`."""
    return [*f"train --dataset {root} --out {out} --recipe smoke --steps 2 --batch-size 4".split(), *more]


def edited(recorded, folder, change):
    """A copy FOLDER/edited of a recording whose info.json has features that `change` has changed."""
    copy = Path(shutil.copytree(recorded, folder / "edited"))
    path = copy / "meta" / "info.json"
    info = json.loads(path.read_text())
    change(info["features"])
    path.write_text(json.dumps(info))
    return copy
