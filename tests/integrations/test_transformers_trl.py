"""return_weighted_loss in TRL's SFTTrainer, which tokenises, masks, packs and removes columns itself."""

from collections import Counter

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from weighted_text import VOCABULARY, plain_loss, random_rows, settings, tiny_model

from covr_fast.integrations.transformers import return_weighted_loss, weigh_by_return
from covr_fast.vlm import ActionPrior

pytest.importorskip("trl")

from trl import SFTConfig, SFTTrainer

WeightedSFTTrainer = return_weighted_loss(SFTTrainer)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }} <eos> {% endgeneration %}"
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<eos>", "user", "assistant", *(f"w{i}" for i in range(4, VOCABULARY))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


@pytest.fixture
def trainer_for(tokenizer, tmp_path):
    def make(rows, model=None, *, evaluation=None, options=None, **changes):
        return WeightedSFTTrainer(
            model or tiny_model(),
            SFTConfig(**settings(tmp_path) | {"max_steps": 1, "bf16": False} | changes),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=None if evaluation is None else Dataset.from_list(evaluation),
            processing_class=tokenizer,
            **(options or {}),
        )

    return make


def first_loss(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def prompts(count=8):
    """Prompt and completion of different lengths, and the tokens and labels that they become."""
    texts, rows = [], []
    for i in range(count):
        prompt, completion = [4 + i, 5 + i], [*range(6 + i, 7 + 2 * i)]
        weight = float(i % 3)
        texts.append({"prompt": spoken(prompt), "completion": " " + spoken(completion), "weight": weight})
        tokens = [*prompt, *completion, 1]
        rows.append({"input_ids": tokens, "labels": [-100, -100, *tokens[2:]], "weight": weight})
        texts[-1]["completion"] += " <eos>"
    return texts, rows


def spoken(tokens):
    return " ".join(f"w{token}" for token in tokens)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_prompts_and_completions(smoothing, trainer_for):
    """Only completions have labels. TRL pads batches and checkpoints layers by itself."""
    texts, rows = prompts()
    trainer = trainer_for(texts, label_smoothing_factor=smoothing)
    expected = plain_loss(tiny_model(), rows[:4], smoothing=smoothing).item()
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-5)


def test_one_forward_a_step_and_no_logits(trainer_for):
    model = tiny_model()
    calls = Counter()
    model.model.register_forward_hook(lambda *_: calls.update(["model"]))
    model.lm_head.register_forward_hook(lambda *call: calls.update([call[-1].numel()]))
    trainer = trainer_for(prompts()[0], model, max_steps=2)
    trainer.train()
    assert calls == {"model": 2, 1: 2}


def test_five_steps_end_where_the_plain_loss_ends(trainer_for):
    texts, rows = prompts(40 // 2)
    model, other = tiny_model(), tiny_model()
    trainer_for(
        texts, model, max_steps=5, gradient_accumulation_steps=2, per_device_train_batch_size=2
    ).train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(5):
        plain_loss(other, rows[4 * step : 4 * step + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-4, atol=1e-5)


def test_only_what_the_assistant_says(trainer_for):
    said = [[6, 7], [8], [9, 10, 11], [12]]
    talk = [
        {
            "messages": [
                {"role": "user", "content": spoken([20 + i])},
                {"role": "assistant", "content": spoken(answer)},
            ],
            "weight": 0.5 + i,
        }
        for i, answer in enumerate(said)
    ]
    rows = [
        {
            "input_ids": [2, 20 + i, 3, *answer, 1],
            "labels": [-100, -100, -100, *answer, 1],
            "weight": 0.5 + i,
        }
        for i, answer in enumerate(said)
    ]
    trainer = trainer_for(talk, assistant_only_loss=True)
    assert first_loss(trainer) == pytest.approx(plain_loss(tiny_model(), rows).item(), rel=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_without_padding(per_token, trainer_for):
    rows = random_rows(4, per_token=per_token)
    trainer = trainer_for(rows, padding_free=True, max_length=None)
    assert first_loss(trainer) == pytest.approx(plain_loss(tiny_model(), rows).item(), rel=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing(strategy, per_token, trainer_for):
    """TRL's own rows, in which every token has its weight. It occurs once and so names its weight."""
    rows, names, first = [], {}, 1
    for length in (4, 3, 10, 4, 5, 3):
        tokens = [*range(first, first + length)]
        weights = [token / 10 if per_token else length / 10 for token in tokens]
        rows.append({"input_ids": tokens, "labels": tokens, "weight": weights if per_token else weights[0]})
        names |= dict(zip(tokens, weights, strict=True))
        first += length
    trainer = trainer_for(rows, packing=True, packing_strategy=strategy, max_length=8)
    packed = list(trainer.train_dataset)
    assert len(packed) < len(rows)
    plain = SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), trainer.processing_class, trainer.args, True, None, "train"
    )
    assert [row["input_ids"] for row in packed] == list(plain["input_ids"])
    for row in packed:
        assert row["weight"] == pytest.approx([names[token] for token in row["input_ids"]])

    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(packed))
    documents = []
    for row in packed:  # a wrapped row is one document to the model
        for part in torch.tensor(row["input_ids"]).split(row.get("seq_lengths", len(row["input_ids"]))):
            tokens = part.tolist()
            labels = [-100, *tokens[1:]]
            documents.append({"input_ids": tokens, "labels": labels, "weight": [names[t] for t in tokens]})
    torch.testing.assert_close(loss, plain_loss(tiny_model(), documents))


def test_lora_that_the_trainer_makes(trainer_for):
    texts, rows = prompts()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = trainer_for(texts, options={"peft_config": config}, max_steps=2)
    assert first_loss(trainer) == pytest.approx(plain_loss(tiny_model(), rows[:4]).item(), rel=1e-5)
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert moved
    assert all(p.any() for p in moved)


def test_pictures(tmp_path):
    """A vision-language model, with TRL's own collator of pictures and messages."""
    prior = ActionPrior.from_pretrained("nano", action_dim=2, prompt="Drive.", device="cpu")
    model = prior.backbone.model.requires_grad_()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), dtype=np.uint8)
    rows = [
        {
            "image": Image.fromarray(picture),
            "prompt": [{"role": "user", "content": "Drive."}],
            "completion": [{"role": "assistant", "content": f"Action: [0.{i}, 1]" + "!" * i}],
            "weight": float(i),
        }
        for i, picture in enumerate(pixels)
    ]
    trainer = WeightedSFTTrainer(
        model,
        SFTConfig(**settings(tmp_path) | {"max_steps": 1, "bf16": False, "max_length": None}),
        train_dataset=Dataset.from_list(rows),
        processing_class=prior.backbone.processor,
    )
    batch = trainer.data_collator.collate([{k: v for k, v in row.items() if k != "weight"} for row in rows])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        nll = F.cross_entropy(model(**batch).logits[:, :-1].mT, labels, reduction="none")
        expected = (torch.arange(4.0)[:, None] * nll).sum() / (labels != -100).sum()
    assert first_loss(trainer) == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation(trainer_for):
    texts, rows = prompts(4)
    bare = [{k: v for k, v in row.items() if k != "weight"} for row in texts]
    trainer = trainer_for(texts, evaluation=texts)
    with torch.no_grad():
        weighted = plain_loss(tiny_model(), rows).item()
        mean = plain_loss(tiny_model(), [row | {"weight": 1.0} for row in rows]).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(weighted, rel=1e-5)
    assert trainer.evaluate(Dataset.from_list(bare))["eval_loss"] == pytest.approx(mean, rel=1e-5)


def test_returns(trainer_for):
    texts, rows = prompts()
    for i, text in enumerate(texts):
        del text["weight"]
        text["return"] = float(i % 7)
    dataset = weigh_by_return(Dataset.from_list(texts))
    rows = [row | {"weight": weight} for row, weight in zip(rows, dataset["weight"], strict=True)]
    trainer = trainer_for(list(dataset), per_device_train_batch_size=8)
    assert first_loss(trainer) == pytest.approx(plain_loss(tiny_model(), rows).item(), rel=1e-5)


def test_what_is_refused(trainer_for):
    texts, _ = prompts()
    with pytest.raises(ValueError, match=r'train_dataset has no column "weight": call weigh_by_return'):
        trainer_for([{"prompt": "w4", "completion": " w5", "return": 1.0}])
    with pytest.raises(ValueError, match="loss_type"):
        trainer_for(texts, loss_type="dft")
    with pytest.raises(ValueError, match="packing needs a max_length"):
        trainer_for(texts, packing=True, max_length=None)
    trainer = trainer_for(random_rows(4, per_token=True), max_length=3)
    with pytest.raises(ValueError, match="does not cut their weights"):
        trainer.train()


def test_a_mixture_of_experts_with_its_routers_loss_is_refused(trainer_for):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
    )
    trainer = trainer_for(prompts()[0], MixtralForCausalLM(config))
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        trainer.train()
    trainer_for(prompts()[0], MixtralForCausalLM(config), router_aux_loss_coef=0.0).train()
