"""The heat-map head's arithmetic against references written from the equations, and a second look by the same words."""

import numpy as np
import pytest
import torch

from tests.vla.training.heatmap.toy_demos import SIZE, toy_demos
from vla.model.heatmap.config import HeatmapConfig
from vla.model.heatmap.head import HeatmapHead, Seen
from vla.model.heatmap.orthographic import COMPONENTS, SIGNS
from vla.training.heatmap.train import HeatmapTrainConfig, build


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(0)
    return HeatmapHead(
        width=8, token_width=6, num_queries=2, side=2, fine_channels=5, fine_side=4, looks=2, resolution=8, state_dim=2
    )


def test_up_sampling_is_convex(head):
    """Every pixel is the mean of the nine cells around its own by the softmax of its nine numbers."""
    coarse, cells = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, 8)
    fine = head.upsampled(coarse, cells).detach()
    told = torch.einsum("bvhwc,oc->bvhwo", cells, head.mask.weight[:, :, 0, 0]) + head.mask.bias
    weight = (0.1 * told.detach()).view(2, 3, 4, 4, 9, 4).softmax(-2)
    for row, column in ((0, 0), (3, 5), (7, 7), (2, 6)):
        ring = [(min(max(row // 2 + r, 0), 3), min(max(column // 2 + c, 0), 3)) for r in (-1, 0, 1) for c in (-1, 0, 1)]
        around = torch.stack([coarse[:, :, r, c] for r, c in ring], -1)
        own = weight[:, :, row // 2, column // 2, :, 2 * (row % 2) + column % 2]
        assert fine[:, :, row, column].allclose((own * around).sum(-1), atol=1e-5)


def test_cells_know_where_they_are(head):
    """Each cell's distance from the hand, near and far, along right and down, and its place in the robot's frame."""
    hand, centre, half = torch.tensor([[0.5, 0.1, 0.2]]), torch.tensor([[0.53, 0.0, 0.22]]), torch.tensor([0.28])
    told = head._coordinates(hand, centre, half)[0]
    for view, row, column in ((0, 0, 3), (1, 2, 1), (2, 3, 0)):
        wanted = []
        for place, cell in ((0, column), (1, row)):
            part, sign = COMPONENTS[view][place], SIGNS[view][place]
            at = centre[0, part] + sign * half[0] * ((cell + 0.5) / 4 * 2 - 1)
            apart = at - hand[0, part]
            wanted += [np.tanh(apart / 0.05), np.tanh(apart / 0.25), at]
        near = np.exp(-(wanted[0] ** 2 + wanted[3] ** 2))
        np.testing.assert_allclose(told[view, row, column], [*wanted, half[0], near], atol=1e-6)


def test_all_that_is_read_of_a_cell_is_the_sum_of_its_convolutions(head):
    """The products that replace four convolutions and one to a single channel give what these give."""
    rng = torch.Generator().manual_seed(1)
    seen = Seen(
        torch.randn(1, 3, 4, 6, generator=rng), torch.randn(1, 2, 6, generator=rng),
        torch.randn(1, 3, 5, 4, 4, generator=rng), torch.randn(1, 2, 3, 4, 4, generator=rng),
    )  # fmt: skip
    hand, centre, half = torch.rand(1, 3), torch.rand(1, 3), torch.tensor([0.2])
    slot = head.fixed_slot(torch.tensor([1]))
    normal = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:])  # noqa: E731
    with torch.no_grad():
        logits, maps, _ = head(seen, slot, hand, centre, half)
        x = head.from_tokens(normal(seen.tokens_BVPD)) + head.view[:, None]
        x = torch.nn.functional.interpolate(
            x[0].mT.unflatten(-1, (2, 2)), scale_factor=2, mode="bilinear", align_corners=False
        )
        x = x + head.from_fine(seen.fine_BVCHW[0]) + head.from_looks(seen.looks_BKVHW[0].transpose(0, 1) / 8)
        x = x + head.from_coordinates(head._coordinates(hand, centre, half)[0].permute(0, 3, 1, 2))
        asked = torch.nn.functional.gelu(head.ask(normal(seen.queries_BQD).flatten(1)) + slot @ head.slots)
        for modulate, mix in zip(head.modulate, head.mix, strict=True):
            scale, shift = (part[0, :, None, None] for part in modulate(asked).chunk(2, -1))
            y = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (4, 4, 8)).permute(0, 3, 1, 2)
            x = x + mix(torch.nn.functional.gelu(shift + y * (1 + scale)))
        y = torch.nn.functional.gelu(x)
        coarse = head.heat(y)[:, 0] + (slot @ head.prior)[0, 1] * seen.looks_BKVHW[0, 1]
        assert maps[0].allclose(y, atol=1e-4)
        assert logits[0].allclose(head.upsampled(coarse[None], y.permute(0, 2, 3, 1)[None])[0], atol=1e-4)


@pytest.mark.parametrize("backbone", ["small", "tiny"])
def test_a_second_look_hears_what_the_first_heard(backbone):
    """Other views beside the words that were heard already are what a fresh look at them is."""
    config = HeatmapConfig(width=16, picture_size=SIZE, backbone=backbone)
    policy = build(HeatmapTrainConfig(model=config, pretrained=None), toy_demos())
    model, obs = policy.model, toy_demos().observation([0, 60])
    cloud, ids, mask, *_ = policy.inputs(policy.processor.arrays(obs), obs.proprio)
    centre, half = model.whole(2)
    first, second = model.views(cloud, centre, half), model.views(cloud, centre + 0.02, half / 2)
    with torch.no_grad():
        seen = model._seen(model._asked_again(model._asked(first, ids, mask), second))
    for name, wanted in model.look(second, ids, mask).tensors().items():
        assert torch.equal(seen.tensors()[name], wanted), name
    assert not torch.equal(seen.tokens_BVPD, model.look(first, ids, mask).tokens_BVPD)
