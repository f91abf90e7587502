"""The batched image path against the processor's own."""

import pytest
import torch
from tiny import make_nano, random_frames, seeded

from covr_fast.vlm.model.attention import segmented_sdpa


@pytest.mark.parametrize("size", [(84, 84), (96, 96), (64, 64), (60, 84), (48, 48), (200, 120)])
def test_pixels_equal_the_processors(shared_nano, size):
    images = random_frames(size, 3)
    ours = shared_nano.backbone.pixels(images)
    theirs = shared_nano.backbone.process(shared_nano.text, images)["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 7, 1, 4]])
def test_segmented_attention_is_attention_per_segment(lengths):
    generator, total = seeded(0), sum(lengths)
    q, k, v = (torch.randn(1, 2, total, 8, generator=generator, requires_grad=True) for _ in range(3))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out, _ = segmented_sdpa(
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=ends, max_length_q=max(lengths), scaling=0.3
    )
    parts = [x.split(lengths, 2) for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = torch.cat([attend(*p, scale=0.3) for p in zip(*parts, strict=True)], 2).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_eager_attention_gives_the_same_answers(shared_nano, frames):
    eager = make_nano(attention="eager")
    assert torch.equal(eager.reference(frames).token_ids, shared_nano(frames).token_ids)
    assert torch.equal(eager(frames).token_ids, shared_nano(frames).token_ids)
