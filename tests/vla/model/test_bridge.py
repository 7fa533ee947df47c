"""Bridge attention against its equation: an independent slow reference, the gate, positions, masks, gradients."""

import math

import numpy as np
import pytest
import torch

from vla.backbones.features import Features
from vla.model.bridge import Bridge, BridgeBlock, layer_normal, layer_stats, resolve_taps, rope_table, rotate
from vla.model.config import BridgeConfig

B, L, N, D, Q, E, C, P = 3, 3, 7, 20, 4, 4, 5, 6


def make_features(seed=0, batch=B, points=True, mask=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    raw_mask = None
    if mask:
        raw_mask = torch.ones(batch, N, dtype=torch.bool)
        raw_mask[0, 5:], raw_mask[1, 3:] = False, False
    return Features(
        raw_BLND=torch.randn(batch, L, N, D, generator=g).to(dtype),
        raw_mask_BN=raw_mask,
        queries_BLQD=torch.randn(batch, L, Q, D, generator=g).to(dtype),
        points_BQE=torch.randn(batch, Q, E, generator=g) if points else None,
        coords_NE=torch.rand(N, 3, generator=g) * 2 - 1,
    )


def make_bridge(seed=0, point_dim=E, **config):
    torch.manual_seed(seed)
    config = {"width": 16, "heads": 4, "kv_heads": 2, "gate_init": 0.5, **config}
    return Bridge(
        BridgeConfig(**config), chunk_size=C, feature_width=D, num_layers=L, proprio_dim=P, point_dim=point_dim
    )


def proprio(seed=1, batch=B):
    return torch.randn(batch, P, generator=torch.Generator().manual_seed(seed))


# --- the slow reference: loops over worlds, heads, chunk steps and tokens, numpy float64, written from the equation ---


def _norm(x, weight=None, bias=None):
    y = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
    return y if weight is None else y * weight + bias


def _attend(query, keys, values):
    score = np.array([query @ key for key in keys]) / math.sqrt(len(query))
    weight = np.exp(score - score.max())
    weight /= weight.sum()
    return sum(w * v for w, v in zip(weight, values, strict=True))


def _rotated(vector, position, base=100.0):
    """Complex numbers: component i and i + half are one, turned by position * base^(-2i/width)."""
    half = len(vector) // 2
    z = vector[:half] + 1j * vector[half:]
    z = z * np.exp(1j * position * base ** (-2 * np.arange(half) / len(vector)))
    return np.concatenate([z.real, z.imag])


def _gelu(x):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def slow_block(p, config, x_CD, raw_ND, queries_QD, token, points_QE, coords_NE, keep_N):
    W, H = config.width, config.heads
    h, share = W // H, config.heads // config.kv_heads
    fold = share if config.grouped else 1  # heads that read the same keys of queries, proprio and chunk
    K = W // fold
    normed = [_norm(x, p["norm.weight"], p["norm.bias"]) for x in x_CD]
    projected = [p["project_x.weight"] @ x for x in normed]
    starts = np.cumsum([0] + [W] * (1 if config.shared_projections else 3) + [K])
    query_at = [0, 0, 0] if config.shared_projections else starts[:3]
    query = lambda c, i, head: projected[c][query_at[i] + head * h : query_at[i] + (head + 1) * h]  # noqa: E731
    own = lambda c, i, head: projected[c][starts[-2 + i] + head * h : starts[-2 + i] + (head + 1) * h]  # noqa: E731
    cond = [p["project_queries.weight"] @ q for q in queries_QD]
    cond = [k + p["project_points.weight"] @ e for k, e in zip(cond, points_QE, strict=True)]
    cond.append(p["project_proprio.weight"] @ token)
    new = []
    for c in range(len(x_CD)):
        read_raw, read_cond, read_self = [], [], []
        for head in range(H):
            group, at = head // share, slice(head // fold * h, (head // fold + 1) * h)
            tokens = [n for n in range(len(raw_ND)) if keep_N[n]]
            keys = [p["raw_key"][group] @ raw_ND[n] for n in tokens]
            values = [p["raw_value"][group] @ raw_ND[n] + p["coordinate_value"][group] @ coords_NE[n] for n in tokens]
            read_raw.append(_attend(query(c, 0, head), keys, values) * math.tanh(p["gate"]))
            read_cond.append(_attend(query(c, 1, head), [k[:K][at] for k in cond], [k[K:][at] for k in cond]))
            keys = [_rotated(own(j, 0, head // fold), j) for j in range(len(x_CD))]
            values = [own(j, 1, head // fold) for j in range(len(x_CD))]
            read_self.append(_attend(_rotated(query(c, 2, head), c), keys, values))
        reads = [np.concatenate(read) for read in (read_raw, read_cond, read_self)]
        read = sum(reads) if config.shared_projections else np.concatenate(reads)
        x = x_CD[c] + p["out.weight"] @ read + p["out.bias"]
        f = _norm(x, p["ffn_norm.weight"], p["ffn_norm.bias"])
        f = p["ffn.2.weight"] @ _gelu(p["ffn.0.weight"] @ f + p["ffn.0.bias"]) + p["ffn.2.bias"]
        new.append(x + f)
    return np.array(new)


@pytest.mark.parametrize("raw_as_it_comes", [False, True])
@pytest.mark.parametrize("change", [{}, {"grouped": True}, {"shared_projections": True, "grouped": True}])
def test_block_is_the_equation(change, raw_as_it_comes):
    torch.manual_seed(3)
    config = BridgeConfig(width=16, heads=4, kv_heads=2, gate_init=0.7, **change)
    block = BridgeBlock(config, feature_width=D, point_dim=E).double()
    for name, parameter in block.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)  # so that a forgotten scale or shift shows
    f = make_features(4, mask=True)
    raw, queries = f.raw_BLND[:, 0].double(), f.queries_BLQD[:, 0].double()
    if raw_as_it_comes:
        raw = raw * 3 + 0.7
    x, token = torch.randn(B, C, 16, dtype=torch.float64), torch.randn(B, 16, dtype=torch.float64)
    cos, sin = (torch.as_tensor(t).double() for t in rope_table(C, 4))
    with torch.no_grad():
        fast = block(
            x,
            raw,
            queries,
            token,
            points_BQE=f.points_BQE.double(),
            coords_NE=f.coords_NE.double(),
            raw_mask_BN=f.raw_mask_BN,
            raw_stats=layer_stats(raw) if raw_as_it_comes else None,
            rope=(cos, sin),
        ).numpy()
    p = {name: parameter.detach().numpy() for name, parameter in block.named_parameters()}
    if raw_as_it_comes:
        raw = torch.from_numpy(np.array([[_norm(token.numpy()) for token in tokens] for tokens in raw]))
    for b in range(B):
        args = (x[b], raw[b], queries[b], token[b], f.points_BQE[b].double(), f.coords_NE.double(), f.raw_mask_BN[b])
        slow = slow_block(p, config, *(a.numpy() for a in args))
        np.testing.assert_allclose(fast[b], slow, rtol=0, atol=1e-6)


def test_layer_stats_are_a_layernorms_even_at_huge_activations():
    hidden = torch.randn(2, 5, 896, generator=torch.Generator().manual_seed(0)) + 2.0
    hidden[:, 0, 7] = 1e4  # language models have such channels
    mean, inverse = layer_stats(hidden)
    torch.testing.assert_close(
        (hidden - mean[..., None]) * inverse[..., None], layer_normal(hidden), rtol=1e-4, atol=1e-4
    )
    assert layer_stats(torch.zeros(1, 2, 8))[1].isfinite().all()


def test_bridge_is_its_blocks_in_the_order_of_the_taps():
    bridge = make_bridge(taps=(2, 0)).double()
    f, state = make_features(), proprio().double()
    embedded = bridge.embed_proprio(state)
    x = bridge.position + embedded[:, None]
    for tap, block in zip((2, 0), bridge.blocks, strict=True):
        raw, queries = (layer_normal(t[:, tap].double()) for t in (f.raw_BLND, f.queries_BLQD))
        x = block(
            x,
            raw,
            queries,
            bridge.proprio_norm(embedded),
            points_BQE=f.points_BQE.double(),
            coords_NE=f.coords_NE.double(),
            rope=(bridge.rope_cos, bridge.rope_sin),
        )
    torch.testing.assert_close(bridge(f, state), x, rtol=0, atol=1e-12)


def test_gate_zero_contributes_exactly_nothing():
    f = make_features()
    other = Features(f.raw_BLND * 3 - 1, None, f.queries_BLQD, f.points_BQE, -f.coords_NE)
    shut, open_ = make_bridge(gate_init=0.0), make_bridge(gate_init=0.5)
    assert torch.equal(shut(f, proprio()), shut(other, proprio()))
    assert (open_(f, proprio()) - open_(other, proprio())).abs().max() > 1e-3


def test_gate_opens_by_itself():
    bridge = make_bridge(gate_init=0.0)
    bridge(make_features(), proprio()).square().sum().backward()
    assert all(block.gate.grad.abs() > 0 for block in bridge.blocks)


def test_rope_is_relative_and_keeps_norms():
    cos, sin = rope_table(410, 10)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(10, generator=g), torch.randn(10, generator=g)
    turn = lambda v, at: rotate(v[None], cos[at : at + 1], sin[at : at + 1])[0]  # noqa: E731
    score = lambda i, j: (turn(q, i) @ turn(k, j)).item()  # noqa: E731
    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4) == pytest.approx(score(405, 403), abs=1e-4)
    assert abs(score(5, 3) - score(3, 5)) > 1e-3
    assert turn(q, 77).norm().item() == pytest.approx(q.norm().item(), abs=1e-5)


def test_rope_and_learned_positions_both_tell_steps_apart():
    f = make_features()
    bridge = make_bridge().eval()
    out = bridge(f, proprio())
    assert all((out[:, i] - out[:, j]).abs().max() > 1e-2 for i in range(C) for j in range(i))
    with torch.no_grad():
        bridge.position.zero_()
    assert bridge(f, proprio()).std(dim=1).max() < 1e-5  # equal latents stay equal under a relative code alone
    with torch.no_grad():
        bridge.position[0] = torch.linspace(-1, 1, 16)
    assert bridge(f, proprio())[:, 1:].std(dim=1).max() > 1e-4  # but distance to a different one tells them apart


def test_masked_tokens_do_not_matter():
    f, bridge = make_features(mask=True), make_bridge()
    raw = torch.where(f.raw_mask_BN[:, None, :, None], f.raw_BLND, torch.full_like(f.raw_BLND, 50.0) * f.raw_BLND)
    other = Features(raw, f.raw_mask_BN, f.queries_BLQD, f.points_BQE, f.coords_NE)
    assert torch.equal(bridge(f, proprio()), bridge(other, proprio()))
    unmasked = Features(raw, None, f.queries_BLQD, f.points_BQE, f.coords_NE)
    assert not torch.allclose(bridge(f, proprio()), bridge(unmasked, proprio()), atol=1e-3)


def test_coordinates_reach_the_latent():
    f = make_features()
    moved = Features(f.raw_BLND, None, f.queries_BLQD, f.points_BQE, f.coords_NE + 0.3)
    pointed = Features(f.raw_BLND, None, f.queries_BLQD, f.points_BQE + 0.3, f.coords_NE)
    differs = lambda bridge, other: not torch.allclose(bridge(f, proprio()), bridge(other, proprio()))  # noqa: E731
    assert differs(make_bridge(), moved) and differs(make_bridge(), pointed)
    assert not differs(make_bridge(coordinate_values=False), moved)
    assert not differs(make_bridge(points_at=()), pointed)
    last = make_bridge(points_at=(2,))
    assert [block.project_points is not None for block in last.blocks] == [False, False, True]
    assert differs(last, pointed)


def test_train_and_eval_see_the_same():
    bridge, f = make_bridge(), make_features()
    assert torch.equal(bridge.train()(f, proprio()), bridge.eval()(f, proprio()))
    wet = make_bridge(dropout=0.3)
    assert torch.equal(wet.eval()(f, proprio()), wet(f, proprio()))
    assert not torch.equal(wet.train()(f, proprio()), wet(f, proprio()))


def test_worlds_do_not_touch_each_other():
    bridge, f, state = make_bridge(), make_features(), proprio()
    whole = bridge(f, state)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(bridge(f.select(order), state[order]), whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(bridge(f.select([1]), state[1:2]), whole[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope": False},
        {"raw": False},
        {"queries": False},
        {"coordinate_values": False},
        {"taps": (1,)},
        {"taps": "last:2"},
        {"kv_heads": 1},
        {"grouped": True},
        {"shared_projections": True},
    ],
)
def test_no_dead_parameters(config):
    bridge = make_bridge(**config)
    bridge(make_features(mask=True), proprio())[:, :, :3].square().sum().backward()
    dead = [n for n, p in bridge.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not dead


def test_half_precision_features_are_read_in_float32():
    bridge, f = make_bridge(), make_features()
    half = f.to(dtype=torch.float16)
    out = bridge(half, proprio())
    assert out.dtype == torch.float32
    assert torch.equal(out, bridge(half.float(), proprio()))
    torch.testing.assert_close(out, bridge(f, proprio()), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "multiple of heads 3"),
        ({"kv_heads": 3}, "multiple of kv_heads 3"),
        ({"width": 12}, "even head width"),
        ({"taps": (0, 3)}, r"layers 0\.\.2"),
        ({"points_at": (4,)}, r"blocks 0\.\.2"),
        ({"dropout": 1.0}, "dropout"),
        ({"raw": False, "queries": False}, "is blind"),
        ({"taps": "every:9"}, "'every:9' must be all, last"),
        ({"taps": "evry:2"}, "'evry:2' must be all, last"),
        ({"taps": "last:0"}, "'last:0' must be all, last"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        make_bridge(**change)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="reads 6 proprio values, got 4"):
        make_bridge()(make_features(), torch.zeros(B, 4))
    with pytest.raises(ValueError, match="no points"):
        make_bridge()(make_features(points=False), proprio())
    assert make_bridge(point_dim=0)(make_features(points=False), proprio()).shape == (B, C, 16)


# --- taps ---


@pytest.mark.parametrize(
    ("taps", "layers"),
    [
        (None, (0, 1, 2, 3, 4, 5, 6)),
        ("all", (0, 1, 2, 3, 4, 5, 6)),
        ("last", (6,)),
        ("last:3", (6, 6, 6)),
        ("last:all", (6,) * 7),
        ("every:2", (0, 2, 4, 6)),
        ("every:3", (0, 3, 6)),
        ("every:7", (6,)),
        ("first:2", (0, 1)),
        ((5, 1, 1), (5, 1, 1)),
    ],
)
def test_taps_name_layers(taps, layers):
    assert resolve_taps(taps, 7) == layers


def test_layers_above_the_highest_tap_need_not_exist():
    f, bridge = make_features(), make_bridge(taps="first:2")
    assert bridge.layers_needed == 2 and len(bridge.blocks) == 2
    short = Features(f.raw_BLND[:, :2], None, f.queries_BLQD[:, :2], f.points_BQE, f.coords_NE)
    assert torch.equal(bridge(short, proprio()), bridge(f, proprio()))
    assert make_bridge(taps="last:4").layers_needed == 3


def test_each_source_can_be_left_out():
    f = make_features()
    other_raw = Features(-f.raw_BLND, None, f.queries_BLQD, f.points_BQE, f.coords_NE)
    other_queries = Features(f.raw_BLND, None, -f.queries_BLQD, -f.points_BQE, f.coords_NE)
    same = lambda bridge, other: torch.equal(bridge(f, proprio()), bridge(other, proprio()))  # noqa: E731
    both, raw_only, queries_only = make_bridge(), make_bridge(queries=False), make_bridge(raw=False)
    assert not same(both, other_raw) and not same(both, other_queries)
    assert not same(raw_only, other_raw) and same(raw_only, other_queries)
    assert same(queries_only, other_raw) and not same(queries_only, other_queries)


# --- Features ---


def test_features_select_cat_write():
    f = make_features(mask=True)
    back = Features.cat([f.select([1, 2]), f.select(slice(0, 1))]).select(torch.tensor([2, 0, 1]))
    for name in ("raw_BLND", "raw_mask_BN", "queries_BLQD", "points_BQE", "coords_NE"):
        assert torch.equal(getattr(back, name), getattr(f, name))
    room = f.empty_like(2 * B, dtype=torch.float16)
    room.write(0, f)
    room.write(B, back)
    assert room.raw_BLND.dtype == torch.float16 and room.points_BQE.dtype == torch.float32
    assert torch.equal(room.select(slice(B, 2 * B)).raw_BLND, f.raw_BLND.half())
    with pytest.raises(ValueError, match="do not fit"):
        room.write(B + 1, f)
    with pytest.raises(ValueError, match="token layouts"):
        Features.cat([f, Features(f.raw_BLND, f.raw_mask_BN, f.queries_BLQD, f.points_BQE, f.coords_NE + 1)])


def test_features_in_half_precision_stay_finite_and_keep_coordinates():
    f = make_features()
    f.raw_BLND[0, 0, 0, 0] = 1e6
    half = f.to(dtype=torch.float16)
    assert half.raw_BLND.isfinite().all()
    assert half.coords_NE.dtype == half.points_BQE.dtype == torch.float32
    expected = B * L * (N + Q) * D * 2 + B * Q * E * 4 + N * 3 * 4
    assert half.nbytes == expected and half.batch_size == B
