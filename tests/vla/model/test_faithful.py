"""The released block against an independent slow reference: loops over steps, heads and tokens, numpy float64."""

import math

import numpy as np
import pytest
import torch

from vla.backbones.features import Features
from vla.model.config import FaithfulConfig
from vla.model.released.bridge import FaithfulBlock, FaithfulBridge, released_rotation

B, L, N, Q, C, P, W, H, A = 2, 3, 6, 4, 5, 3, 16, 2, 2


def features(seed=0):
    g = torch.Generator().manual_seed(seed)
    raw, queries = torch.randn(B, L, N, W, generator=g), torch.randn(B, L, Q, W, generator=g)
    return Features(raw, None, queries, None, torch.zeros(N, 3)), torch.randn(B, P, generator=g) * 2


def bridge(layout, seed=0, gate=0.6):
    torch.manual_seed(seed)
    config = FaithfulConfig(layout, width=W, heads=H, num_blocks=L, action_dim=A)
    made = FaithfulBridge(config, chunk_size=C, feature_width=W, num_layers=L, proprio_dim=P).double().eval()
    for name, parameter in made.named_parameters():
        if "norm" in name or "gate" in name:
            torch.nn.init.normal_(parameter, mean=gate, std=0.3)
    return made


# --- the reference ---


def _layernorm(x, w, b):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w + b


def _turn(v, position):
    """Component c of a head of width h: angle of frequency index c mod h/2; partner is the neighbour of the pair."""
    h, out = len(v), np.empty(len(v))
    for c in range(h):
        angle = position * 10000.0 ** (-2 * (c % (h // 2)) / h)
        partner = -v[c + 1] if c % 2 == 0 else v[c - 1]
        out[c] = v[c] * math.cos(angle) + partner * math.sin(angle)
    return out


def _linear(p, name, x):
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def slow_block(p, layout, x, cond, raw):
    h = W // H
    own = {"self": 0, "cond": 1, "raw": 2} if layout == "pro" else dict.fromkeys(("self", "cond", "raw"), 0)
    out = []
    for c in range(C):
        joined = []
        for head in range(H):
            at = slice(head * h, (head + 1) * h)
            query = _linear(p, "query", x[c])[at]
            query = _turn(query, c) if layout == "pro" else query
            logits, values = [], []
            for source, tokens in (("self", x), ("cond", cond), ("raw", raw)):
                for position, token in enumerate(tokens):
                    key = _linear(p, f"key.{own[source]}", token)[at]
                    key = _turn(key, position) if layout == "pro" else key
                    logit = query @ key / math.sqrt(h)
                    logits.append(logit * math.tanh(p["gate"][0]) if source == "raw" else logit)
                    values.append(_linear(p, f"value.{own[source]}", token)[at])
            weights = np.exp(np.array(logits) - max(logits))
            joined.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
        y = _linear(p, "out", np.concatenate(joined)) + x[c]
        out.append(np.maximum(_linear(p, "ffn", _layernorm(y, p["norm.weight"], p["norm.bias"])), 0))
    return np.array(out)


def slow_bridge(made, layout, f, proprio, b):
    p = {name: parameter.detach().numpy() for name, parameter in made.named_parameters()}
    zeros = np.zeros(A * W)
    start = np.maximum(_linear(p, "stem", _layernorm(zeros, p["stem_norm.weight"], p["stem_norm.bias"])), 0)
    hidden = _linear(p, "embed_proprio.0", np.clip(proprio[b].double().numpy(), -1, 1))
    token = _linear(p, "embed_proprio.2", np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden]))
    x = np.array([start] * C)
    for layer in range(L):
        own = {k.removeprefix(f"blocks.{layer}."): v for k, v in p.items() if k.startswith(f"blocks.{layer}.")}
        queries = f.queries_BLQD[b, layer].double().numpy()
        x = slow_block(own, layout, x, [*queries, token], f.raw_BLND[b, layer].double().numpy())
    return x


@pytest.mark.parametrize("layout", ["base", "pro"])
def test_is_the_released_computation(layout):
    made, (f, proprio) = bridge(layout), features()
    with torch.no_grad():
        fast = made(f, proprio).numpy()
    for b in range(B):
        np.testing.assert_allclose(fast[b], slow_bridge(made, layout, f, proprio, b), rtol=0, atol=1e-6)


# --- the quirks, which a repair would lose ---


def test_base_gives_the_same_action_at_every_step_and_pro_does_not():
    f, proprio = features()
    with torch.no_grad():
        assert bridge("base")(f, proprio).std(dim=1).max() < 1e-12
        assert bridge("pro")(f, proprio).std(dim=1).max() > 1e-3


def test_a_shut_gate_leaves_raw_tokens_most_of_the_softmax():
    block = FaithfulBlock(width=W, heads=H, layout="base").double()
    x, cond, raw = (torch.randn(1, n, W, dtype=torch.float64) * 1e-6 for n in (8, 65, 512))
    with torch.no_grad():
        base = block(x, cond, raw)
        assert not torch.allclose(base, block(x, cond, raw + 1), atol=1e-4)  # unlike our bridge's
        weight = 512 / (8 + 65 + 512)
        assert weight == pytest.approx(0.875, abs=1e-3)
        read = block.out(block.value[0](torch.zeros(1, 8, W).double()) + weight * (block.value[0].weight.sum(1)))
        expected = torch.relu(block.ffn(block.norm(read + x)))
        # biases of queries and keys tell the other tokens from them, a little
        torch.testing.assert_close(block(x, cond, raw + 1), expected, atol=0.02, rtol=0)


def test_the_rotation_is_neither_relative_nor_keeps_norms():
    q, k = (
        torch.randn(1, 1, 1, 112, generator=torch.Generator().manual_seed(s)).expand(-1, -1, 110, -1) for s in (0, 1)
    )
    q_at, k_at = released_rotation(q)[0, 0], released_rotation(k)[0, 0]
    assert abs((q_at[5] @ k_at[3] - q_at[105] @ k_at[103]).item()) > 0.1
    assert abs(q_at[77].norm() / q[0, 0, 0].norm() - 1) > 1e-3
    assert torch.equal(q_at[0], q[0, 0, 0])


def _bf16(value):
    """The nearest number with 8 significant bits, ties to even: bfloat16, written out."""
    if value == 0:
        return 0.0
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def test_the_released_table_is_bfloat16_positions_included():
    width, length = 112, 512
    seen = {_bf16(position) for position in range(length)}
    assert len(seen) == 385
    x = torch.zeros(1, 1, length, width)
    x[..., ::2] = 1.0  # the even components read the cosine of their own angle, the odd ones its sine
    ours = released_rotation(x, table=torch.bfloat16)[0, 0].numpy()
    exact = released_rotation(x)[0, 0].numpy()
    expected = np.empty((length, width))
    for position in range(length):
        for c in range(width):
            frequency = _bf16(np.float32(1) / np.float32(10000.0) ** np.float32(2 * (c % (width // 2)) / width))
            angle = _bf16(_bf16(position) * frequency)
            expected[position, c] = _bf16(math.cos(angle)) if c % 2 == 0 else _bf16(math.sin(angle))
    np.testing.assert_array_equal(ours, expected.astype(np.float32))
    assert np.abs(ours - exact).mean() > 0.03  # a float32 table is another policy


@pytest.mark.parametrize("layout", ["base", "pro"])
def test_in_bfloat16_it_is_the_released_head(layout):
    """Against the formula in plain bfloat16 operations, one matrix product for each line of the description."""
    config = FaithfulConfig(layout, width=W, heads=H, num_blocks=L, action_dim=A, bf16_table=True)
    torch.manual_seed(3)
    made = FaithfulBridge(config, chunk_size=C, feature_width=W, num_layers=L, proprio_dim=P).eval()
    for name, parameter in made.named_parameters():
        if "gate" in name:
            torch.nn.init.constant_(parameter, 0.7)
    made = made.to(torch.bfloat16)
    g = torch.Generator().manual_seed(5)
    raw, queries = torch.randn(1, L, 300, W, generator=g), torch.randn(1, L, Q, W, generator=g)
    proprio = torch.randn(1, P, generator=g)
    with torch.no_grad():
        ours = made(Features(raw, None, queries, None, torch.zeros(300, 3)), proprio)[0]

        def linear(name, x):
            layer = made.get_submodule(name)
            return torch.nn.functional.linear(x, layer.weight, layer.bias)

        def norm(name, x):
            layer = made.get_submodule(name)
            return torch.nn.functional.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)

        half = lambda x: x.to(torch.bfloat16)  # noqa: E731

        def turned(x_HTD):
            length, width = x_HTD.shape[-2:]
            frequency = half(1.0 / 10000 ** (torch.arange(0, width, 2).float() / width))
            angle = torch.einsum("i,j->ij", torch.arange(length, dtype=torch.bfloat16), frequency)
            angle = torch.cat([angle, angle], -1)
            partner = torch.stack((-x_HTD[..., 1::2], x_HTD[..., ::2]), -1).reshape_as(x_HTD)
            return x_HTD * angle.cos() + partner * angle.sin()

        split = lambda x: x.view(-1, H, W // H).transpose(0, 1)  # noqa: E731
        token = linear(
            "embed_proprio.2", torch.nn.functional.gelu(linear("embed_proprio.0", half(proprio).clamp(-1, 1)))
        )
        x = linear("stem", norm("stem_norm", torch.zeros(C, A * W, dtype=torch.bfloat16))).relu()
        for i in range(L):
            sources = (x, torch.cat([half(queries[0, i]), token]), half(raw[0, i]))
            own = (0, 1, 2) if layout == "pro" else (0, 0, 0)
            turn = turned if layout == "pro" else lambda part: part
            query = turn(split(linear(f"blocks.{i}.query", x)))
            logits = [query @ turn(split(linear(f"blocks.{i}.key.{k}", s))).transpose(-2, -1)
                      for k, s in zip(own, sources, strict=True)]  # fmt: skip
            logits[2] = logits[2] * torch.tanh(made.blocks[i].gate)
            weights = (torch.cat(logits, -1) / math.sqrt(W // H)).softmax(-1)
            values = torch.cat(
                [split(linear(f"blocks.{i}.value.{k}", s)) for k, s in zip(own, sources, strict=True)], 1
            )
            read = (weights @ values).transpose(0, 1).reshape(C, W)
            x = linear(f"blocks.{i}.ffn", norm(f"blocks.{i}.norm", linear(f"blocks.{i}.out", read) + x)).relu()
    # 0 where matrix products of one and of several rows round alike; elsewhere an 8-bit step at most.
    torch.testing.assert_close(ours.float(), x.float(), rtol=1 / 128, atol=1 / 128)


def test_training_sees_noise_that_inference_does_not():
    made, (f, proprio) = bridge("base"), features()
    assert torch.equal(made(f, proprio), made(f, proprio))
    made.train()
    torch.manual_seed(0)
    first = made(f, proprio)
    assert not torch.equal(first, made(f, proprio))
    assert first.std(dim=1).max() > 1e-3  # only this tells the steps apart in training


def released_window(hidden_BLTD, *, num_patches, num_queries, num_prompt):
    """The windows that the released code reads as raw tokens (B, L, N, D) and action queries (B, L, Q, D).

    The sequence is [first token][N patches][rest of the prompt][Q queries][stop], whose prompt has `num_prompt` tokens
    beside the first: both windows lie one position early. The last patch and the last query are never read; the first
    token passes for a patch and the prompt's last for a query.
    """
    at = num_patches + num_prompt
    return hidden_BLTD[:, :, :num_patches], hidden_BLTD[:, :, at : at + num_queries]


def test_windows_lie_one_position_early():
    sequence = ["t0", "p1", "p2", "p3", "w1", "w2", "q1", "q2", "stop"]
    hidden = torch.arange(len(sequence), dtype=torch.float32)[None, None, :, None]
    raw, queries = released_window(hidden, num_patches=3, num_queries=2, num_prompt=2)
    name = lambda part: [sequence[int(i)] for i in part.flatten()]  # noqa: E731
    assert name(raw) == ["t0", "p1", "p2"] and name(queries) == ["w2", "q1"]


def test_masked_raw_tokens_do_not_matter():
    made, (f, proprio) = bridge("pro"), features()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 4:] = False
    wild = torch.where(mask[:, None, :, None], f.raw_BLND, 50.0)
    masked = lambda raw: made(Features(raw, mask, f.queries_BLQD, None, f.coords_NE), proprio)  # noqa: E731
    assert torch.equal(masked(wild), masked(f.raw_BLND))


def test_mistakes_are_explained():
    config = FaithfulConfig("base", width=W, heads=H, num_blocks=L, action_dim=A)
    with pytest.raises(ValueError, match="is 16 wide, as its backbone; got one of 8"):
        FaithfulBridge(config, chunk_size=C, feature_width=8, num_layers=L, proprio_dim=P)
    with pytest.raises(ValueError, match="reads 3 layers, this backbone has 2"):
        FaithfulBridge(config, chunk_size=C, feature_width=W, num_layers=2, proprio_dim=P)
    with pytest.raises(ValueError, match="even head width"):
        FaithfulBridge(FaithfulConfig("pro", width=9), chunk_size=C, feature_width=9, num_layers=24, proprio_dim=P)
    with pytest.raises(ValueError, match="reads 3 proprio values, got 2"):
        bridge("pro")(features()[0], torch.zeros(B, 2))
