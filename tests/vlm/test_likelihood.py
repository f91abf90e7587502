"""What the VLM thinks: likelihoods and distributions are those of transformers' own forward, normalised."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_adapters import PLACES, adapt
from test_mode import MODES
from tiny import ACTIONS, ROWWISE, equal, make_nano, random_frames, seeded, write_qwen2_5_vl
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, AutoTokenizer

from covr_fast.vlm import ActionPrior
from covr_fast.vlm.decode import numbers
from covr_fast.vlm.decode.transformer import Transformer

CLOSE = {"rtol": 0, "atol": 3e-5}
"""Of log-probabilities in nats, down to -40. The models are in float64, logits and sums in float32."""


def true_log_prob(prior: ActionPrior, frames: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """float64[B]: the sum of stepwise log-probabilities over the allowed tokens, by transformers' forward on
    the prior's own pixels."""
    backbone, grammar = prior.backbone, prior.grammar
    answers = grammar.encode(actions)
    inputs = backbone.process(prior.text, frames)
    inputs["pixel_values"] = backbone.pixels(frames).view_as(inputs["pixel_values"]).to(backbone.dtype)
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat((inputs["input_ids"], answers), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, answers.shape[1]))
    with torch.no_grad():
        logits = backbone.base(**inputs).logits[:, prompt - 1 : -1].double()
    total = torch.zeros(len(answers), dtype=torch.float64)
    for row, answer in enumerate(answers.tolist()):
        for t, token in enumerate(answer[: answer.index(grammar.eos_token_id) + 1]):
            allowed = grammar.allowed(answer[:t])
            total[row] += logits[row, t, allowed].log_softmax(0)[allowed.index(token)]
    return total


def random_actions(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """On and beside the grid, both ends included."""
    return (torch.rand(count, dim, generator=seeded(seed)) * 2.4 - 1.2).clamp(-1, 1)


def greedy(prior: ActionPrior, dim: int, log_prob: torch.Tensor) -> float:
    """The value that a distribution float32[G] leads to if each token is the likeliest one."""
    left = list(enumerate(prior.grammar._slots[dim]))
    depth = 0
    while len(left) > 1:
        mass: dict[int, float] = {}
        for g, word in left:
            mass[word[depth]] = mass.get(word[depth], 0.0) + math.exp(log_prob[g])
        left = [(g, word) for g, word in left if word[depth] == max(mass, key=mass.__getitem__)]
        depth += 1
    return prior.grammar.grid[left[0][0]].item()


def check(prior: ActionPrior, frames: torch.Tensor) -> None:
    """Likelihoods against transformers, distributions against likelihoods and answers, confidence against
    distributions."""
    count, dims = len(frames), prior.action_dim
    actions = random_actions(count, dims)
    found = prior.log_prob(frames, actions)
    torch.testing.assert_close(found.double(), true_log_prob(prior, frames, actions), **CLOSE)

    answers = prior(frames, confidence=True)
    places = prior.grammar.places(actions)
    total, entropy = torch.zeros(count), torch.zeros(count)
    for dim in range(dims):
        own = prior.distribution(frames, dim, given=actions[:, :dim])
        torch.testing.assert_close(own.log_prob.exp().sum(1), torch.ones(count), rtol=0, atol=1e-5)
        total += own.log_prob.gather(1, places[:, dim : dim + 1])[:, 0]
        after = prior.distribution(frames, dim)
        entropy += after.entropy
        assert [greedy(prior, dim, row) for row in after.log_prob] == answers.action[:, dim].tolist()
    torch.testing.assert_close(total, found, **CLOSE)
    largest = dims * math.log(len(prior.grammar.grid))
    torch.testing.assert_close(answers.confidence, 1 - entropy / largest, rtol=0, atol=1e-5)
    assert torch.equal(prior(frames).token_ids, answers.token_ids)
    assert 0 < answers.confidence.min() < answers.confidence.max() < 1


# ---- what is computed ----


def test_on_every_backbone(opened):
    prior, frames = opened
    prior.backbone.model.double()
    prior.weights_changed()
    check(prior, frames)


def test_in_float32(opened):
    prior, frames = opened
    actions = random_actions(len(frames), 2)
    expected = true_log_prob(prior, frames, actions)
    torch.testing.assert_close(prior.log_prob(frames, actions).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["dora", "oft", "whole head", "head", "embeddings", "tokens"])
def test_with_adapters(place):
    nano, frames = make_nano(dtype=torch.float64), random_frames((84, 84))
    before = nano.log_prob(frames, ACTIONS)
    adapt(nano, PLACES[place](nano))
    nano.weights_changed()
    assert (nano.log_prob(frames, ACTIONS) - before).abs().max() > 1e-3
    check(nano, frames)


@pytest.mark.parametrize("bits", [ROWWISE, "4bit"], ids=["8bit", "4bit"])
def test_quantized(tmp_path, bits):
    write_qwen2_5_vl(tmp_path)
    prior = ActionPrior.from_pretrained(tmp_path, action_dim=2, device="cpu", quantization=bits)
    frames = random_frames((84, 84))
    found = prior.log_prob(frames, ACTIONS)
    # 8 bits round the inputs of layers too: a difference in float32 may become one step of that.
    close = {"rtol": 0, "atol": 1e-3 if bits == "4bit" else 0.1}
    torch.testing.assert_close(found.double(), true_log_prob(prior, frames, ACTIONS), **close)
    parts = [prior.distribution(frames, dim, given=ACTIONS[:, :dim]).log_prob for dim in (0, 1)]
    places = prior.grammar.places(ACTIONS)
    both = [part.gather(1, places[:, dim : dim + 1])[:, 0] for dim, part in enumerate(parts)]
    torch.testing.assert_close(sum(both), found, **close)


def test_every_answer_is_counted_once():
    """All 441 answers of two numbers with one decimal: each alone against transformers, all together 1."""
    prior = make_nano(decimals=1, dtype=torch.float64)
    actions = torch.cartesian_prod(prior.grammar.grid, prior.grammar.grid)
    frames = random_frames((56, 56), 1).expand(len(actions), -1, -1, -1)
    found = prior.log_prob(frames, actions).double()
    torch.testing.assert_close(found.exp().sum().item(), 1.0, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, true_log_prob(prior, frames, actions), **CLOSE)
    table = found.view(21, 21)
    first = prior.distribution(frames[:1]).log_prob[0].double()
    torch.testing.assert_close(table.logsumexp(1), first, **CLOSE)
    second = prior.distribution(frames[:21], 1, given=prior.grammar.grid[:, None]).log_prob.double()
    torch.testing.assert_close(table - first[:, None], second, **CLOSE)


def test_mean_mode_and_entropy(shared_nano, frames):
    found = shared_nano.distribution(frames)
    p, values = found.log_prob.double().exp(), found.values.double()
    assert values.tolist() == pytest.approx([step / 100 for step in range(-100, 101)])
    torch.testing.assert_close(found.mean.double(), (p * values).sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), -(p * p.log()).sum(1), rtol=0, atol=1e-4)
    assert found.mode.tolist() == found.values[p.argmax(1)].tolist()
    assert len(found) == len(frames)


def test_sampled_answers_have_the_distributions_frequencies(shared_nano, frames):
    """Means of the first number and of its square over 600 samples."""
    images = frames[:1].expand(600, -1, -1, -1)
    drawn = shared_nano(images, temperature=1.0, generator=seeded(0)).action
    found = shared_nano.distribution(frames[:1])
    p = found.log_prob[0].exp()
    assert drawn[:, 0].mean().item() == pytest.approx(found.mean.item(), abs=0.08)
    assert drawn[:, 0].square().mean().item() == pytest.approx((p @ found.values.square()).item(), abs=0.08)


@pytest.mark.parametrize("decimals", [2, 3])
@pytest.mark.parametrize("pieces", [("-0.1", "0.9", "0.55"), tuple(f"{n:02d}" for n in range(40))])
def test_tokens_of_several_characters(tmp_path, pieces, decimals):
    """Some numbers take fewer tokens than others of the same text length."""
    write_qwen2_5_vl(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    options = {"decimals": decimals, "device": "cpu", "dtype": torch.float64}
    prior = ActionPrior.from_pretrained(tmp_path, action_dim=3, **options)
    assert len({len(word) for word in prior.grammar._slots[1]}) > 1
    check(prior, random_frames((56, 56)))


def test_one_number_with_many_values():
    options = {"decimals": 4, "device": "cpu", "dtype": torch.float64}
    prior = ActionPrior.from_pretrained("nano", action_dim=1, **options)
    found = prior.distribution(random_frames((56, 56), 1))
    assert found.log_prob.shape == (1, 20001)
    assert found.log_prob.double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    actions = random_actions(6, 1)
    direct = prior.log_prob(random_frames((56, 56), 1).expand(6, -1, -1, -1), actions)
    places = prior.grammar.places(actions)[:, 0]
    torch.testing.assert_close(found.log_prob[0, places], direct, **CLOSE)


def test_a_small_memory_changes_nothing(shared_nano, frames, monkeypatch):
    """Few nodes and few rows in a forward."""
    actions = random_actions(5, 2)

    def results(prior):
        return (
            prior.log_prob(frames, actions),
            prior.distribution(frames, 1).log_prob,
            prior(frames, confidence=True).confidence,
        )

    expected = results(shared_nano)
    lengths = []
    forward = Transformer.__call__

    def watched(self, x, *arguments, **options):
        lengths.append(x.shape[:2])
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(numbers, "MOST_NODES", 9)
    monkeypatch.setattr(numbers, "MOST_POSITIONS", 18)
    monkeypatch.setattr(Transformer, "__call__", watched)
    for got, want in zip(results(make_nano()), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    trees = [(rows, count) for rows, count in lengths if count <= 9 and rows <= 18 // count]
    assert len(trees) > 20


def test_rows_do_not_depend_on_their_batch(shared_nano, frames):
    actions = random_actions(5, 2)
    alone = [shared_nano.log_prob(frames[i : i + 1], actions[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(shared_nano.log_prob(frames, actions), torch.cat(alone), rtol=0, atol=1e-5)
    alone = [shared_nano.distribution(frames[i : i + 1], 1, given=actions[i : i + 1, :1]) for i in range(5)]
    together = shared_nano.distribution(frames, 1, given=actions[:, :1]).log_prob
    torch.testing.assert_close(together, torch.cat([x.log_prob for x in alone]), rtol=0, atol=1e-5)


def test_actions_are_rounded_to_the_grid(shared_nano, frames):
    near = torch.tensor([[0.104, -7.0]]).expand(5, -1)
    on = torch.tensor([[0.10, -1.0]]).expand(5, -1)
    assert torch.equal(shared_nano.log_prob(frames, near), shared_nano.log_prob(frames, on))
    got, want = (shared_nano.distribution(frames, 1, given=x[:, :1]).log_prob for x in (near, on))
    assert torch.equal(got, want)


def test_half_precision(frames):
    """Close to float32, and normalised as well as that: the softmax over the tokens is in float32."""
    exact, rough = make_nano(), make_nano(dtype=torch.bfloat16)
    actions = random_actions(5, 2)
    for dim in (0, 1):
        found = [prior.distribution(frames, dim, given=actions[:, :dim]) for prior in (exact, rough)]
        assert found[1].log_prob.dtype == torch.float32
        torch.testing.assert_close(found[1].log_prob.exp().sum(1), torch.ones(5), rtol=0, atol=1e-5)
        assert (found[0].mean - found[1].mean).abs().max() < 0.1
    ours = [prior.log_prob(frames, actions) for prior in (exact, rough)]
    torch.testing.assert_close(*ours, rtol=0, atol=0.5)


# ---- confidence ----


def test_confidence_follows_a_sampled_answer(shared_nano, frames):
    answers = shared_nano(frames, temperature=3.0, generator=seeded(1), confidence=True)
    without = shared_nano(frames, temperature=3.0, generator=seeded(1))
    assert torch.equal(answers.token_ids, without.token_ids)
    assert without.confidence is None
    found = [shared_nano.distribution(frames, d, given=answers.action[:, :d]).entropy for d in (0, 1)]
    expected = 1 - sum(found) / (2 * math.log(201))
    torch.testing.assert_close(answers.confidence, expected, rtol=0, atol=1e-5)
    greedy_answers = shared_nano(frames, confidence=True)
    assert not torch.equal(answers.confidence, greedy_answers.confidence)


def test_confidence_costs_one_forward(shared_nano, frames, monkeypatch):
    shared_nano(frames, confidence=True)
    lengths = []
    forward = Transformer.__call__

    def counting(self, x, *arguments, **options):
        lengths.append(x.shape[1])
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(Transformer, "__call__", counting)
    shared_nano(frames)
    plain = list(lengths)
    lengths.clear()
    shared_nano(frames, confidence=True)
    assert lengths == [*plain, sum(len(tree.tokens) for tree in shared_nano.grammar.trees)]
    lengths.clear()
    shared_nano.log_prob(frames, random_actions(5, 2))
    assert len(lengths) == 1


# ---- modes, threads and bad input ----


@pytest.mark.parametrize("name", MODES)
def test_modes_of_the_caller(shared_nano, name):
    frames, actions = random_frames((84, 84), 4, seed=1), ACTIONS

    def results(prior):
        return [
            prior.log_prob(frames, actions),
            prior.distribution(frames).log_prob,
            prior.distribution(frames, 1).log_prob,
            prior(frames, confidence=True).confidence,
        ]

    expected = results(shared_nano)
    with MODES[name]():
        prior = make_nano()
        got = results(prior)
    assert not any(x.is_inference() or x.requires_grad for x in got)
    assert equal(got, expected)
    assert equal(results(prior), expected)


def test_threads(nano, frames):
    actions = random_actions(5, 2)
    expected = nano.log_prob(frames, actions), nano.distribution(frames, 1).log_prob
    with ThreadPoolExecutor(3) as pool:
        asked = [
            (
                pool.submit(nano.log_prob, frames, actions),
                pool.submit(nano.distribution, frames, 1),
                pool.submit(nano, frames),
            )
            for _ in range(4)
        ]
        for log_prob, distribution, _ in asked:
            torch.testing.assert_close(log_prob.result(), expected[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(distribution.result().log_prob, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ask", [lambda p, f: p.log_prob(f, ACTIONS[:1]), lambda p, f: p.distribution(f, 1)])
def test_weights_are_not_changed_in_the_middle(nano, frames, ask):
    """Whoever holds the prior's lock, as `publish` does, comes before or after."""
    thread = threading.Thread(target=ask, args=(nano, frames[:1]))
    with nano.lock:
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()


def test_new_weights(frames):
    nano = make_nano(dtype=torch.float64)
    before = nano.log_prob(frames, random_actions(5, 2))
    with torch.no_grad():
        for weight in nano.backbone.model.parameters():
            weight.mul_(1.1)
    nano.weights_changed()
    assert not torch.equal(nano.log_prob(frames, random_actions(5, 2)), before)
    check(nano, frames)


def test_bad_input(shared_nano, frames):
    actions = torch.zeros(5, 2)
    for call, error, message in (
        (lambda: shared_nano.log_prob(frames.float(), actions), TypeError, "images must be a uint8"),
        (lambda: shared_nano.log_prob(frames, actions[:4]), ValueError, r"actions must have shape \[5, 2\]"),
        (lambda: shared_nano.log_prob(frames, actions[:, :1]), ValueError, r"not \[5, 1\]"),
        (lambda: shared_nano.log_prob(frames, actions.int()), TypeError, "actions must be a float tensor"),
        (lambda: shared_nano.log_prob(frames, actions.numpy()), TypeError, "ndarray"),
        (lambda: shared_nano.log_prob(frames, actions * torch.nan), ValueError, "actions must be finite"),
        (lambda: shared_nano.distribution(frames, 2), ValueError, "dim must be between 0 and 1, not 2"),
        (lambda: shared_nano.distribution(frames, -1), ValueError, "dim must be between 0 and 1, not -1"),
        (lambda: shared_nano.distribution(frames, 0.5), TypeError, "dim is 0.5"),
        (lambda: shared_nano.distribution(frames, 1, given=actions), ValueError, r"given must .*\[5, 1\]"),
        (lambda: shared_nano.distribution(frames.numpy()), TypeError, "ndarray"),
    ):
        with pytest.raises(error, match=message):
            call()


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.needs_cuda
@pytest.mark.parametrize("graph", [False, True])
def test_cuda_equals_cpu(graph, frames):
    options = {"action_dim": 2, "dtype": torch.float64, "seed": 0}
    here = ActionPrior.from_pretrained("nano", device="cpu", **options)
    there = ActionPrior.from_pretrained("nano", device="cuda", graph=graph, **options)
    actions = random_actions(5, 2)
    for _ in range(4):  # the third call is recorded, the fourth replayed
        for got, expected in (
            (there.log_prob(frames, actions), here.log_prob(frames, actions)),
            (there.distribution(frames, 1).log_prob, here.distribution(frames, 1).log_prob),
            (there.distribution(frames).mean, here.distribution(frames).mean),
            (there(frames, confidence=True).confidence, here(frames, confidence=True).confidence),
        ):
            assert got.is_cuda
            torch.testing.assert_close(got.cpu(), expected, **CLOSE)
