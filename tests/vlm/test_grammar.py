"""The answer grammar: one spelling per action, whatever the tokenizer's pieces are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from covr_fast.vlm.answer.grammar import ActionGrammar
from covr_fast.vlm.answer.prompt import default_prompt, format_action, parse_action, spell
from covr_fast.vlm.answer.tree import number_tree
from covr_fast.vlm.model.nano import build_tokenizer

CONTEXT = "<|im_end|>\n<|im_start|>assistant\n"


def bytes_and(*pieces: str) -> PreTrainedTokenizerFast:
    """Every byte a token, plus whole `pieces`."""
    tokenizer = byte_tokenizer("", ("<eos>",), "<eos>")
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tokenizer


TOKENIZERS = {
    "nano": build_tokenizer,
    "bytes": bytes_and,
    "two digits": lambda: bytes_and(*(f"{n:02d}" for n in range(100))),
    # A sign with the digit after it, so that negative numbers take fewer tokens than positive ones.
    "uneven": lambda: bytes_and("-0.1", "-1", "0.9", ", "),
}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_every_value_has_one_spelling_that_parses_back(decimals):
    steps = range(-(10**decimals), 10**decimals + 1)
    words = [spell(step, decimals) for step in steps]
    assert len(set(words)) == len(words) == 2 * 10**decimals + 1
    assert [float(word) for word in words] == [step / 10**decimals for step in steps]
    assert spell(0, decimals) == "0." + "0" * decimals


@pytest.mark.parametrize(
    "action_dim, decimals, error, message",
    [
        (2, 0, ValueError, "decimals must be .*0"),
        (2, 5, ValueError, "decimals must be .*5"),
        (2, 2.0, TypeError, "decimals .*2.0"),
        (0, 2, ValueError, "action_dim must be"),
    ],
)
def test_forms_that_no_answer_can_have(action_dim, decimals, error, message):
    with pytest.raises(error, match=message):
        default_prompt(action_dim, decimals)
    with pytest.raises(error, match=message):
        ActionGrammar(build_tokenizer(), CONTEXT, action_dim=action_dim, decimals=decimals)


@pytest.mark.parametrize("decimals", [1, 2])
def test_every_action_on_the_grid_encodes_and_parses_back(tokenizer, decimals):
    grammar = ActionGrammar(tokenizer, CONTEXT, action_dim=2, decimals=decimals)
    step = torch.arange(-(10**decimals), 10**decimals + 1)
    one = (step / 10**decimals).float()
    pairs = torch.cartesian_prod(one, one[:: max(1, len(one) // 21)])
    tokens = grammar.encode(pairs)
    assert len({tuple(row) for row in tokens.tolist()}) == len(pairs)
    assert torch.equal(grammar.actions(tokens), pairs)
    for row, pair in list(zip(tokens.tolist(), pairs.tolist(), strict=True))[::37]:
        assert parse_action(grammar.decode(row)) == pytest.approx(pair, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3))
def test_encoding_rounds_and_clips_like_the_text(action):
    grammar = GRAMMARS["nano"]
    row = grammar.encode(torch.tensor([action], dtype=torch.float64))[0].tolist()
    assert grammar.decode(row) == format_action(action, grammar.decimals)
    assert row[-1] == grammar.eos_token_id


GRAMMARS = {
    name: ActionGrammar(build(), CONTEXT, action_dim=3, decimals=2) for name, build in TOKENIZERS.items()
}


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(GRAMMARS)), st.randoms(use_true_random=False))
def test_any_walk_through_the_grammar_is_a_wellformed_action(name, random):
    grammar = GRAMMARS[name]
    answer: list[int] = []
    while len(answer) < grammar.max_length:
        answer.append(random.choice(grammar.allowed(answer)))
    text = grammar.decode(answer)
    values = parse_action(text)
    assert len(values) == 3
    assert text == format_action(values, 2)
    # ... and it is the way in which training writes that action.
    encoded = grammar.encode(torch.tensor([values]))[0].tolist()
    assert answer[: len(encoded)] == encoded


@pytest.mark.parametrize("name", sorted(GRAMMARS))
def test_the_levels_take_the_walk_of_the_automaton(name):
    """Following `levels` as the decoder does visits the tokens that `allowed` lists, whatever is chosen."""
    grammar = GRAMMARS[name]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        answer, state, action = grammar.opening.tolist(), 0, torch.zeros(3)
        for level in grammar.levels:
            options = level.tokens[level.allowed[state]]
            assert options.tolist() == grammar.allowed(answer)
            pick = options[torch.randint(len(options), (1,), generator=generator)]
            u = int((level.tokens == pick).nonzero())
            action += level.gain[state, u]
            answer += [int(pick), *level.forced.tolist()]
            state = int(level.next_state[state, u])
        assert len(answer) == grammar.max_length
        assert action.tolist() == pytest.approx(parse_action(grammar.decode(answer)), abs=1e-6)
        assert torch.equal(grammar.actions(torch.tensor([answer]))[0], action)


def test_forced_tokens_need_no_level_of_their_own():
    """Nano: "0." or the like, tenths, hundredths are chosen; opening, commas and the end are not."""
    grammar = ActionGrammar(build_tokenizer(), CONTEXT, action_dim=2, decimals=2)
    assert len(grammar.levels) == 6
    assert len(grammar.opening) == 1
    assert [len(level.forced) for level in grammar.levels] == [0, 0, 1, 0, 0, 2]


def test_a_tokenizer_that_merges_over_the_comma_is_refused():
    with pytest.raises(ValueError, match="cannot spell"):
        ActionGrammar(bytes_and("0, -0"), CONTEXT, action_dim=2, decimals=2)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        ActionGrammar(tokenizer, CONTEXT, action_dim=2, decimals=2)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "no 'Action"),
        ("Action: 0.5", "no 'Action"),
        ("Action: [0.5, 1.5]", "outside"),
        ("Action: [a]", "could not convert"),
    ],
)
def test_text_that_is_no_action(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_action(text)


# ---- the tree of a number ----


def probabilities(tree, scores: torch.Tensor) -> torch.Tensor:
    """float64[G]: those of the values, if the tokens after each node have these scores [N, U]."""
    steps = scores.masked_fill(~tree.allowed, -torch.inf).log_softmax(1)
    flat = torch.cat((steps.flatten(), steps.new_zeros(1)))
    return flat[tree.paths].sum(0).exp()


@pytest.mark.parametrize("decimals", [1, 2, 3])
def test_a_tree_has_the_automatons_choices(tokenizer, decimals):
    """Each value has the product of the automaton's steps along its tokens."""
    grammar = ActionGrammar(tokenizer, CONTEXT, action_dim=2, decimals=decimals)
    generator = torch.Generator().manual_seed(0)
    tokens = grammar.number_tokens.tolist()
    for slot, before in ((0, []), (1, grammar._slots[0][0])):
        tree, words = grammar.trees[slot], grammar._slots[slot]
        scores = torch.randn(*tree.allowed.shape, dtype=torch.float64, generator=generator)
        found = probabilities(tree, scores)
        torch.testing.assert_close(found.sum().item(), 1.0)
        assert tree.lengths.tolist() == [len(word) for word in words]
        lines = [[]]  # the tokens from the root to each node
        for token, parent in zip(tree.tokens.tolist()[1:], tree.parents[1:], strict=True):
            lines.append([*lines[parent], token])
        node_of = {tuple(tree.shared + line): n for n, line in enumerate(lines)}
        assert tree.depth.tolist() == [len(line) for line in lines]
        for value in range(0, len(words), max(1, len(words) // 50)):
            expected = 0.0
            for t, token in enumerate(words[value]):
                allowed = grammar.allowed([*before, *words[value][:t]])
                if len(allowed) > 1:
                    columns = [tokens.index(other) for other in allowed]
                    row = scores[node_of[tuple(words[value][:t])], columns].log_softmax(0)
                    expected += row[allowed.index(token)]
            torch.testing.assert_close(found[value].log().item(), float(expected))


@st.composite
def separate_words(draw):
    """Sequences of which none begins another, all with a common beginning."""
    words = draw(
        st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=2, max_size=30)
    )
    words = [w for w in words if not any(w != other and other == w[: len(other)] for other in words)]
    common = draw(st.lists(st.integers(0, 3), max_size=3))
    return [[*common, *word] for word in words]


@settings(deadline=None, max_examples=100)
@given(separate_words(), st.integers(0, 100))
def test_a_tree_of_any_words_is_a_distribution(words, seed):
    if len(words) < 2:
        return
    tree = number_tree(words, range(4))
    scores = torch.randn(
        tree.allowed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    torch.testing.assert_close(probabilities(tree, scores).sum().item(), 1.0)
    assert all(word[: len(tree.shared)] == tree.shared for word in words)
    assert tree.allowed[0].sum() > 1
    # Nothing is run for nothing: the last node of every branch has a choice.
    parents = set(tree.parents)
    assert all(tree.allowed[n].sum() > 1 for n in range(len(tree.tokens)) if n not in parents)
