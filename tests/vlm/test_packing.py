"""Packed rows: the same losses, gradients and rounds as padded ones, without their padding."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import WRITERS, frames_for, make_nano, open_prior, seeded, write_checkpoint
from torch import Tensor

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner
from covr_fast.vlm.finetune.lora import add_lora, trainable
from covr_fast.vlm.finetune.objective import AnswerModel, Samples, weighted_loss
from covr_fast.vlm.model import nano
from covr_fast.vlm.model.attention import choose_attention
from covr_fast.vlm.model.rows import (
    PACKED_SDPA,
    FlashPacked,
    Packed,
    Padded,
    TrainingCache,
    arrange,
    packed_sdpa,
    training_attention,
)

CPU = torch.device("cpu")
ACTIONS = torch.tensor([[-0.1, -0.2], [1.0, 0.0], [-1.0, 0.55], [0.3, 0.3], [0.2, -0.4]])
RETURNS = torch.tensor([6.0, 1.0, 5.0, 9.0, 7.0])


@pytest.fixture(scope="module", params=sorted(WRITERS))
def checkpoint(request, tmp_path_factory):
    """One whose tokenizer has a token for the sign, so that answers differ in length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano, "ANSWER_TOKENS", tuple(t for t in nano.ANSWER_TOKENS if t[0] != "-"))
        return write_checkpoint(request.param, tmp_path_factory.mktemp("uneven"))


@pytest.fixture
def opened(checkpoint):
    return open_prior(checkpoint), frames_for(checkpoint, 5)


class Micro:
    """A micro-batch of five answers of different lengths, two of zero weight."""

    def __init__(self, prior: ActionPrior, frames: Tensor, *, checkpointing: bool = False) -> None:
        self.backbone = prior.backbone
        if checkpointing:
            self.backbone.checkpoint_activations()
        layout = prior.layout(tuple(frames.shape[2:]))
        self.model = AnswerModel(self.backbone, layout, checkpointing=checkpointing)
        self.samples = Samples.build(prior.grammar, frames, ACTIONS, RETURNS)
        self.rows = torch.arange(5)
        self.lengths = self.samples.lengths(self.rows)
        assert len(self.lengths.unique()) > 1, "all answers are of one length: nothing is padded"
        assert (self.samples.weights == 0).sum() == 2
        self.own = self.lengths - 1 + len(layout.body) + checkpointing * len(layout.prefix)
        self.shared = (not checkpointing) * len(layout.prefix)

    def gradients(self, attention: str, rows: Tensor | None = None) -> list[Tensor]:
        """The loss of `rows` and its gradients of all weights that are trained."""
        self.backbone.attention = attention
        rows = self.rows if rows is None else rows
        image = self.model.image(self.samples.frames[rows])
        loss = weighted_loss(self.model, self.samples, rows, image, 40, 0.1)
        weights = trainable(self.backbone.model)
        return [loss.detach(), *torch.autograd.grad(loss, weights, allow_unused=True)]


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None or b is not None]
    assert len(pairs) > 10
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)


def make_trainable(prior: ActionPrior, mode: str) -> None:
    if mode == "full":
        prior.backbone.model.requires_grad_(True)
        return
    add_lora(prior.backbone, 4, 8, 0)
    generator = seeded(0)
    with torch.no_grad():
        for weight in trainable(prior.backbone.model):  # a fresh adapter's second factor is 0
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


# ---------------------------------------------------------------------- SDPA


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_packed_and_padded_losses_and_gradients_agree(opened, mode, checkpointing):
    prior, frames = opened
    make_trainable(prior, mode)
    micro = Micro(prior, frames, checkpointing=checkpointing)
    agree(micro.gradients(training_attention("sdpa", "on")), micro.gradients("sdpa"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_padding_goes_through_the_layers(opened, checkpointing):
    prior, frames = opened
    make_trainable(prior, "full")
    micro = Micro(prior, frames, checkpointing=checkpointing)
    counted = []
    for layer in prior.backbone.decoder.layers[1:]:
        layer.mlp.register_forward_hook(lambda _, args, __: counted.append(args[0].shape[:-1].numel()))
    micro.backbone.attention = training_attention("sdpa", "on")
    with torch.no_grad():
        micro.model.hidden(micro.model.image(frames), micro.samples.answers, micro.lengths)
    shared = [micro.shared] * (micro.shared > 0)
    layers = len(prior.backbone.decoder.layers) - 1
    assert sorted(counted) == sorted([*shared, int(micro.own.sum())] * layers)


def test_a_single_short_answer(opened):
    """Padded to the width of a round that has longer ones."""
    prior, frames = opened
    make_trainable(prior, "full")
    micro = Micro(prior, frames)
    row = torch.tensor([3])
    assert micro.lengths[row] < micro.lengths.max()
    agree(micro.gradients(training_attention("sdpa", "on"), row), micro.gradients("sdpa", row))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("lengths", [[3, 7, 1, 4], [2, 7], [5], [1, 1]])
def test_packed_attention_is_attention_per_row(lengths, past, groups):
    generator = seeded(0)
    total, kv_heads, dim = sum(lengths), 2, 8

    def draw(heads: int, count: int) -> Tensor:
        return torch.randn(1, heads, count, dim, generator=generator, requires_grad=True)

    q, k, v = draw(kv_heads * groups, total), draw(kv_heads, total), draw(kv_heads, total)
    prefix = draw(kv_heads, past), draw(kv_heads, past)
    packed = Packed(torch.tensor(lengths), 7, past, CPU)
    keys, values = TrainingCache([prefix], packed).update(k, v, 0) if past else (k, v)
    arguments = packed.attention(q)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=groups)
    out, _ = packed_sdpa(module, q, keys, values, scaling=0.3, **arguments)

    expected = []
    for qs, ks, vs in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True):
        for i in range(qs.shape[2]):
            seen = (torch.cat((p, x[:, :, : i + 1]), 2) for p, x in zip(prefix, (ks, vs), strict=True))
            key, value = (x.repeat_interleave(groups, 1) for x in seen)
            scores = 0.3 * (qs[:, :, i, None] * key).sum(-1)
            expected.append((scores.softmax(-1)[..., None] * value).sum(2))
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(out, expected)
    inputs = (q, k, v, *prefix)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), inputs, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True),
        strict=True,
    ):
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- FlashAttention


def strict_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """FlashAttention's function for rows of different lengths, in plain torch and with its demands.

    Causality is aligned with the rows' ends, as in the originals since version 2.1.
    """
    assert causal
    rows = []
    for cu, longest, tokens in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert cu.dtype == torch.int32
        assert cu.device == tokens.device
        assert cu.is_contiguous()
        assert isinstance(longest, int)
        assert cu[0] == 0
        assert cu[-1] == len(tokens)
        assert cu.diff().min() > 0
        assert cu.diff().max() == longest
        rows.append(cu.diff().tolist())
    out = []
    parts = (q.split(rows[0]), k.split(rows[1]), v.split(rows[1]))
    for queries, keys, values in zip(*parts, strict=True):
        groups = queries.shape[1] // keys.shape[1]
        seen = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
        q_, k_, v_ = (x.transpose(0, 1) for x in (queries, keys, values))
        k_, v_ = (x.repeat_interleave(groups, 0) for x in (k_, v_))
        out.append(F.scaled_dot_product_attention(q_, k_, v_, seen, scale=softmax_scale).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def flash(monkeypatch) -> str:
    """An attention implementation that goes the way of FlashAttention up to the call of its kernel."""

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("only the function for rows of different lengths takes packed rows")

    package = ModuleType("flash_attn_interface")
    package.__spec__ = ModuleSpec("flash_attn_interface", None)  # transformers looks for it
    package.flash_attn_varlen_func = strict_varlen
    package.flash_attn_func = package.flash_attn_with_kvcache = refused
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    monkeypatch.setattr("transformers.modeling_flash_attention_utils._loaded_implementation", None)
    return "flash_attention_3"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_flash_attention_gets_packed_rows_and_no_mask(opened, flash, checkpointing, alike):
    prior, frames = opened
    make_trainable(prior, "full")
    micro = Micro(prior, frames, checkpointing=checkpointing)
    rows = (micro.lengths == micro.lengths.mode().values).nonzero()[:, 0] if alike else micro.rows
    assert len(rows) > 1
    agree(micro.gradients(training_attention(flash, "auto"), rows), micro.gradients("sdpa", rows))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flash_attention_on_a_gpu(checkpoint, checkpointing):
    attention = choose_attention("auto", torch.device("cuda"), torch.bfloat16).name
    if attention == "sdpa":
        pytest.skip("no FlashAttention is installed that this GPU can run")
    prior = ActionPrior.from_pretrained(checkpoint, action_dim=2, device="cuda", attention=attention)
    make_trainable(prior, "full")
    micro = Micro(prior, frames_for(checkpoint, 5), checkpointing=checkpointing)
    packed, padded = micro.gradients(attention), micro.gradients("sdpa")
    torch.testing.assert_close(packed[0], padded[0], rtol=2e-2, atol=0)
    flat = [torch.cat([g.flatten() for g in side[1:] if g is not None]).float() for side in (packed, padded)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99


# ---------------------------------------------------------------------- the tuner's option


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_round_ends_with_the_same_weights(checkpoint, mode):
    frames = frames_for(checkpoint, 15)
    tuned, shapes = [], []
    for packing in ("on", "off"):
        prior = open_prior(checkpoint)
        config = TunerConfig(
            mode=mode, lora_rank=4, lora_alpha=8, learning_rate=1e-4, epochs=2, batch_size=6, micro_batch=4,
            packing=packing,
        )  # fmt: skip
        tuner = VLMTuner(prior, config)
        layer = tuner._backbone.decoder.layers[0].mlp
        layer.register_forward_hook(
            lambda _, args, __, packing=packing: shapes.append((packing, len(args[0])))
        )
        before = torch.cat([p.detach().flatten() for p in trainable(prior.backbone.model)])
        tuner.start(frames, ACTIONS.repeat(3, 1), torch.linspace(0, 1, 15))
        report = tuner.poll()
        tuner.publish()
        after = torch.cat([p.detach().flatten() for p in trainable(prior.backbone.model)])
        tuned.append((report.loss_after, after - before))
    assert ("on", 4) not in shapes
    assert ("off", 4) in shapes
    (loss, moved), (padded_loss, padded_moved) = tuned
    assert moved.norm() > 0
    assert loss == pytest.approx(padded_loss, rel=1e-4)
    assert (moved - padded_moved).norm() < 1e-2 * padded_moved.norm()


def test_only_the_tuners_own_decoder_packs(nano):
    tuner = VLMTuner(nano, TunerConfig(mode="full"))
    assert (nano.backbone.attention, tuner._backbone.attention) == ("sdpa", PACKED_SDPA)
    assert VLMTuner(nano, TunerConfig(mode="full", packing="off"))._backbone.attention == "sdpa"


def test_what_is_packed():
    equal, different = torch.tensor([4, 4]), torch.tensor([4, 3])
    for attention, lengths, expected in (
        ("flash_attention_2", equal, FlashPacked),
        ("flash_attention_2", different, FlashPacked),
        (PACKED_SDPA, equal, Padded),
        (PACKED_SDPA, different, Packed),
        ("sdpa", different, Padded),
        ("eager", different, Padded),
    ):
        assert type(arrange(attention, lengths, 4, 2, CPU)) is expected


def test_eager_attention_pads_and_cannot_be_told_to_pack():
    prior = make_nano(attention="eager")
    with pytest.raises(
        ValueError, match=r"packing='on' is not supported with 'eager' attention: set packing"
    ):
        VLMTuner(prior, TunerConfig(packing="on"))
    assert not prior.backbone.adapted, "nothing has been changed before the refusal"
    tuner = VLMTuner(prior, TunerConfig(mode="full", epochs=1))
    tuner.start(torch.zeros(4, 3, 56, 56, dtype=torch.uint8), ACTIONS[:4], torch.ones(4))
    assert tuner.poll().steps == 1


def test_flash_attention_cannot_be_told_to_pad():
    with pytest.raises(ValueError, match="packing='off' is not supported with 'flash_attention_2'"):
        training_attention("flash_attention_2", "off")
