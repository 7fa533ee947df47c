"""Published layouts: tiny files with the published names, against the released computation written out in numpy."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vla.toy_backbone import load_toy, toy_backbone, toy_observation
from vla.model.model import VLA
from vla.model.policy import VLAPolicy
from vla.model.released.convert import convert, convert_released, read_released, released_stats

W, H, L, A, P, C = 32, 8, 3, 4, 5, 6


def linear(out, into, g):
    return {"weight": torch.randn(out, into, generator=g) * into**-0.5, "bias": torch.randn(out, generator=g) * 0.1}


def norm(width, g):
    return {"weight": 1 + 0.2 * torch.randn(width, generator=g), "bias": 0.3 * torch.randn(width, generator=g)}


def published(layout, wrapped=True, seed=0):
    """(action head, proprio projector) as torch.save gets them in the public repository, bfloat16."""
    g = torch.Generator().manual_seed(seed)
    parts = {"layer_norm1": norm(A * W, g), "fc1": linear(W, A * W, g)}
    projections = {
        "base": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "pro": ("q_proj", "k_self", "v_self", "k_adapter", "v_adapter", "k_task", "v_task", "o_proj"),
    }[layout]
    scalars = {}
    for i in range(L):
        block = f"mlp_resnet_blocks.{i}"
        parts |= {f"{block}.{name}": linear(W, W, g) for name in projections}
        parts |= {f"{block}.ffn.0": norm(W, g), f"{block}.ffn.1": linear(W, W, g)}
        if layout == "pro":
            parts[f"{block}.film_gen.0"] = linear(2 * W, W, g)
        scalars[f"{block}.gating_factor"] = torch.randn(1, generator=g)
    parts |= {"layer_norm2": norm(W, g), "fc2": linear(A, W, g)}
    head = {f"{name}.{kind}": tensor for name, part in parts.items() for kind, tensor in part.items()} | scalars
    projector = {f"{n}.{k}": t for n, p in (("fc1", linear(W, P, g)), ("fc2", linear(W, W, g))) for k, t in p.items()}
    prefix = "module." if wrapped else ""
    head = {f"{prefix}model.{name}": tensor.bfloat16() for name, tensor in head.items()}
    return head, {f"{prefix}{name}": tensor.bfloat16() for name, tensor in projector.items()}


def statistics(seed=0):
    rng = np.random.default_rng(seed)

    def part(dim):
        low = -1 - rng.random(dim)
        rows = {"min": low, "q01": low * 0.8, "q99": low * -0.6, "max": low * -1.1, "mean": low * 0, "std": low * 0 + 1}
        return {name: row.tolist() for name, row in rows.items()}

    action = part(A) | {"mask": [True] * (A - 1) + [False]}
    return {"toy_no_noops": {"action": action, "proprio": part(P), "num_transitions": 77, "num_trajectories": 3}}


def write(folder, layout, wrapped=True):
    head, projector = published(layout, wrapped)
    torch.save(head, folder / "action_head--150000_checkpoint.pt")
    torch.save(projector, folder / "proprio_projector--150000_checkpoint.pt")
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics()))
    return head, projector


# --- the released computation, from published names ---


def bf16(x):
    """The nearest number with 8 significant bits, ties to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 256), exponent - 8)


def released_actions(head, projector, raw_LND, queries_LQD, proprio):
    p = {k.removeprefix("module.").removeprefix("model."): v.double().numpy() for k, v in head.items()}
    q = {k.removeprefix("module."): v.double().numpy() for k, v in projector.items()}
    pro = any("k_self" in name for name in p)
    lin = lambda x, table, name: x @ table[f"{name}.weight"].T + table[f"{name}.bias"]  # noqa: E731

    def ln(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def rope(x):
        h = x.shape[-1]
        freq = bf16(10000.0 ** (-np.arange(0, h, 2) / h))
        angle = bf16(np.outer(bf16(np.arange(len(x))), np.concatenate([freq, freq])))
        partner = np.empty_like(x)
        partner[:, 0::2], partner[:, 1::2] = -x[:, 1::2], x[:, 0::2]
        return x * bf16(np.cos(angle)) + partner * bf16(np.sin(angle))

    hidden = lin(np.clip(proprio, -1, 1), q, "fc1")
    gelu = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden])
    token = lin(gelu, q, "fc2")[None]
    x = np.maximum(lin(ln(np.zeros((C, A * W)), "layer_norm1"), p, "fc1"), 0)
    for i in range(L):
        b = f"mlp_resnet_blocks.{i}"
        adapter, task = np.concatenate([queries_LQD[i], token]), raw_LND[i]
        names = [("k_self", "v_self"), ("k_adapter", "v_adapter"), ("k_task", "v_task")]
        names = names if pro else [("k_proj", "v_proj")] * 3
        heads = []
        for h in range(H):
            at = slice(h * W // H, (h + 1) * W // H)
            query = lin(x, p, f"{b}.q_proj")[:, at]
            query = rope(query) if pro else query
            logits, values = [], []
            for source, (k, v) in zip((x, adapter, task), names, strict=True):
                key = lin(source, p, f"{b}.{k}")[:, at]
                logits.append(query @ (rope(key) if pro else key).T)
                values.append(lin(source, p, f"{b}.{v}")[:, at])
            logits[2] = logits[2] * np.tanh(p[f"{b}.gating_factor"])
            logit = np.concatenate(logits, -1) / math.sqrt(W // H)
            weight = np.exp(logit - logit.max(-1, keepdims=True))
            heads.append(weight / weight.sum(-1, keepdims=True) @ np.concatenate(values))
        read = lin(np.concatenate(heads, -1), p, f"{b}.o_proj")
        x = np.maximum(lin(ln(read + x, f"{b}.ffn.0"), p, f"{b}.ffn.1"), 0)
    return lin(ln(x, "layer_norm2"), p, "fc2")


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("layout", ["base", "pro"])
def test_a_published_folder_becomes_a_policy_that_computes_the_same(layout, wrapped, tmp_path):
    head, projector = write(tmp_path, layout, wrapped)
    vla = convert(tmp_path, backbone=toy_backbone(width=W), cameras=("front", "wrist"), chunk_size=C, heads=H)
    assert vla.config.bridge.layout == layout and vla.config.bridge.num_blocks == L
    obs = replace(toy_observation(size=84), proprio=np.random.default_rng(1).normal(size=(3, P)).astype(np.float32) * 3)
    inp = vla.processor.prepare(obs)
    features = vla.encode(inp)
    normal = vla.act(features, inp.proprio_BP).detach().numpy()
    table = statistics()["toy_no_noops"]
    low, high = (np.array(table["proprio"][name]) for name in ("q01", "q99"))
    action = table["action"]
    for b in range(3):
        proprio = 2 * (obs.proprio[b] - low) / (high - low + 1e-8) - 1
        raw, queries = (t[b].detach().double().numpy() for t in (features.raw_BLND, features.queries_BLQD))
        expected = released_actions(head, projector, raw, queries, proprio)
        np.testing.assert_allclose(normal[b], expected, atol=2e-5)
        a_low, a_high = np.array(action["q01"]), np.array(action["q99"])
        in_units = np.where(action["mask"], 0.5 * (expected + 1) * (a_high - a_low + 1e-8) + a_low, expected)
        reach = (np.array(action["max"]) - action["min"]) / 2
        bounds = np.minimum(-1, action["min"] - reach), np.maximum(1, action["max"] + reach)
        np.testing.assert_allclose(vla.predict(inp)[b], np.clip(in_units, *bounds), atol=1e-4)
    assert (normal.std(axis=1).max() < 1e-5) == (layout == "base")
    vla.save(tmp_path / "ours")
    back = VLA.load(tmp_path / "ours", load_backbone=load_toy)
    np.testing.assert_array_equal(VLAPolicy(back).act(obs), VLAPolicy(vla).act(obs))


def test_components_that_never_change_are_scaled_as_in_the_release(tmp_path):
    """State: 2 (x - q01) / (q99 - q01 + 1e-8) - 1 = -1. Action: 0.5 (a + 1) (q99 - q01 + 1e-8) + q01 = the constant."""
    write(tmp_path, "pro")
    table = statistics()
    for part, place, value in (("proprio", 2, 0.1), ("action", 1, -0.7)):
        for column in ("min", "q01", "q99", "max", "mean"):
            table["toy_no_noops"][part][column][place] = value
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(table))
    vla = convert(tmp_path, backbone=toy_backbone(width=W), cameras=("front", "wrist"), chunk_size=C, heads=H)
    vla.save(tmp_path / "ours")
    for policy in (vla, VLA.load(tmp_path / "ours", load_backbone=load_toy)):
        obs = replace(toy_observation(size=84), proprio=np.full((3, P), 0.1, np.float32))
        inp = policy.processor.prepare(obs)
        assert inp.proprio_BP[:, 2].tolist() == [-1.0] * 3
        np.testing.assert_array_equal(policy.predict(inp)[..., 1], np.float32(-0.7))
        wild = np.full((2, C, A), 3.0, np.float32)
        np.testing.assert_allclose(policy.processor.unnormalise_action(wild)[..., 1], -0.7, atol=1e-7)
        np.testing.assert_allclose(policy.processor.unnormalise_action(torch.from_numpy(wild))[..., 1], -0.7, atol=1e-7)
        played = policy.predict(inp)
        assert np.abs(policy.processor.normalise_action(played)[..., 1]).max() <= 1


def test_dead_weights_are_dropped_and_shapes_read(tmp_path):
    write(tmp_path, "pro")
    released = read_released(tmp_path, heads=H)
    assert released.config.width == W and released.config.action_dim == A and released.proprio_dim == P
    assert not any("film" in name for name in released.tensors)
    assert all(tensor.dtype == torch.float32 for tensor in released.tensors.values())


def test_statistics():
    table = statistics()
    stats, name = released_stats(table)
    assert name == "toy_no_noops" and stats.frames == 77
    assert stats.action.q01[-1] == -1.0 and stats.action.q99[-1] == 1.0  # the gripper stays as it is
    assert stats.action.q01[0] == table[name]["action"]["q01"][0]
    assert released_stats(table, extremes=True)[0].proprio.q99 == tuple(table[name]["proprio"]["max"])
    with pytest.raises(ValueError, match="choose one: other, toy_no_noops"):
        released_stats({**table, "other": table[name]})
    with pytest.raises(ValueError, match="did you mean 'toy_no_noops'"):
        released_stats(table, "toy_noops")


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(ValueError, match="must hold one file action_head"):
        read_released(tmp_path)
    head, projector = published("pro")
    with pytest.raises(ValueError, match="'feat_3d_align.0.weight', which no released pro layout has"):
        convert_released({**head, "module.model.feat_3d_align.0.weight": torch.zeros(3)}, projector)
    with pytest.raises(ValueError, match="projector lacks 'fc2.bias'"):
        convert_released(head, {name: t for name, t in projector.items() if "fc2.bias" not in name})
    with pytest.raises(ValueError, match="no VLA-Adapter action head"):
        convert_released({}, projector)
    write(tmp_path, "pro")
    torch.save(
        {name: t for name, t in head.items() if "1.q_proj.bias" not in name},
        tmp_path / "action_head--150000_checkpoint.pt",
    )
    with pytest.raises(ValueError, match=r"lacks or adds weights: bridge.blocks.1.query.bias"):
        convert(tmp_path, backbone=toy_backbone(width=W), cameras=("front", "wrist"), chunk_size=C, heads=H)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    garbage = np.random.default_rng(0).bytes(1000)
    contents = {b"not a pickle": "readable state dict", garbage: "damaged", b"": "is empty", pointer: "`git lfs pull`"}
    for content, words in contents.items():
        (tmp_path / "action_head--150000_checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=rf"action_head--150000_checkpoint.pt .*{words}") as told:
            read_released(tmp_path)
        assert "weights_only" not in str(told.value), "the advice to switch torch's safety off"
    torch.save([1, 2], tmp_path / "action_head--150000_checkpoint.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_released(tmp_path)
    write(tmp_path, "base")
    with pytest.raises(ValueError, match="32 wide, as its backbone; got one of 8"):
        convert(tmp_path, backbone=toy_backbone(width=8), cameras=("front", "wrist"), chunk_size=C, heads=H)


def test_the_command_explains_what_does_not_fit(tmp_path, capsys):
    from bascule import main as cli

    assert cli.main(["convert", str(tmp_path / "nowhere"), "--backbone", "tiny"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    for flags, words in (
        (["--chunk-size", "0"], "--chunk-size must be at least 1"),
        (["--control-hz", "nan"], "--control-hz must be at least 0.01, got nan"),
        (["--cameras", "front", "front"], "--cameras names every view once"),
    ):
        assert cli.main(["convert", str(tmp_path), "--backbone", "tiny", *flags]) == 2
        assert words in capsys.readouterr().err
    write(tmp_path, "base")
    # 32 wide weights, and the embedded backbone is 160 wide
    assert cli.main(["convert", str(tmp_path), "--backbone", "tiny", "--out", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "is 32 wide, as its backbone; got one of 160" in error
