"""An exported policy with heat-maps draws, looks and goes as the model does, without torch."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="pip install 'bascule[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'bascule[export]'")

from bascule.main import main
from policies.export import heatmap_exporter as exporting
from policies.export.exported_policy import ExportedPolicy
from policies.export.exporter import MAX_ERROR
from policies.export.graphs import Network
from policies.export.heatmap_exporter import export_heatmap
from policies.export.heatmap_policy import ExportedHeatmapPolicy
from policies.export.heatmap_views import Points, draw
from policies.load import load_policy
from policies.serving.client import PolicyClient
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.vla.training.heatmap.toy_demos import SIZE, turning_demos
from vla.model.heatmap.config import HeatmapConfig, Workspace
from vla.model.heatmap.model import Cloud
from vla.model.heatmap.orthographic import render
from vla.training.heatmap.train import HeatmapTrainConfig, build


def checkpoint(folder, backbone):
    """A hand that turns, and a task that can be over."""
    config = HeatmapConfig(width=16, picture_size=SIZE, backbone=backbone, done=True)
    build(HeatmapTrainConfig(model=config, pretrained=None), turning_demos()).save(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint and its export."""
    root = tmp_path_factory.mktemp("heatmap")
    policy = checkpoint(root / "policy", "tiny")
    assert main(["export", str(policy), "--out", str(root / "onnx"), "--observations", "4"]) == 0
    return policy, root / "onnx"


def test_what_is_drawn_without_torch_is_what_the_model_sees():
    """Points at random and a camera's, the whole workspace and a part of it: the same pictures."""
    rng = np.random.default_rng(0)
    workspace = Workspace((0.5, 0.0, 0.2), 0.24, 32, splat_m=0.01)
    images = rng.integers(0, 256, (2, 20, 20, 3)).astype(np.uint8)
    depth = rng.uniform(-0.1, 1.2, (2, 20, 20)).astype(np.float32)
    depth[0, :2] = [[np.nan], [np.inf]]
    inner = np.tile(np.array([[22, 0, 10], [0, 25, 9.5], [0, 0, 1]], np.float32), (2, 1, 1))
    outer = np.tile(np.diag([1.0, -1, -1, 1]).astype(np.float32), (2, 1, 1))
    outer[:, :3, 3], outer[1, :2, 3] = [0.5, 0, 0.8], [0.45, 0.1]
    arrays = images, depth, inner, outer
    cloud = Cloud.of(*(torch.from_numpy(array[None]) for array in arrays))
    points = Points.of(*arrays)
    assert len(points.colour_N) == int(cloud.seen_BN.sum())
    for half, shift in ((0.24, 0.0), (0.06, 0.03)):
        centre = np.array(workspace.centre_m, np.float32) + np.float32(shift)
        tensors = cloud.points_BN3, cloud.colours_BN3, cloud.seen_BN
        wanted = render(*tensors, torch.from_numpy(centre)[None], torch.tensor([half]), workspace)[0].numpy()
        drawn = draw(points, centre, half, workspace)
        assert (drawn != wanted).mean() < 1e-3 and (drawn != 127).mean() > 0.05


def test_it_acts_as_the_checkpoint_in_any_batch(folders):
    policy, model = (load_policy(folder) for folder in reversed(folders))
    assert isinstance(policy, ExportedHeatmapPolicy) and policy.config.parity.max_error < MAX_ERROR
    assert policy.spec == model.spec and policy.heatmap == model.model.config
    for rows in ([3], [0, 30, 70]):
        obs = turning_demos().observation(rows)
        np.testing.assert_allclose(policy.act(obs), model.act(obs), atol=1e-5)
    assert policy.spec.action_spec.dim == 7 and np.abs(policy.act(obs)[..., 3:6]).max() > 0.01
    obs.live = np.array([True, False, True])
    np.testing.assert_allclose(policy.act(obs), model.act(obs), atol=1e-5)
    blind = {camera: np.zeros_like(depth) for camera, depth in obs.depth.items()}
    with pytest.raises(ValueError, match="no camera measures a point of the workspace"):
        policy.act(replace(obs, depth=blind))


def test_it_is_served_and_needs_no_torch(folders, tmp_path):
    obs = turning_demos().observation([3])
    wanted = load_policy(folders[0]).act(obs)
    slot = PolicySlot.of_folder(folders[1], load=load_policy)
    with (
        serve_in_thread(PolicyServer({"keys": slot}, port=0)) as server,
        PolicyClient(server.uri, whole_chunks=True) as client,
    ):
        np.testing.assert_allclose(client.act(obs), wanted, atol=1e-5)
    kinds = {"images": obs.images, "depth": obs.depth, "intrinsics": obs.intrinsics, "extrinsics": obs.extrinsics}
    named = {f"{kind}/{camera}": array for kind, by in kinds.items() for camera, array in by.items()}
    np.savez(tmp_path / "seen.npz", proprio=obs.proprio, **named)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from policies.load import load_policy\n"
        "from vla.core.types import Observation\n"
        "seen = np.load(sys.argv[2])\n"
        "of = lambda kind: {n.split('/')[1]: seen[n] for n in seen.files if n.startswith(kind + '/')}\n"
        "obs = Observation(of('images'), seen['proprio'], [sys.argv[3]], depth=of('depth'),\n"
        "                  intrinsics=of('intrinsics'), extrinsics=of('extrinsics'))\n"
        "print(load_policy(sys.argv[1]).act(obs).tolist())\n"
    )
    args = [sys.executable, "-c", program, str(folders[1]), str(tmp_path / "seen.npz"), obs.instruction[0]]
    ran = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(json.loads(ran.stdout), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_finer_look_is_exported(tmp_path, format):
    """The backbone `small`, whose finer look the heat-maps read."""
    policy = checkpoint(tmp_path / "policy", "small")
    exported = export_heatmap(policy, tmp_path / "out", format=format, observations=4)
    assert exported.parity.max_error < MAX_ERROR
    obs = turning_demos().observation([0, 30])
    np.testing.assert_allclose(load_policy(tmp_path / "out").act(obs), load_policy(policy).act(obs), atol=1e-5)


@pytest.mark.parametrize(
    ("output", "words"), [(0, r"differs from the model by 2.0e-04"), (1, "differs from the model by")]
)
def test_a_graph_that_looks_elsewhere_is_not_written(folders, tmp_path, monkeypatch, output, words):
    """Another heat-map is an error, and so is another place, by how much less likely it is."""

    def wrong(network: Network, *_: object) -> object:
        def graph(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                found = [part.numpy() for part in network.module(*map(torch.from_numpy, inputs.values()))]
            found[output] = found[output] + 2e-4 if output == 0 else 2 * inputs["centre"] - found[1]
            return found

        return b"", graph

    monkeypatch.setattr(exporting, "write", wrong)
    with pytest.raises(RuntimeError, match=words):
        export_heatmap(folders[0], tmp_path / "out", observations=3)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused(folders, tmp_path, capsys):
    command = ["export", str(folders[0]), "--out", str(tmp_path / "out")]
    assert main([*command, "--n-action-steps", "4"]) == 2
    assert "executes its chunks whole" in capsys.readouterr().err
    assert main([*command, "--format", "torch", "--precision", "bfloat16"]) == 2
    assert "leave --precision out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="load_policy"):
        ExportedPolicy.load(folders[1])
