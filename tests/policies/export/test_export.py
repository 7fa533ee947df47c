"""policies.export.exporter and .exported: real exports of a small policy with all that ours have (second look,
refiner)."""

import io
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="pip install 'bascule[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'bascule[export]'")

from transformers import LlavaForConditionalGeneration

from bascule.bench.serving import serving
from bascule.main import main
from policies.export import exporter as exporting
from policies.export.aot_inductor import compiler
from policies.export.exported_policy import ExportedPolicy, aoti_graph, torch_graph
from policies.export.exporter import MAX_ERROR, export
from policies.export.graphs import Network
from policies.load import load_policy
from policies.serving.client import PolicyClient
from policies.serving.policy_slot import PolicySlot
from policies.serving.server import PolicyServer, serve_in_thread
from tests.vla.toy_backbone import CAMERAS, SPEC
from vla.backbones.backbone import Backbone
from vla.backbones.tiny import tiny_config, train_tokenizer, use_linear_patches
from vla.core.types import Observation, executed
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.processing.processor import Stats

ROOT = Path(__file__).resolve().parents[3]
TEXTS = ["pick up the red cube", "lift the ball", "put the green cube on the left of the bowl"]


def small_backbone() -> Backbone:
    """The embedded architecture with one layer of each kind, its second look included."""
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=300)
    config = tiny_config(len(tokenizer))
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    vlm = use_linear_patches(LlavaForConditionalGeneration(config))
    return Backbone(vlm, tokenizer, num_queries=4, num_views=2, sharp=True).eval()


def observation(batch: int, *, seed: int = 0, size: int = 84) -> Observation:
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8) for camera in CAMERAS}
    proprio = rng.normal(size=(batch, 8)).astype(np.float32)
    return Observation(images, proprio, [TEXTS[i % 3] for i in range(batch)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    stats = Stats.from_arrays(rng.normal(size=(64, 8)), rng.uniform(-1, 1, (64, 4)) * SPEC.high)
    config = VLAConfig(
        bridge=BridgeConfig(width=32, gate_init=0.5), chunk_size=4, n_action_steps=3, backbone_dtype="bfloat16"
    )
    vla = VLA.build(config, stats=stats, action_spec=SPEC, cameras=CAMERAS, backbone=small_backbone())
    vla.add_refiner(16, seed=0)
    torch.nn.init.normal_(vla.refiner.net[-1].weight)  # as if RL had trained it
    torch.nn.init.normal_(vla.head.out.weight)
    folder = tmp_path_factory.mktemp("policy") / "checkpoint"
    vla.save(folder)
    return folder


@pytest.fixture(scope="module")
def onnx_folder(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "policy"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def torch_export(checkpoint, tmp_path_factory) -> tuple[Path, list[str]]:
    """The policy as torch runs it, and what was logged while it was made."""
    out, handler, said = tmp_path_factory.mktemp("torch") / "policy", logging.Handler(), []
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vla.processing.text._told_before", set())
            export(checkpoint, out, format="torch", observations=8)
    finally:
        logging.getLogger().removeHandler(handler)
    return out, said


@pytest.fixture(scope="module")
def torch_folder(torch_export) -> Path:
    return torch_export[0]


@pytest.fixture(scope="module")
def model(checkpoint) -> VLAPolicy:
    policy = VLAPolicy.load(checkpoint)
    policy.vla.backbone_dtype = torch.float32
    return policy


def test_the_random_words_of_the_comparison_are_not_remarked_on(torch_export):
    assert not [message for message in torch_export[1] if "has no word" in message]


def test_an_onnx_policy_acts_as_the_model_for_any_batch(model, onnx_folder):
    policy = ExportedPolicy.load(onnx_folder, threads=1)
    assert policy.spec == model.spec and policy.spec.n_action_steps == 3
    assert policy.config.parity.observations == 100 and policy.config.parity.max_error < MAX_ERROR
    for batch, size in ((1, 84), (5, 84), (2, 60)):
        obs = observation(batch, seed=batch, size=size)
        expected = model.act(obs)
        got = policy.act(obs)
        assert got.shape == (batch, 4, 4) and got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.ptp(expected) > 0.01  # not all at a bound
    inp = model.processor.prepare(obs)
    normal = model.vla.act(model.vla.encode(inp), inp.proprio_BP).detach().numpy()
    np.testing.assert_allclose(policy.predict(obs), normal, atol=1e-4)
    without = model.vla.head(model.vla.condition(model.vla.encode(inp), inp.proprio_BP).latent_BCD).detach().numpy()
    assert np.abs(without - normal).max() > 0.01  # so that forgetting the refiner would have shown


def test_padding_of_a_mixed_batch_changes_nothing(onnx_folder):
    policy = ExportedPolicy.load(onnx_folder, threads=1)
    obs = observation(3)
    alone = np.concatenate([policy.predict(obs.select([i])) for i in range(3)])
    np.testing.assert_allclose(policy.predict(obs), alone, atol=2e-5)


RUN = """
import sys, json
import numpy as np
for name in {blocked!r}:
    sys.modules[name] = None
from policies.load import load_policy
from vla.core.types import Observation
policy = load_policy({folder!r})
image = (np.arange(84 * 84 * 3) % 251).astype(np.uint8).reshape(1, 84, 84, 3)
obs = Observation({{"front": image, "wrist": image[:, ::-1]}}, np.full((1, 8), 0.5, np.float32), ["Lift the ball!"])
print(json.dumps(policy.act(obs).tolist()))
"""


@pytest.mark.parametrize(
    ("kind", "blocked"),
    [("onnx", ("torch", "transformers")), pytest.param("torch", ("transformers",), marks=pytest.mark.slow)],
)
def test_it_runs_where_the_training_libraries_are_not(model, request, kind, blocked):
    folder = request.getfixturevalue(f"{kind}_folder")
    code = RUN.format(blocked=blocked, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    image = (np.arange(84 * 84 * 3) % 251).astype(np.uint8).reshape(1, 84, 84, 3)
    obs = Observation({"front": image, "wrist": image[:, ::-1]}, np.full((1, 8), 0.5, np.float32), ["lift the ball"])
    np.testing.assert_allclose(np.array(json.loads(done.stdout)), model.act(obs), atol=1e-5)


def test_a_torch_policy_acts_as_the_model(model, torch_folder):
    policy = load_policy(torch_folder)
    for batch in (1, 3):
        np.testing.assert_allclose(policy.act(observation(batch)), model.act(observation(batch)), atol=1e-5)


@pytest.mark.slow
def test_bfloat16_runs_the_backbone_as_the_checkpoint_does(checkpoint, tmp_path):
    config = export(checkpoint, tmp_path / "half", format="torch", precision="bfloat16", observations=3)
    assert 1e-5 < config.parity.max_error < 1  # measured against float32, and different from it
    obs = observation(1)
    np.testing.assert_allclose(
        load_policy(tmp_path / "half").predict(obs),
        normalised(VLA.load(checkpoint), obs),
        atol=0.05,
    )


def normalised(vla: VLA, obs: Observation) -> np.ndarray:
    inp = vla.processor.prepare(obs)
    return vla.act(vla.encode(inp), inp.proprio_BP).detach().numpy()


@pytest.mark.slow
def test_int8_is_smaller_and_measured(checkpoint, onnx_folder, tmp_path):
    config = export(checkpoint, tmp_path / "int8", precision="int8", observations=10)
    small, whole = (folder / "model.onnx" for folder in (tmp_path / "int8", onnx_folder))
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    assert config.precision == "int8" and 1e-5 < config.parity.mean_error < 0.3
    policy = ExportedPolicy.load(tmp_path / "int8", threads=1)
    assert np.isfinite(policy.act(observation(2))).all() and policy.config == config


def test_an_exported_policy_is_served_beside_the_model_it_was_made_of(model, checkpoint, onnx_folder):
    served = {"model": checkpoint, "onnx": onnx_folder}
    served = {name: PolicySlot.of_folder(folder, load=load_policy) for name, folder in served.items()}
    served["model"].policy.vla.backbone_dtype = torch.float32
    obs, whole = observation(1), model.vla.predict(model.processor.prepare(observation(1)))
    with serve_in_thread(PolicyServer(served, port=0)) as server:
        for name in served:
            with PolicyClient(f"{server.uri}/{name}") as client:
                assert (client.metadata["chunk_size"], client.spec.n_action_steps) == (4, 3)
                np.testing.assert_allclose(client.act(obs), whole, atol=1e-5)
                client.whole_chunks = False
                np.testing.assert_allclose(client.act(obs), executed(model.spec, whole), atol=1e-5)


def test_the_commands_put_an_exported_policy_to_work(model, onnx_folder, tmp_path):
    args = ["--duration-s", "2", "--give-up-s", "9", "--image-size", "84", "--json", str(tmp_path / "report.json")]

    def driven(policy: str) -> None:
        assert main(["control", policy, *args]) == 0
        report = json.loads((tmp_path / "report.json").read_text())["report"]
        assert report["answers"] >= 1 and report["error"] is None and report["ended"] in ("time", "done")

    driven(str(onnx_folder))
    with serving(f"pick={onnx_folder}") as server, PolicyClient(server.uri + "/pick") as client:
        np.testing.assert_allclose(client.act(observation(1)), model.act(observation(1)), atol=1e-5)
        driven(server.uri)


@pytest.fixture(scope="module")
def aoti_folder(checkpoint, tmp_path_factory) -> Path:
    if compiler() is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    out = tmp_path_factory.mktemp("aoti") / "policy"
    assert main(["export", str(checkpoint), "--out", str(out), "--format", "aoti"]) == 0
    return out


@pytest.mark.slow
def test_a_compiled_policy_acts_as_the_model_for_any_batch(model, aoti_folder):
    policy = load_policy(aoti_folder)
    assert policy.config.parity.observations == 100 and policy.config.parity.max_error < MAX_ERROR
    for batch, size in ((1, 84), (5, 84), (2, 60)):
        obs = observation(batch, seed=batch, size=size)
        np.testing.assert_allclose(policy.act(obs), model.act(obs), atol=1e-5)
    data = (aoti_folder / "model.aoti.pt2").read_bytes()
    with pytest.raises(ValueError, match="compiled for AVX9000, and this processor has .*: export it here"):
        aoti_graph(data, threads=1, made_for="AVX9000")


def test_without_a_compiler_the_fix_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out"), "--format", "aoti"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "needs a C++ compiler: install g++" in said and "--format onnx" in said
    assert not (tmp_path / "out").exists()


def test_a_changed_file_is_named_and_refused(onnx_folder, tmp_path):
    for name in ("model.onnx", "stats.json", "tokenizer/tokenizer.json"):
        copy = tmp_path / name.replace("/", "_")
        for file in ("config.json", "model.onnx", "stats.json", "tokenizer/tokenizer.json"):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_bytes((onnx_folder / file).read_bytes())
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name.split('/')[-1]} is not the file that was saved .its hash"):
            load_policy(copy)
        (copy / name).unlink()
        with pytest.raises(ValueError, match=rf"{name.split('/')[-1]} is missing"):
            load_policy(copy)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_nothing_pickled_is_loaded(torch_folder):
    good = (torch_folder / "model.pt2").read_bytes()
    for entry, content in (
        ("archive/data/weights/model_weights_config.json", b'{"config": {"w": {"use_pickle": true}}}'),
        ("archive/data/sample_inputs/model.pt", b"\x80\x04."),
        ("archive/data/constants/custom_obj_0", b"\x80\x04."),
    ):
        with pytest.raises(ValueError, match="model.pt2 holds .*pickle"):
            torch_graph(_with(good, entry, content), threads=1)
    with pytest.raises(ValueError, match="not a torch.export package"):
        torch_graph(b"\x80\x04.", threads=1)


def _with(archive: bytes, name: str, content: bytes) -> bytes:
    """The zip file with one more entry."""
    buffer = io.BytesIO(archive)
    with zipfile.ZipFile(buffer, "a") as opened:
        opened.writestr(name, content)
    return buffer.getvalue()


def test_what_cannot_be_exported_is_said_at_once(checkpoint, tmp_path):
    for options, message in (
        ({"precision": "bfloat16"}, "bfloat16 is not available as onnx: use --format torch"),
        ({"format": "torch", "precision": "int8"}, "int8 is not available as torch: use --format onnx"),
        ({"format": "aoti", "precision": "int8"}, "int8 is not available as aoti: use --format onnx"),
        ({"observations": 0}, "observations must be at least 1"),
        ({"n_action_steps": 5}, r"n_action_steps must be in 1..4"),
        ({"member": "left"}, "member"),
    ):
        with pytest.raises(ValueError, match=message):
            export(checkpoint, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export(checkpoint, checkpoint)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(ValueError, match="other is a checkpoint: choose another --out"):
        export(checkpoint, tmp_path / "other")
    with pytest.raises(ValueError, match="is no exported policy"):
        ExportedPolicy.load(checkpoint)
    assert not (tmp_path / "out").exists()


def test_an_export_that_differs_from_the_model_is_not_written(checkpoint, tmp_path, monkeypatch):
    def wrong(network: Network, *_: object) -> object:
        def graph(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                return [network.module(*map(torch.from_numpy, inputs.values())).numpy() + 2e-4]

        return b"", graph

    monkeypatch.setattr(exporting, "write", wrong)
    with pytest.raises(RuntimeError, match=r"differs from the model by 2.0e-04 .limit 1e-04.: not written"):
        export(checkpoint, tmp_path / "out", format="torch", observations=2)
    assert not (tmp_path / "out").exists()
