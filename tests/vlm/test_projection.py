"""Linear layers of one input, LoRA merged or beside: what is computed, and what rounding loses."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import seeded
from torch import nn

from covr_fast.vlm.decode.projection import BesideLora, Called, projection
from covr_fast.vlm.model.adapters import lost_by_merging

K, NAMES = 64, ("a", "b", "c")
SIZES = (48, 32, 40)


def layers(dtype=torch.float32, bias=True, **options) -> tuple[nn.Module, list[nn.Module]]:
    """Three linear layers of one input. The last has no adapter."""
    generator = seeded(0)
    made = nn.ModuleDict({name: nn.Linear(K, n, bias=bias) for name, n in zip(NAMES, SIZES, strict=True)})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["a", "b"]} | options)
    model = get_peft_model(made.to(dtype), config)
    return model, [model.base_model.model[name] for name in NAMES]


def set_size(layer: nn.Module, size: float, seed: int = 1) -> torch.Tensor:
    """Makes a layer's LoRA `size` times as large as its weight; returns its change of the weight."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        up.copy_(torch.randn(up.shape, generator=seeded(seed)))
        change = (up @ down).norm() * layer.scaling["default"]
        up.mul_(size * layer.base_layer.weight.float().norm() / change)
        return layer.get_delta_weight("default")


@torch.no_grad()
def seen_change(project, plain: nn.Linear, rows=40_000) -> torch.Tensor:
    """The change of a layer's weight that many products with random inputs show, rounded as they are."""
    x = torch.randn(rows, K, generator=seeded(2)).to(torch.bfloat16)
    y = project(x).float() - F.linear(x.float(), *(p.float() for p in plain.parameters()))
    return torch.linalg.lstsq(x.float(), y).solution.T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_bfloat16_keeps_a_small_adapter_beside_and_loses_it_in_a_merge(size, bias):
    model, (layer, *_) = layers(torch.bfloat16, bias=bias)
    change = set_size(layer, size)
    share = {}
    for beside in (True, False):
        seen = seen_change(projection(layer, beside=beside), layer.base_layer)
        share[beside] = float((seen - change).norm() / change.norm())
        if beside:
            kept = float((seen * change).sum() / change.square().sum())
    lost = lost_by_merging(model)
    assert lost == pytest.approx(share[False], abs=0.1)
    assert lost > (0.7 if size == 1e-3 else 0.1)
    assert share[True] < 0.25 * lost  # what is left is noise of the products' rounding
    assert kept == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("state", ["one", "two active", "disabled", "merged", "disabled and merged"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_beside_equals_the_layers_of_peft(state, bias):
    model, adapted = layers(bias=bias)
    for layer in adapted[:2]:
        set_size(layer, 0.5)
    if state == "two active":
        model.add_adapter("other", LoraConfig(r=3, lora_alpha=2, target_modules=["b", "c"]))
        adapted = [model.base_model.model[name] for name in NAMES]
        for layer in adapted[1:]:
            layer.lora_B["other"].weight.normal_(generator=seeded(3))
        model.base_model.set_adapter(["default", "other"])
    if "merged" in state:
        model.merge_adapter()
    if "disabled" in state:
        model.base_model.disable_adapter_layers()
    product, x = projection(*adapted, beside=True), torch.randn(2, 3, K, generator=seeded(4))
    assert type(product) is BesideLora
    joined = projection(*adapted)(x)
    expected = torch.cat([layer(x) for layer in adapted], -1)
    torch.testing.assert_close(product(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-5)
    into = torch.ones(2, 3, sum(SIZES))
    product.add_to(into, x)
    torch.testing.assert_close(into, expected + 1, rtol=1e-5, atol=1e-5)


def test_base_weights_are_not_copied_beside():
    _, adapted = layers(torch.bfloat16)
    product = projection(*adapted, beside=True)
    for part, layer in zip(product._parts, adapted, strict=True):
        weight = getattr(layer, "base_layer", layer).weight
        assert part.weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
@torch.no_grad()
def test_what_is_no_plain_lora_is_called(options):
    _, adapted = layers(**options)
    for layer in adapted[:2]:
        set_size(layer, 0.5)
    product, x = projection(*adapted, beside=True), torch.randn(5, K, generator=seeded(4))
    assert type(product) is Called
    torch.testing.assert_close(product(x), torch.cat([layer(x) for layer in adapted], -1))


def test_what_a_merge_would_lose_is_none_nan_or_a_share():
    assert lost_by_merging(layers()[0]) is None, "float32 keeps it"
    model, (first, *_) = layers(torch.bfloat16)
    assert torch.tensor(lost_by_merging(model)).isnan(), "fresh adapters change nothing"
    set_size(first, 1.0)
    assert 0 < lost_by_merging(model) < 0.01
    model.base_model.disable_adapter_layers()
    assert lost_by_merging(model) is None
    dora, (first, *_) = layers(torch.bfloat16, use_dora=True)
    set_size(first, 1e-3)
    assert lost_by_merging(dora) > 0.5
