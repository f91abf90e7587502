"""A tiny text model, rows of tokens with weights, and the plain weighted loss to compare with."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

VOCABULARY = 61
Row = dict[str, Any]


def tiny_model(*, tied: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


def random_rows(count: int, *, per_token: bool = False, seed: int = 0) -> list[Row]:
    """Rows of 4 to 9 tokens, the first two without a label; about half of the weights are 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, 10, (), generator=generator))
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        weight = torch.rand(length if per_token else (), generator=generator).sub(0.5).clamp_min(0) * 2
        rows.append({"input_ids": tokens, "labels": [-100, -100, *tokens[2:]], "weight": weight.tolist()})
    return rows


def pad(rows: list[Row], *, left: bool = False) -> dict[str, torch.Tensor]:
    """A collator as many scripts have it. It refuses columns that it does not know."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        assert row.keys() <= {"input_ids", "labels"}
        missing = width - len(row["input_ids"])
        ends = (missing, 0) if left else (0, missing)
        for name, value, filler in (
            ("input_ids", row["input_ids"], 0),
            ("labels", row["labels"], -100),
            ("attention_mask", [1] * len(row["input_ids"]), 0),
        ):
            batch[name].append([filler] * ends[0] + list(value) + [filler] * ends[1])
    return {name: torch.tensor(value) for name, value in batch.items()}


def plain_loss(
    model: torch.nn.Module, rows: list[Row], *, smoothing: float = 0.0, valid: int | None = None
) -> torch.Tensor:
    """Eq. 6 row by row, from logits, without padding; rows without a weight have 1."""
    total, count = torch.zeros(()), 0
    for row in rows:
        tokens, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=tokens).logits[0, :-1].float()
        nll = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        weight = torch.as_tensor(row.get("weight", 1.0)).expand(len(row["labels"]))[1:]
        total = total + (weight * nll).sum()
        count += int((labels != -100).sum())
    return total / (valid or count)


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**settings(folder) | changes)


def settings(folder: Any) -> dict[str, Any]:
    """Rows in their order, a constant learning rate, and nothing written but the weights."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
