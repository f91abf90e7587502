"""Answers begin and end as the chat template writes them, which is how the model was trained."""

import pytest
import torch
from tiny import ACTIONS, LLAVA_TEMPLATE, QWEN_TEMPLATE, make_nano, random_frames

from covr_fast.vlm import ActionPrior
from covr_fast.vlm.answer.prompt import format_action
from covr_fast.vlm.finetune.objective import IGNORE, Samples
from covr_fast.vlm.model.nano import write_nano

FRAMES = {
    "llava": (" ", None),
    "smolvlm": (" ", "<end_of_utterance>"),
    "qwen2_5_vl": ("", "<|im_end|>"),
    "qwen2_vl": ("", "<|im_end|>"),
    "qwen3_vl": ("", "<|im_end|>"),
}


def test_the_text_before_an_answer_and_the_token_after_it(opened, checkpoint):
    prior, _ = opened
    tokenizer = prior.backbone.tokenizer
    leading, end = prior.backbone.answer_frame(prior.prompt)
    assert (leading, None if end is None else tokenizer.decode([end])) == FRAMES[checkpoint.name]
    expected = tokenizer.eos_token_id if end is None else end
    assert prior.grammar.eos_token_id == expected


def test_an_answers_tokens_are_those_of_the_conversation(opened, checkpoint):
    """What is generated and trained is what the tokenizer makes of the template's text."""
    prior, frames = opened
    backbone, tokenizer = prior.backbone, prior.backbone.tokenizer
    for row, action in zip(prior.grammar.encode(ACTIONS).tolist(), ACTIONS.tolist(), strict=True):
        content = [{"type": "text", "text": format_action(action, 2)}]
        conversation = backbone._conversation(prior.prompt, {"role": "assistant", "content": content})
        prompt, whole = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prior.text, conversation)
        )
        answer = [token for token in row if token != prior.grammar.pad_token_id]
        if checkpoint.name == "llava":
            # Its template has no end of sequence, which the training put there in place of the space.
            assert answer.pop() == tokenizer.eos_token_id
        assert whole[: len(prompt) + len(answer)] == prompt + answer
    assert all(text.startswith("Action: [") for text in prior(frames).text)


def test_labels_end_with_the_turn(opened):
    prior, frames = opened
    labels = Samples.build(prior.grammar, frames, ACTIONS, torch.ones(4)).labels
    for row in labels:
        assert row[row != IGNORE][-1] == prior.grammar.eos_token_id


def nano_with(template: str, folder) -> ActionPrior:
    write_nano(folder, seed=0)
    (folder / "chat_template.jinja").write_text(template)
    return ActionPrior.from_pretrained(folder, action_dim=2, device="cpu")


def check(prior: ActionPrior) -> None:
    frames = random_frames((84, 84), 3)
    answers = prior(frames)
    assert torch.equal(answers.token_ids, prior.reference(frames).token_ids)
    assert (answers.token_ids == prior.grammar.eos_token_id).any(1).all()
    assert all(text.startswith("Action: [") for text in answers.text)


def test_a_turn_may_end_with_another_token_than_the_sequence(tmp_path):
    template = QWEN_TEMPLATE.replace("{% endif %}<|im_end|>\n", "{% endif %}\n<|vision_end|>\n")
    assert template != QWEN_TEMPLATE
    prior = nano_with(template, tmp_path)
    assert prior.grammar.eos_token_id == prior.backbone.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    assert prior.grammar.eos_token_id != prior.backbone.tokenizer.eos_token_id
    check(prior)


def test_text_that_every_answer_begins_with(tmp_path):
    template = QWEN_TEMPLATE.replace(
        "<|im_start|>{{ message['role'] }}\n",
        "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}No thought.\n{% endif %}",
    )
    assert template != QWEN_TEMPLATE
    prior = nano_with(template, tmp_path)
    opening = prior.backbone.tokenizer.decode(prior.grammar.opening.tolist())
    assert opening == "No thought.\nAction: ["
    check(prior)


@pytest.mark.parametrize(
    ("begin", "instead"),
    [
        (
            "{% if loop.first",
            "{% if message['role'] == 'assistant' %}{{ raise_exception('no') }}{% elif loop.first",
        ),
        ("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        ("{% for message in messages %}", "{% for message in messages if message['role'] == 'user' %}"),
    ],
    ids=["refuses", "thinks first", "leaves out"],
)
def test_a_template_that_writes_no_answer(begin, instead, tmp_path):
    template = QWEN_TEMPLATE.replace(begin, instead)
    assert instead in template
    prior = nano_with(template, tmp_path)
    assert prior.backbone.answer_frame(prior.prompt) == ("", None)
    assert prior.grammar.eos_token_id == prior.backbone.tokenizer.eos_token_id
    check(prior)


def test_a_template_that_takes_answers_as_text_only(tmp_path):
    template = LLAVA_TEMPLATE.replace("<image>", "<|image_pad|>").replace(
        "{{ message['role'] | upper }}: ",
        "{{ message['role'] | upper }}: {% if message['role'] == 'assistant' %}{{ ' ' + message['content'] }}"
        "<|im_end|>{% else %}",
    )
    template = template.replace("{% endfor %}{% if add", "{% endif %}{% endfor %}{% if add")
    prior = nano_with(template, tmp_path)
    leading, end = prior.backbone.answer_frame(prior.prompt)
    assert (leading, prior.backbone.tokenizer.decode([end])) == ("  ", "<|im_end|>")
    check(prior)


def test_nanos_answers_have_nothing_before_them():
    """Its template writes no line break after "assistant", neither before an answer nor in one."""
    prior = make_nano()
    assert prior.backbone.answer_frame(prior.prompt)[0] == ""
    assert prior.text.endswith("<|im_start|>assistant")
