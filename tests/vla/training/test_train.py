"""The imitation loop on the real model: it learns, it resumes bit for bit, and its schedule is the one applied."""

import json
import os
import resource
import signal
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import CAMERAS, SPEC, load_toy, toy_backbone
from vla.backbones.features import with_query_noise
from vla.core.checkpoint import load_checkpoint
from vla.core.config import decode, encode
from vla.core.disk import DiskFull
from vla.data import feature_cache
from vla.data.feature_cache import encode_demos
from vla.data.lerobot_dataset import DemoSet
from vla.model.config import BridgeConfig, VLAConfig
from vla.model.model import VLA
from vla.processing.config import AugmentConfig
from vla.training import train as trainer
from vla.training.recipes import RECIPES
from vla.training.sampling import batch_frames
from vla.training.train import METRICS, TrainingDiverged, build_vla, learning_rate, train
from vla.training.train_config import TrainConfig

SIZE = 16
CONFIG = TrainConfig(
    model=VLAConfig(backbone="toy", bridge=BridgeConfig(width=32, dropout=0.1), chunk_size=4),
    image_size=SIZE,
    steps=12,
    batch_size=8,
    warmup_steps=4,
    log_every=3,
    save_every=4,
    num_threads=1,
    encode_batch=7,
)


def demos(episodes=4, length=6, seed=0):
    """Actions that follow from the picture, the words and the state."""
    rng = np.random.default_rng(seed)
    count = episodes * length
    colour = rng.integers(0, 3, episodes).repeat(length)
    shade = rng.uniform(0.1, 0.9, (count, len(CAMERAS)))
    pixels = (255 * shade[..., None, None, None] * np.ones((SIZE, SIZE, 3))).astype(np.uint8)
    proprio = rng.normal(size=(count, 5)).astype(np.float32)
    action = np.stack([shade[:, 0] - 0.5, 0.4 * (colour - 1), 0.3 * np.tanh(proprio[:, 0]), np.sign(proprio[:, 1])], 1)
    return DemoSet(
        images={camera: np.ascontiguousarray(pixels[:, v]) for v, camera in enumerate(CAMERAS)},
        proprio=proprio,
        action=(action * [0.1, 0.1, 0.1, 1]).astype(np.float32),
        instruction=[f"pick up the {('red', 'green', 'blue')[c]} cube" for c in colour],
        episode_index=np.arange(episodes).repeat(length),
        fps=20.0,
        action_names=SPEC.names,
        proprio_names=tuple("abcde"),
    )


def fresh(cfg=CONFIG, data=None):
    return build_vla(cfg, data or demos(), action_spec=SPEC, backbone=toy_backbone(point_dim=6))


def weights(vla):
    return {name: tensor.clone() for name, tensor in vla.state_dict().items()}


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def metrics(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def interrupt_at(step, how):
    def on_step(progress):
        if progress.stage == "train" and progress.done == step:
            how()

    return on_step


class Killed(Exception):
    pass


def kill():
    raise Killed


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
@pytest.mark.parametrize(("how", "resumed_from"), [(kill, 4), (ctrl_c, 6)])
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, ema_decay, how, resumed_from):
    cfg, data = replace(CONFIG, ema_decay=ema_decay, query_noise=ema_decay), demos()  # noise is drawn anew, too
    straight = fresh(cfg)
    start = weights(straight)
    report = train(cfg, straight, data, tmp_path / "a")
    assert report.step == 12 and not report.interrupted

    broken_off = fresh(cfg)
    if how is kill:
        with pytest.raises(Killed):
            train(cfg, broken_off, data, tmp_path / "b", on_step=interrupt_at(6, how))
    else:
        report = train(cfg, broken_off, data, tmp_path / "b", on_step=interrupt_at(6, how))
        assert report.interrupted and report.step == 6
        assert_bit_equal(weights(VLA.load(tmp_path / "b", load_backbone=load_toy)), weights(broken_off))
    assert load_checkpoint(tmp_path / "b").trainer_state["step"] == resumed_from

    resumed, done = fresh(cfg), []
    torch.manual_seed(123)  # whatever the process did before
    report = train(cfg, resumed, data, tmp_path / "b", resume=True, on_step=done.append)
    assert report.step == 12 and not report.interrupted
    assert [p.done for p in done if p.stage == "train"][0] == resumed_from + 1
    assert_bit_equal(weights(resumed), weights(straight))
    assert_bit_equal(weights(VLA.load(tmp_path / "b", load_backbone=load_toy)), weights(straight))
    # The logs agree too: no step is missing or logged twice.
    assert [line["step"] for line in metrics(tmp_path / "b")] == [3, 6, 9, 12]
    assert [line["loss"] for line in metrics(tmp_path / "b")] == [line["loss"] for line in metrics(tmp_path / "a")]
    # And something was learnt, by bridge and head only.
    changed = {name for name in start if not torch.equal(start[name], weights(straight)[name])}
    assert "head.out.weight" in changed and "bridge.position" in changed
    assert not any(name.startswith("backbone.") for name in changed)


def test_resume_after_the_end_changes_nothing_and_a_taken_folder_is_safe(tmp_path):
    data, vla = demos(), fresh()
    train(CONFIG, vla, data, tmp_path)
    other = fresh()
    assert train(CONFIG, other, data, tmp_path, resume=True).step == 12
    assert_bit_equal(weights(other), weights(vla))
    with pytest.raises(ValueError, match="already holds a checkpoint: resume it"):
        train(CONFIG, fresh(), data, tmp_path)
    with pytest.raises(ValueError, match=r"trained with lr=0\.0007, not 0\.001"):
        train(replace(CONFIG, lr=1e-3), fresh(), data, tmp_path, resume=True)
    flow = replace(CONFIG, model=replace(CONFIG.model, head="flow"))
    with pytest.raises(ValueError, match=r"trained with model\.head='l1', not 'flow': resume"):
        train(flow, fresh(), data, tmp_path, resume=True)
    with pytest.raises(ValueError, match="trained on other demonstrations"):
        train(CONFIG, fresh(), demos(seed=1), tmp_path, resume=True)
    train(replace(CONFIG, log_every=1, save_every=99), fresh(), data, tmp_path, resume=True)


def test_averaged_weights_are_the_ones_saved(tmp_path):
    data = demos()
    plain, averaged = fresh(), fresh()
    before = weights(plain)["head.out.weight"]
    train(replace(CONFIG, steps=1), plain, data, tmp_path / "a")
    train(replace(CONFIG, steps=1, ema_decay=0.75), averaged, data, tmp_path / "b")
    expected = before + 0.25 * (weights(plain)["head.out.weight"] - before)
    torch.testing.assert_close(weights(averaged)["head.out.weight"], expected)


def test_learning_rate_warms_up_and_falls_to_its_floor():
    cfg = replace(CONFIG, steps=101, warmup_steps=10, lr=1.0, lr_floor=0.1)
    rates = [learning_rate(cfg, step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down the cosine
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_schedule_is_really_applied(tmp_path):
    # Adam's first step moves every parameter without weight decay by the learning rate, whatever the gradient's size.
    cfg = replace(CONFIG, steps=1, warmup_steps=50, lr=1e-2)
    vla = fresh(cfg)
    before = weights(vla)["head.out.bias"]
    train(cfg, vla, demos(), tmp_path / "one")
    moved = (weights(vla)["head.out.bias"] - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2 / 50), rtol=1e-3, atol=0)
    # And the rate in the log is the optimiser's own.
    train(CONFIG, fresh(), demos(), tmp_path / "log")
    assert [line["lr"] for line in metrics(tmp_path / "log")] == [learning_rate(CONFIG, s) for s in (2, 5, 8, 11)]
    state = load_checkpoint(tmp_path / "log").trainer_state
    assert {group["lr"] for group in state["optimiser"]["param_groups"]} == {learning_rate(CONFIG, 11)}


def test_weight_decay_spares_what_is_not_a_matrix(tmp_path):
    # With a huge decay and no learning left, matrices shrink and nothing else moves.
    cfg = replace(CONFIG, steps=1, warmup_steps=0, lr=1e-12, weight_decay=1e11)
    vla = fresh(cfg)
    before = weights(vla)
    train(cfg, vla, demos(), tmp_path)
    after = weights(vla)
    torch.testing.assert_close(after["head.out.weight"], 0.9 * before["head.out.weight"], rtol=1e-5, atol=1e-9)
    for name in ("head.norm.weight", "bridge.position"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)


def test_every_frame_is_visited_once_before_any_twice():
    order = torch.cat([batch_frames(0, step, 8, 24) for step in range(6)])
    assert sorted(order[:24].tolist()) == list(range(24)) == sorted(order[24:].tolist())
    assert order[:24].tolist() != order[24:].tolist()
    odd = torch.cat([batch_frames(0, step, 10, 7) for step in range(7)])  # batches larger than the data, across epochs
    assert torch.bincount(odd, minlength=7).tolist() == [10] * 7
    assert not torch.equal(batch_frames(1, 0, 8, 24), batch_frames(0, 0, 8, 24))


def test_noise_on_words_is_an_episodes_own_and_no_reason_to_reuse_features(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(feature_cache, "mishearing", lambda _, noise: heard.append(noise) or nullcontext())
    data, vla = demos(), fresh()
    encode_demos(vla, data, batch_size=7, folder=tmp_path, word_noise=0.5)
    assert torch.cat([episodes for _, episodes in heard]).tolist() == data.episode_index.tolist()
    assert {scale for scale, _ in heard} == {0.5}
    encode_demos(vla, data, folder=tmp_path, word_noise=0.25)
    encode_demos(vla, data, folder=tmp_path)
    assert len(list(tmp_path.glob("features-*"))) == 3
    heard.clear()
    train(replace(CONFIG, steps=2, word_noise=0.5), vla, data, tmp_path / "out")
    assert {scale for scale, _ in heard} == {0.0}, "this backbone has no such noise"
    assert "word_noise" in (replace(CONFIG, word_noise=-1.0).problem() or "")
    assert "frozen backbone" in (replace(CONFIG, word_noise=1.0, augment=AugmentConfig()).problem() or "")


def test_noise_on_query_states_leaves_places_alone_and_needs_them(tmp_path):
    features = encode_demos(fresh(), demos()).take(torch.arange(8)).seen
    blurred = with_query_noise(features, 2.0)
    assert blurred.points_BQE is features.points_BQE and blurred.raw_BLND is features.raw_BLND
    moved = (blurred.queries_BLQD - features.queries_BLQD) / features.queries_BLQD.std(-1, keepdim=True)
    assert moved.std().item() == pytest.approx(2.0, rel=0.1) and abs(moved.mean().item()) < 0.2
    alone = replace(features, points_BQE=None)
    assert with_query_noise(features, 0.0) is features and with_query_noise(alone, 2.0) is alone
    noisy = [train(replace(CONFIG, query_noise=scale), fresh(), demos(), tmp_path / f"{scale}") for scale in (0.0, 2.0)]
    assert noisy[0].loss != noisy[1].loss
    assert "query_noise" in (replace(CONFIG, query_noise=-1.0).problem() or "")


def test_features_are_those_of_the_frames_and_can_be_kept(tmp_path):
    data, vla = demos(), fresh()
    encoded = encode_demos(vla, data, batch_size=7, folder=tmp_path)
    one = vla.eval().encode(vla.processor.prepare(data.observation([17])))
    kept = encoded.features.select([17])
    torch.testing.assert_close(kept.raw_BLND.float(), one.raw_BLND, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(kept.points_BQE, one.points_BQE)
    assert kept.raw_BLND.dtype == torch.float16
    expected = vla.processor.normalise_action(data.chunks(4)[0])
    np.testing.assert_array_equal(encoded.action_FCA, expected)
    np.testing.assert_array_equal(encoded.mask_FC, data.chunks(4)[1])

    (kept,) = tmp_path.glob("features-*")
    assert isinstance(np.load(kept / "raw_BLND.npy", mmap_mode="r"), np.memmap)
    calls = []
    again = encode_demos(vla, data, folder=tmp_path, on_progress=lambda *a: calls.append(a))
    assert calls == [] and torch.equal(again.features.raw_BLND, encode_demos(vla, data).features.raw_BLND)
    path = kept / "raw_BLND.npy"
    path.write_bytes(path.read_bytes()[:100])  # a damaged cache is made again
    encode_demos(vla, data, folder=tmp_path, on_progress=lambda *a: calls.append(a))
    assert calls

    def stop(done, total):
        raise Killed

    data.images["front"][3, 0, 0, 0] ^= 255
    with pytest.raises(Killed):
        encode_demos(vla, data, folder=tmp_path, on_progress=stop)
    assert list(tmp_path.iterdir()) == [kept]  # nothing half written is left, or found next time
    encode_demos(vla, data, folder=tmp_path)
    assert len(list(tmp_path.glob("features-*"))) == 2
    with torch.no_grad():
        next(vla.backbone.parameters()).add_(1.0)  # other weights, other features
    encode_demos(vla, data, folder=tmp_path)
    assert len(list(tmp_path.glob("features-*"))) == 3


def test_features_that_do_not_fit_on_the_disk_are_one_line(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"holding .*features-.*: .* free, the cache of features needs \d"):
            encode_demos(fresh(), demos(), folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_features_on_disk_and_in_memory_train_alike(tmp_path):
    memory, disk = fresh(), fresh()
    train(CONFIG, memory, demos(), tmp_path / "a")
    train(replace(CONFIG, keep_features=True), disk, demos(), tmp_path / "b")
    assert_bit_equal(weights(memory), weights(disk))


def test_it_learns_what_the_demonstrations_show(tmp_path):
    data = demos(episodes=4, length=6)
    cfg = replace(
        CONFIG,
        model=replace(CONFIG.model, bridge=BridgeConfig(width=32)),
        steps=250,
        batch_size=24,
        lr=4e-3,
        warmup_steps=10,
        save_every=1000,
    )
    vla = fresh(cfg, data)
    report = train(cfg, vla, data, tmp_path)
    assert metrics(tmp_path)[0]["loss"] > 0.4 and report.loss < 0.1
    policy = VLA.load(tmp_path, load_backbone=load_toy)
    chunk, mask = data.chunks(4)
    error = np.abs(policy.predict(policy.processor.prepare(data.observation(slice(None)))) - chunk)[mask > 0]
    assert error[:, :3].mean() < 0.005  # of actions up to 0.05
    assert (error[:, 3] < 0.5).mean() > 0.97


def test_non_finite_loss_is_an_error_with_a_name_and_leaves_the_checkpoint(tmp_path):
    data, vla = demos(), fresh()

    def poison():
        with torch.no_grad():
            vla.head.out.bias[0] = float("nan")

    with pytest.raises(TrainingDiverged, match=r"loss nan .* at step 6 \(learning rate"):
        train(CONFIG, vla, data, tmp_path, on_step=interrupt_at(6, poison))
    saved = load_checkpoint(tmp_path)
    assert saved.trainer_state["step"] == 4 and all(t.isfinite().all() for t in saved.tensors.values())


def test_what_does_not_fit_is_said_before_anything_runs(tmp_path):
    data, vla = demos(), fresh()
    for change, message in (
        ({"images": {"front": data.images["front"]}}, "lack camera 'wrist', which the policy reads; they have: front"),
        ({"action": data.action[:, :3]}, "feature 'action' has 3 components, this policy has 4: dx, dy, dz, gripper"),
        ({"proprio": data.proprio[:, :4]}, "feature 'observation.state' has 4 components, not 5"),
    ):
        with pytest.raises(ValueError, match=message):
            train(CONFIG, vla, replace(data, **change), tmp_path)
    with pytest.raises(ValueError, match="chunk_size=4, this run is set to 5"):
        train(replace(CONFIG, model=replace(CONFIG.model, chunk_size=5)), vla, data, tmp_path)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        train(replace(CONFIG, steps=0), vla, data, tmp_path)
    assert not any(tmp_path.iterdir())


def test_process_state_is_given_back(tmp_path):
    vla, threads, handler = fresh(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(replace(CONFIG, steps=2, num_threads=2), vla, demos(), tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads and signal.getsignal(signal.SIGINT) is handler


def test_automatic_threads_are_kept_by_a_resumed_run(tmp_path, monkeypatch):
    cfg, used = replace(CONFIG, num_threads=0, steps=6), []
    monkeypatch.setattr(trainer, "idle_cores", lambda: 1.8)

    def look(progress):
        used.append(torch.get_num_threads())
        if progress.stage == "train" and progress.done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(cfg, fresh(), demos(), tmp_path, on_step=look)
    monkeypatch.setattr(trainer, "idle_cores", lambda: 0.0)
    train(cfg, fresh(), demos(), tmp_path, resume=True, on_step=lambda _: used.append(torch.get_num_threads()))
    assert set(used) == {2}
    monkeypatch.undo()
    assert 0 <= trainer.idle_cores(0.05) <= os.cpu_count()


def test_recipes_are_valid_and_survive_json():
    for name, recipe in RECIPES.items():
        cfg = recipe()
        assert cfg.problem() is None, name
        assert decode(TrainConfig, json.loads(json.dumps(encode(cfg)))) == cfg


def test_real_tiny_backbone_overfits_a_few_frames(tmp_path):
    from vla.backbones.backbone import Backbone
    from vla.backbones.tiny import build_tiny, train_tokenizer

    data = demos(episodes=2, length=4)
    images = {camera: image[:, :1, :1].repeat(84, 1).repeat(84, 2) for camera, image in data.images.items()}
    data = replace(data, images=images)
    tokenizer = train_tokenizer([*data.instruction] * 4, vocab_size=300)
    backbone = Backbone(build_tiny(len(tokenizer)), tokenizer, num_queries=4, num_views=2)
    cfg = replace(
        CONFIG, model=VLAConfig(bridge=BridgeConfig(width=64), chunk_size=4), image_size=84,
        steps=150, lr=3e-3, warmup_steps=10, save_every=1000,
    )  # fmt: skip
    vla = build_vla(cfg, data, action_spec=SPEC, backbone=backbone)
    report = train(cfg, vla, data, tmp_path)
    assert metrics(tmp_path)[0]["loss"] > 0.4 and report.loss < 0.1
    obs = vla.processor.prepare(data.observation(slice(None)))
    np.testing.assert_array_equal(VLA.load(tmp_path).predict(obs), vla.predict(obs))
