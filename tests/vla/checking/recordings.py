"""A recording of a joint-position arm, in memory so that a test can plant a fault, then written as a v3 folder."""

from fractions import Fraction

import av
import numpy as np

from tests.vla.data.odd_recordings import png, write_folder

NAMES = (*(f"joint_{i}" for i in range(1, 7)), "gripper")
FPS, SIZE, LENGTH, EPISODES = 20, 48, 60, 8
FRONT, WRIST = "observation.images.front", "observation.images.wrist"


class Arm:
    """Episodes as arrays, to be changed before `write`."""

    def __init__(self, episodes=EPISODES, seed=0):
        rng = np.random.default_rng(seed)
        self.state, self.action, self.pictures, self.stamps, self.task = [], [], [], [], []
        self.texts = ["pick up the red cube", "lift the blue ball"]
        self.names = NAMES
        self.info = {}
        self.shape = [SIZE, SIZE, 3]
        self.marks = {}
        """Camera's feature -> its "info" in meta/info.json."""
        self.cells = {}
        """(camera's feature, row) -> what stands there in place of the picture."""
        for episode in range(episodes):
            state, action = joints(rng, LENGTH + int(rng.integers(-8, 9)))
            self.state.append(state)
            self.action.append(action)
            self.pictures.append({FRONT: front(state), WRIST: wrist(state)})
            self.stamps.append(np.arange(len(state)) / FPS)
            self.task.append(np.full(len(state), episode % 2))

    def write(self, root, kind="image", dtype=np.float32):
        """The dataset's folder."""
        lengths = [len(part) for part in self.state]
        count = sum(lengths)
        width, reach = self.state[0].shape[1], self.action[0].shape[1]
        columns = {
            "index": np.arange(count),
            "episode_index": np.repeat(np.arange(len(lengths)), lengths),
            "frame_index": np.concatenate([np.arange(n) for n in lengths]),
            "timestamp": np.concatenate(self.stamps).astype(np.float32),
            "task_index": np.concatenate(self.task).astype(np.int64),
            "observation.state": list(np.concatenate(self.state).astype(dtype)),
            "action": list(np.concatenate(self.action).astype(dtype)),
        }
        features = {
            "observation.state": {"dtype": "float32", "shape": [width], "names": list(self.names[:width])},
            "action": {"dtype": "float32", "shape": [reach], "names": list(self.names[:reach])},
        }
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist()
        rows = [{"episode_index": i, "length": n} for i, n in enumerate(lengths)]
        for key in self.pictures[0]:
            features[key] = {"dtype": kind, "shape": self.shape, "names": ["height", "width", "channels"]}
            features[key] |= {"info": self.marks[key]} if key in self.marks else {}
            if kind == "image":
                columns[key] = [{"bytes": png(p), "path": None} for part in self.pictures for p in part[key]]
                for (camera, row), encoded in self.cells.items():
                    if camera == key:
                        columns[key][row] = {"bytes": encoded, "path": None}
                continue
            film(root / "videos" / key / "chunk-000" / "file-000.mp4", np.concatenate([p[key] for p in self.pictures]))
            for row, start in zip(rows, starts, strict=True):
                row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
                row[f"videos/{key}/from_timestamp"] = start / FPS
        # Rows of several groups: an episode must not have to lie in one.
        return write_folder(root, columns, rows, features, FPS, self.texts, row_group_size=100, **self.info)


def joints(rng, length):
    """(T, 7) state and action of an arm that goes to three places and closes its gripper half way. The state reaches a
    target in the frame after it was commanded, within a small error."""
    stations = rng.uniform(-1.2, 1.2, (4, 6))
    at = np.linspace(0, 3, length)
    part = np.minimum(at.astype(int), 2)
    ease = (1 - np.cos(np.pi * (at - part))) / 2
    path = stations[part] * (1 - ease)[:, None] + stations[part + 1] * ease[:, None]
    path += 0.03 * np.sin(np.arange(length) / 3 + rng.uniform(0, 6, 6)[:, None]).T
    grip = np.where(np.arange(length) < length * rng.uniform(0.4, 0.6), 1.0, 0.0)
    action = np.column_stack([path, grip])
    state = np.concatenate([action[:1], action[:-1]]) + rng.normal(0, 0.004, action.shape)
    opening = np.convolve(np.concatenate([np.full(3, grip[0]), grip]), np.full(4, 0.25), "valid")
    state[:, 6] = opening + rng.normal(0, 0.004, length)
    return state, action


def front(state):
    """(T, H, W, 3): a bright table on which a square follows the first two joints."""
    pictures = np.full((len(state), SIZE, SIZE, 3), (170, 160, 140), np.uint8)
    pictures[:, : SIZE // 3] = (120, 140, 170)
    for picture, (x, y) in zip(pictures, state[:, :2], strict=True):
        row, column = (int(np.clip((v + 1.6) / 3.2, 0, 1) * (SIZE - 14)) for v in (y, x))
        picture[row : row + 14, column : column + 14] = (200, 40, 30)
    return pictures


def wrist(state):
    """(T, H, W, 3): a dark ground with stripes that move with the third joint."""
    columns = np.arange(SIZE)[None] + np.round(30 * state[:, 2:3])
    stripes = np.where(np.mod(columns, 16) < 8, 90, 40).astype(np.uint8)
    return np.repeat(np.repeat(stripes[:, None, :, None], SIZE, 1), 3, 3)


def film(path, pictures):
    """Write an mp4 of these pictures (F, H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.bit_rate = 5, 4_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
