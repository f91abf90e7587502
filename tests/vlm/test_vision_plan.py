"""The index tensors of a Qwen tower: one plan for many batch sizes, and no padding."""

import pytest
import torch
from tiny import WRITERS, open_prior, random_frames, write_checkpoint

QWENS = [name for name in WRITERS if name.startswith("qwen")]
SIZES = [(84, 84), (60, 112)]


@pytest.fixture(scope="module", params=QWENS)
def backbone(request, tmp_path_factory):
    prior = open_prior(write_checkpoint(request.param, tmp_path_factory.mktemp("plans")))
    if request.param == "qwen2_5_vl":
        prior.backbone.tower.config.window_size = 56  # so that frames have several windows, some cut off
    return prior.backbone


@pytest.mark.parametrize("size", SIZES)
def test_the_plan_of_a_batch_is_the_beginning_of_a_larger_one(backbone, size):
    for batch in range(1, 18):
        grid, plan = backbone.plan(batch, size)
        expected_grid, expected = backbone._make_plan(batch, size)
        assert torch.equal(grid, expected_grid)
        assert plan.keys() == expected.keys()
        for name, value in expected.items():
            ours = plan[name]
            if isinstance(value, torch.Tensor):
                assert ours.dtype == value.dtype
                assert torch.equal(ours, value), (name, batch)
            else:
                assert ours == value, (name, batch)
    if "cu_window_seqlens" in plan:
        assert len(plan["cu_window_seqlens"]) > len(plan["cu_seqlens"])


def test_batches_of_1_to_64_rows_need_seven_plans(backbone):
    backbone._plan.cache_clear()
    with torch.no_grad():
        for batch in range(1, 9):
            backbone.image_features(random_frames((84, 84), batch))
    assert backbone._plan.cache_info().misses == 4
    for batch in range(1, 65):
        backbone.plan(batch, (84, 84))
    assert backbone._plan.cache_info().misses == 7


def test_the_tower_computes_no_more_rows_than_there_are(backbone, monkeypatch):
    lengths = []
    tower = type(backbone.tower)
    forward = tower.forward
    monkeypatch.setattr(
        tower, "forward", lambda self, x, *a, **k: lengths.append(len(x)) or forward(self, x, *a, **k)
    )
    frames = random_frames((84, 84), 5)
    with torch.no_grad():
        one, five = backbone.image_features(frames[:1]), backbone.image_features(frames)
    assert lengths[1] == 5 * lengths[0]
    torch.testing.assert_close(five.tokens[:1], one.tokens, rtol=1e-4, atol=1e-5)
