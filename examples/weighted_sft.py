"""A tiny text model learns sums from answers of mixed quality, weighted by how good each answer was.

Three of five answers are one too high. Trained on all of them alike, the model learns the mistake; with
weights by return (EDDF and RALW over the whole dataset) it learns the sums. Nothing is downloaded.

pip install covr-fast[train] datasets
"""

import random
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from covr_fast.integrations.transformers import return_weighted_loss, weigh_by_return

WORDS = ["<pad>", "plus", "is", *(f"{number}" for number in range(20))]
SUMS = [(a, b) for a in range(10) for b in range(10)]
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300

made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


def answers() -> Dataset:
    """Twenty answers to each sum; the return, with some noise, says whether it is wrong."""
    draw = random.Random(0)
    rows = []
    for a, b in SUMS * 20:
        error = int(draw.random() < 0.6)
        tokens = tokenizer(f"{a} plus {b} is {a + b + error}")["input_ids"]
        labels = [-100] * 4 + tokens[4:]  # only the answer is learned
        rows.append({"input_ids": tokens, "labels": labels, "return": draw.gauss(-error, 0.1)})
    return Dataset.from_list(rows)


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def right(model: LlamaForCausalLM) -> str:
    """How many of the sums the model knows."""
    asked = torch.tensor([tokenizer(f"{a} plus {b} is")["input_ids"] for a, b in SUMS])
    said = model.eval()(input_ids=asked).logits[:, -1].argmax(-1)
    truth = torch.tensor([tokenizer.convert_tokens_to_ids(f"{a + b}") for a, b in SUMS])
    return f"{(said == truth).sum()} of {len(SUMS)} sums right"


def train(trainer_class: type[Trainer], dataset: Dataset) -> LlamaForCausalLM:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = new_model()
        collator = DataCollatorForSeq2Seq(tokenizer)
        trainer_class(model, arguments, train_dataset=dataset, data_collator=collator).train()
    return model.cpu()


dataset = weigh_by_return(answers())
share = sum(weight > 0 for weight in dataset["weight"]) / len(dataset)
print(f"{len(dataset)} answers, {share:.0%} of them with a weight above 0")
print("before:          ", right(new_model()))
print("all answers alike:", right(train(Trainer, dataset.remove_columns("weight"))))
print("weighted:        ", right(train(return_weighted_loss(Trainer), dataset)))
