"""The stock `openpi-client` of the package index drives our server, in an environment of its own (numpy<2)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from policies.serving.layouts import LAYOUTS
from policies.serving.server import PolicyServer, serve_in_thread
from vla.core.types import ActionSpec, Observation, PolicySpec

SPEC = ActionSpec(names=("x", "y", "gripper"), low=(-1.0,) * 3, high=(1.0,) * 3, control_hz=20.0)
PACKAGES = ("openpi-client==0.1.2", "numpy<2", "typing-extensions")

DRIVE = """
import json, sys
import numpy as np
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

libero, droid, aloha = sys.argv[1:]
image = image_tools.resize_with_pad(np.full((96, 128, 3), 40, np.uint8), 224, 224)
chw = image.transpose(2, 0, 1)
said = {"numpy": np.__version__}

client = websocket_client_policy.WebsocketClientPolicy(libero, api_key="sekrit")
said["cameras"] = client.get_server_metadata()["cameras"]
obs = {"observation/image": image, "observation/wrist_image": image, "observation/state": np.arange(8.0)}
obs["prompt"] = "go"
reply = client.infer(obs)
said["libero"] = reply["actions"].tolist()
said["dtype"] = str(reply["actions"].dtype)
said["timing"] = sorted(reply["server_timing"]) + sorted(reply["policy_timing"])
broker = action_chunk_broker.ActionChunkBroker(client, 2)
said["broker"] = [broker.infer(obs)["actions"].tolist() for _ in range(3)]
try:
    client.infer({"prompt": "x"})
except RuntimeError as error:
    said["error"] = str(error)
said["after"] = client.infer(obs)["actions"].tolist() == said["libero"]

client = websocket_client_policy.WebsocketClientPolicy(droid, api_key="sekrit")
said["droid"] = client.infer({
    "observation/exterior_image_1_left": image, "observation/wrist_image_left": image,
    "observation/joint_position": np.arange(7.0), "observation/gripper_position": np.array([0.5]), "prompt": "go",
})["actions"].tolist()
client = websocket_client_policy.WebsocketClientPolicy(aloha, api_key="sekrit")
said["aloha"] = client.infer({
    "state": np.arange(8.0), "images": {"cam_high": chw, "cam_left_wrist": chw}, "prompt": "go",
})["actions"].tolist()
try:
    websocket_client_policy.WebsocketClientPolicy(libero)
except Exception as error:
    said["refused"] = str(error)
print(json.dumps(said))
"""


class Echo:
    """Step k: [state sum, mean of both views, length of the prompt + k]."""

    spec = PolicySpec(SPEC, cameras=("front", "wrist"), proprio_dim=8)

    def reset(self, env_ids: object = None) -> None: ...

    def act(self, obs: Observation) -> np.ndarray:
        pictures = sum(image.mean((1, 2, 3)) for image in obs.images.values()) / 2
        first = np.stack([obs.proprio.sum(1), pictures, [len(text) for text in obs.instruction]], 1)
        chunk = np.repeat(first[:, None], 4, axis=1)
        chunk[..., 2] += np.arange(4)
        return chunk


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """Python of an environment with openpi-client; skipped where there is no uv or no index to be reached."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("openpi-client needs an environment of its own (numpy<2), and uv is not here to make it")
    folder = tmp_path_factory.mktemp("openpi") / "env"
    python = folder / "bin" / "python"
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(python), *PACKAGES],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            pytest.skip("openpi-client could not be installed within a minute")
        if done.returncode != 0:
            reason = " ".join(done.stderr.split())[:200]
            pytest.skip(f"openpi-client could not be installed: {reason}")
    return python


def test_an_unmodified_openpi_client_drives_the_server(stock: Path) -> None:
    def serving(name: str) -> PolicyServer:
        return PolicyServer(
            Echo(),
            layout=LAYOUTS[name],
            api_key="sekrit",
            port=0,
        )

    with serve_in_thread(serving("libero")) as a, serve_in_thread(serving("droid")) as b:
        with serve_in_thread(serving("aloha")) as c:
            command = [str(stock), "-c", DRIVE, a.uri, b.uri, c.uri]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["numpy"].startswith("1.") and said["cameras"] == ["front", "wrist"] and said["dtype"] == "float32"
    # 96 x 128 padded into 224 x 224: three quarters of the picture are 40, the rest black
    chunk = [[28.0, 30.0, 2.0 + k] for k in range(4)]
    np.testing.assert_allclose(said["libero"], chunk, atol=0.2)
    np.testing.assert_allclose(said["droid"], np.array(chunk) + [21.5 - 28, 0, 0], atol=0.2)
    np.testing.assert_allclose(said["aloha"], chunk, atol=0.2)
    np.testing.assert_allclose(said["broker"], [chunk[0], chunk[1], chunk[0]], atol=0.2)
    assert said["timing"] == ["infer_ms", "infer_ms"] and said["after"]
    assert "missing key 'observation/image' or 'images/front'; got prompt" in said["error"]
    assert "401" in said["refused"]
