"""policies.serving.layouts: the observations that openpi's LIBERO, DROID and ALOHA clients send, flat and nested."""

from pathlib import Path

import numpy as np
import pytest

from policies.serving.layouts import LAYOUTS, Layout, ObservationReader, find_layout

RNG = np.random.default_rng(0)


def image(*, first: bool = False) -> np.ndarray:
    return RNG.integers(0, 256, (3, 10, 12) if first else (10, 12, 3), dtype=np.uint8)


def libero() -> dict[str, object]:
    return {
        "observation/image": image(),
        "observation/wrist_image": image(),
        "observation/state": np.arange(8.0),
        "prompt": "open the drawer",
    }


def droid() -> dict[str, object]:
    return {
        "observation/exterior_image_1_left": image(),
        "observation/wrist_image_left": image(),
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array([0.5]),
        "prompt": "open the drawer",
    }


def aloha() -> dict[str, object]:
    names = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    return {
        "state": np.arange(14.0),
        "images": {name: image(first=True) for name in names},
        "prompt": "open the drawer",
    }


def nested(message: dict[str, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for key, value in message.items():
        *path, last = key.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def test_libero_flat_and_nested() -> None:
    message = libero()
    reader = ObservationReader(("front", "wrist"), proprio_dim=8, layout=LAYOUTS["libero"])
    for given in (message, nested(message)):
        obs = reader.read(given)
        assert np.array_equal(obs.images["front"][0], message["observation/image"])
        assert np.array_equal(obs.images["wrist"][0], message["observation/wrist_image"])
        assert obs.proprio.tolist() == [list(range(8))] and obs.proprio.dtype == np.float32
        assert obs.instruction == ["open the drawer"]


@pytest.mark.parametrize("gripper", [np.array([0.5]), 0.5, np.float32(0.5)])
def test_droid_joins_joints_and_gripper(gripper: object) -> None:
    message = droid() | {"observation/gripper_position": gripper}
    reader = ObservationReader(("side", "wrist"), proprio_dim=8, layout=LAYOUTS["droid"])
    for given in (message, nested(message)):
        obs = reader.read(given)
        assert obs.proprio.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0.5]]
        assert np.array_equal(obs.images["wrist"][0], message["observation/wrist_image_left"])


def test_aloha_is_nested_and_channels_first() -> None:
    message = aloha()
    reader = ObservationReader(("top", "left", "right"), proprio_dim=14, layout=LAYOUTS["aloha"])
    obs = reader.read(message)
    for camera, name in (("top", "cam_high"), ("left", "cam_left_wrist"), ("right", "cam_right_wrist")):
        assert obs.images[camera].shape == (1, 10, 12, 3) and obs.images[camera].flags.c_contiguous
        assert np.array_equal(obs.images[camera][0], message["images"][name].transpose(1, 2, 0))
    message["images"]["cam_high"] = image()
    with pytest.raises(ValueError, match=r"images/cam_high: expected \(3, H, W\) uint8.*send channel, height, width"):
        reader.read(message)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("change", ["missing", "dtype", "shape", "type"])
def test_every_fault_names_the_clients_key(name: str, change: str) -> None:
    make = {"libero": libero, "droid": droid, "aloha": aloha}[name]
    layout = LAYOUTS[name]
    cameras = ("a", "b", "c")[: min(3, len(layout.images))]
    reader = ObservationReader(cameras, proprio_dim={"libero": 8, "droid": 8, "aloha": 14}[name], layout=layout)
    for key in (*layout.images[: len(cameras)], *layout.state, layout.prompt):
        message = nested(make())
        *path, last = key.split("/")
        node = message
        for part in path:
            node = node[part]
        old = node[last]
        if change == "missing":
            del node[last]
        elif change == "type":
            node[last] = [1, 2]
        elif isinstance(old, str):
            continue
        else:
            node[last] = old.astype(np.float16 if old.dtype == np.uint8 else bool) if change == "dtype" else old[None]
        with pytest.raises(ValueError) as caught:
            reader.read(message)
        assert key in str(caught.value) and "\n" not in str(caught.value)


def test_native_keys_work_beside_a_layout() -> None:
    reader = ObservationReader(("front", "wrist"), proprio_dim=8, layout=LAYOUTS["libero"])
    obs = reader.read({"images": {"front": image(), "wrist": image()}, "state": np.zeros(8), "prompt": "go"})
    assert obs.instruction == ["go"]
    assert reader.keys["state"] == ["observation/state", "state"]


def test_a_layout_from_a_file(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'images = ["obs/top", "obs/hand"]\ncameras = ["wrist", "front"]\nstate = ["obs/q", "obs/g"]\nprompt = "task"\n'
    )
    layout = find_layout(str(path))
    assert layout == Layout(("obs/top", "obs/hand"), ("wrist", "front"), ("obs/q", "obs/g"), "task")
    message = {"obs": {"top": image(), "hand": image(), "q": np.zeros(3), "g": np.ones(1)}, "task": "go"}
    obs = ObservationReader(("front", "wrist"), layout=layout).read(message)
    assert np.array_equal(obs.images["front"][0], message["obs"]["hand"]) and obs.proprio.tolist() == [[0, 0, 0, 1]]
    assert find_layout("native") is None and find_layout("droid") is LAYOUTS["droid"]
    for name, message in (("liberoo", "did you mean 'libero'"), ("x", "or a .toml file")):
        with pytest.raises(ValueError, match=message):
            find_layout(name)
    path.write_text("imagess = []\n")
    with pytest.raises(ValueError, match="imagess"):
        find_layout(str(path))
    path.write_text('images = ["a"]\nstate = "q"\n')
    with pytest.raises(ValueError, match=r"mine.toml: .*state.*images = \['camera/top', 'camera/hand'\], cameras ="):
        find_layout(str(path))
    path.write_text("images = [")
    with pytest.raises(ValueError, match="is no TOML"):
        find_layout(str(path))


@pytest.mark.parametrize(("layout", "key"), [(None, "images/front"), (LAYOUTS["aloha"], "images/cam_high")])
def test_grey_pictures_are_those_that_a_robots_camera_may_give(layout, key) -> None:
    """`vla control` reads them likewise; a fourth channel, alpha, is dropped by both."""
    reader = ObservationReader(("front",), layout=layout)
    rest = {"state": np.zeros(2), "prompt": "go"}
    grey = image()[..., 0]
    shapes = (grey, grey[..., None]) if layout is None else (grey, grey[None])
    for given in shapes:
        assert np.array_equal(reader.read({key: given, **rest}).images["front"][0], np.stack([grey] * 3, -1))
    alpha = np.concatenate([image(), grey[..., None]], -1)
    given = alpha if layout is None else alpha.transpose(2, 0, 1)
    assert np.array_equal(reader.read({key: given, **rest}).images["front"][0], alpha[..., :3])


@pytest.mark.parametrize("twice", [{"images": ("a", "a")}, {"cameras": ("c", "c")}, {"state": ("s", "s")}])
def test_a_layout_that_names_something_twice_is_refused(twice) -> None:
    with pytest.raises(ValueError, match="name '[acs]' twice"):
        ObservationReader(("c",), layout=Layout(**{"images": ("a", "b")} | twice))


def test_single_values_that_nobody_reads_are_told() -> None:
    """A misspelt key, or an option of the server's: the client would think that it is heeded."""
    reader = ObservationReader(("front",), layout=LAYOUTS["libero"])
    message = libero() | {"whole_chunks": True, "embodiment": "left", "policy": "a", "observation/other": image()}
    assert reader.unread(message, ("policy",)) == (
        "the message's whole_chunks, embodiment mean nothing here and are not read"
    )
    assert reader.unread(libero(), ()) == ""


def test_the_guides_layout_can_be_served(tmp_path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "deploy.md").read_text(encoding="utf-8")
    path = tmp_path / "keys.toml"
    path.write_text(guide.split("```toml\n")[1].split("```")[0])
    layout = find_layout(str(path))
    message = {"camera": {"top": image(), "hand": image()}, "joints": np.zeros(6), "gripper": np.ones(1), "task": "go"}
    obs = ObservationReader(("front", "wrist"), layout=layout).read(message)
    assert obs.proprio.shape == (1, 7) and set(obs.images) == {"front", "wrist"}
