"""return_weighted_loss in the Hugging Face Trainer: against the plain weighted loss from logits."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)
from weighted_text import VOCABULARY, arguments, gradients, pad, plain_loss, random_rows, tiny_model

from covr_fast import ops
from covr_fast.integrations.transformers import return_weighted_loss, weigh_by_return, weights_of_returns
from covr_fast.vlm import ActionPrior

WeightedTrainer = return_weighted_loss(Trainer)


def trainer_for(model, rows, folder, *, collator=pad, evaluation=None, **changes):
    eval_dataset = None if evaluation is None else Dataset.from_list(evaluation)
    return WeightedTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=eval_dataset,
        data_collator=collator,
    )


def loss_of(trainer, rows, *, valid=None):
    """The loss that training computes of one batch, after the trainer's own collator."""
    trainer.model.train()
    return trainer.compute_loss(trainer.model, trainer.data_collator(rows), num_items_in_batch=valid)


def assert_same_loss_and_gradients(trainer, other, rows, *, smoothing=0.0, **tolerance):
    loss, expected = loss_of(trainer, rows), plain_loss(other, rows, smoothing=smoothing)
    torch.testing.assert_close(loss, expected, **tolerance)
    loss.backward()
    expected.backward()
    ours, theirs = gradients(trainer.model), gradients(other)
    assert ours.keys() == theirs.keys()
    assert any(gradient.any() for gradient in theirs.values())
    torch.testing.assert_close(ours, theirs, **tolerance)


class Watch:
    """Sizes of what a module takes and gives, call by call."""

    def __init__(self, module):
        self.rows, self.outputs = [], []
        module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, _, args, kwargs, output):
        taken = args[0] if args else kwargs["input_ids"]
        self.rows.append(len(taken))
        self.outputs.append(output.numel() if torch.is_tensor(output) else None)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("left", [False, True])
def test_loss_and_gradients_are_those_of_the_plain_loss(left, smoothing, per_token, tmp_path):
    rows = random_rows(6, per_token=per_token)
    trainer = trainer_for(
        tiny_model(),
        rows,
        tmp_path,
        collator=lambda examples: pad(examples, left=left),
        label_smoothing_factor=smoothing,
    )
    assert_same_loss_and_gradients(trainer, tiny_model(), rows, smoothing=smoothing)


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def with_lora(model, **options):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)


MODELS = {
    "tied": lambda: tiny_model(tied=True),
    "checkpointed": lambda: checkpointed(tiny_model()),
    "lora": lambda: with_lora(tiny_model()),
    "lora_checkpointed": lambda: with_lora(checkpointed(tiny_model())),
    "lora_and_head": lambda: with_lora(tiny_model(), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models(make, tmp_path):
    rows = random_rows(6)
    assert_same_loss_and_gradients(trainer_for(make(), rows, tmp_path), make(), rows)


def test_a_model_in_bfloat16(tmp_path):
    rows = random_rows(6)
    trainer = trainer_for(tiny_model(dtype=torch.bfloat16), rows, tmp_path)
    loss, expected = loss_of(trainer, rows), plain_loss(tiny_model(), rows)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)


def test_autocast_computes_the_head_in_its_dtype(tmp_path, monkeypatch):
    """Training with bf16=True: weights are float32, products are bfloat16."""
    operation, dtypes = ops.return_weighted_linear_cross_entropy, []

    def recorded(hidden, head, *rest, **options):
        dtypes.append((hidden.dtype, head.dtype))
        return operation(hidden, head, *rest, **options)

    monkeypatch.setattr(ops, "return_weighted_linear_cross_entropy", recorded)
    model, other, rows = tiny_model(), tiny_model(), random_rows(20)
    trainer_for(model, rows, tmp_path, bf16=True, max_steps=3).train()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 3
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            plain_loss(other, rows[4 * step : 4 * step + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [(a - b).abs().mean() for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True)]
    apart = [(a - b).abs().mean() for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert sum(apart) < 0.1 * sum(moved)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_five_steps_end_where_the_plain_loss_ends(accumulate, tmp_path):
    """N_v is that of the accumulated batch, whatever its micro-batches are."""
    model, other, rows = tiny_model(), tiny_model(), random_rows(40, per_token=True)
    changes = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    trainer = trainer_for(model, rows, tmp_path, **changes)
    trainer.train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(5):
        loss = plain_loss(other, rows[8 * step : 8 * step + 8])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-4, atol=1e-5)


TWO_PROCESSES = """
import os
from datasets import Dataset
from transformers import Trainer
from weighted_text import arguments, pad, random_rows, tiny_model
from covr_fast.integrations.transformers import return_weighted_loss

trainer = return_weighted_loss(Trainer)(
    tiny_model(),
    arguments({folder!r}, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    train_dataset=Dataset.from_list(random_rows(24)),
    data_collator=pad,
)
trainer.train()
trainer.save_model()
rows = Dataset.from_list(random_rows(1) * 4)  # all alike: the mean over batches is the loss of each
trainer.save_metrics("eval", trainer.evaluate(rows))
os._exit(0)  # else Gloo's thread may drop the last tensor while Python ends, which aborts the process
"""


@pytest.mark.slow
def test_two_processes_end_where_one_ends(tmp_path):
    """Each computes a half of every batch; N_v is that of both."""
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES.format(folder=str(tmp_path)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(start, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    other = tiny_model()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    for rows in (random_rows(24)[8 * step : 8 * step + 8] for step in range(3)):
        plain_loss(other, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(list(trained.parameters()), list(other.parameters()), rtol=1e-4, atol=1e-5)
    measured = json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"]
    assert measured == pytest.approx(plain_loss(trained, random_rows(1)).item(), rel=1e-4)


def test_logits_never_exist(tmp_path):
    model, rows = tiny_model(), random_rows(20)
    trainer = trainer_for(model, rows, tmp_path, evaluation=rows[:6])
    watch = Watch(model.lm_head)
    trainer.train()
    trainer.evaluate()
    assert len(watch.outputs) == 5 + 2
    assert set(watch.outputs) == {1}  # the loss
    tokens = torch.tensor([[1, 2, 3]])
    assert model(input_ids=tokens).logits.shape == (1, 3, VOCABULARY)  # the model is as it was


def test_samples_of_weight_zero_count_and_take_no_part(tmp_path):
    rows = random_rows(6)
    for row, weight in zip(rows, (0.0, 1.0, 0.0, 0.5, 0.0, 0.0), strict=True):
        row["weight"] = weight
    model = tiny_model()
    trainer = trainer_for(model, rows, tmp_path)
    watch = Watch(model.model)
    loss_of(trainer, rows).backward()
    assert watch.rows == [2]  # no forward for the others
    other = tiny_model()
    every = sum(label != -100 for row in rows for label in row["labels"])
    plain_loss(other, [rows[1], rows[3]], valid=every).backward()
    torch.testing.assert_close(gradients(model), gradients(other))


def test_a_batch_without_weight_gives_zero_and_every_gradient(tmp_path):
    rows = [row | {"weight": 0.0} for row in random_rows(4)]
    trainer = trainer_for(tiny_model(), rows, tmp_path)
    loss = loss_of(trainer, rows)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_a_batch_without_labels_gives_zero(tmp_path):
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in random_rows(4)]
    trainer = trainer_for(tiny_model(), rows, tmp_path)
    assert loss_of(trainer, rows) == 0
    assert loss_of(trainer, rows, valid=torch.tensor(0)) == 0


def test_only_what_has_a_weight_is_learned(tmp_path):
    """Half of the samples say that 7 follows 5, the other half says 9."""
    sides = [{"input_ids": [3, 5, answer], "labels": [-100, -100, answer]} for answer in (7, 9)]
    rows = [side | {"weight": float(side["labels"][2] == 9)} for side in sides * 20]
    model = tiny_model()
    trainer_for(model, rows, tmp_path, max_steps=15).train()
    chances = model(input_ids=torch.tensor([[3, 5]])).logits[0, -1].softmax(-1)
    assert chances[9] > 0.9
    assert chances[7] < 0.05


def test_the_first_token_counts_in_no_divisor(tmp_path):
    """For some models the Trainer counts the labels of first tokens too, which nothing predicts."""
    rows = [row | {"labels": row["input_ids"]} for row in random_rows(20)]
    model = tiny_model()
    model.loss_type = "another"  # makes the trainer count all labels
    trainer = trainer_for(model, rows, tmp_path, max_steps=1)
    trainer.train()
    expected = plain_loss(tiny_model(), [row | {"labels": [-100, *row["labels"][1:]]} for row in rows[:4]])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_that_are_the_tokens_themselves(tmp_path):
    """A collator may give one tensor twice; the model's own input must stay as it is."""

    def collate(rows):
        tokens = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": tokens, "labels": tokens}

    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weight": 1.0}]
    trainer = trainer_for(tiny_model(), rows, tmp_path, collator=collate)
    torch.testing.assert_close(loss_of(trainer, rows), plain_loss(tiny_model(), rows))


# ---- data ----


@pytest.mark.parametrize("remove", [True, False])
def test_the_column_survives_the_removal_of_unused_columns(remove, tmp_path):
    rows = random_rows(8)
    if remove:  # the collator refuses columns that it does not know
        rows = [row | {"source": "web"} for row in rows]
    trainer = trainer_for(tiny_model(), rows, tmp_path, max_steps=1, remove_unused_columns=remove)
    trainer.train()
    expected = plain_loss(tiny_model(), rows[:4])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_other_kinds_of_datasets(stream, tmp_path):
    rows = [row | {"source": "web"} for row in random_rows(8)]
    data = Dataset.from_list(rows).to_iterable_dataset() if stream else rows
    trainer = WeightedTrainer(
        tiny_model(), arguments(tmp_path, max_steps=1), train_dataset=data, data_collator=pad
    )
    trainer.train()
    expected = plain_loss(tiny_model(), rows[:4])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def flatten(rows):
    """All rows in one, as collators without padding make it, to a multiple of 8."""
    tokens, labels, positions = [], [], []
    for row in rows:
        tokens += row["input_ids"]
        labels += [-100, *row["labels"][1:]]
        positions += range(len(row["input_ids"]))
    extra = -len(tokens) % 8
    tokens += [0] * extra
    labels += [-100] * extra
    positions += range(extra)
    columns = {"input_ids": tokens, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([value]) for name, value in columns.items()}


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("per_token", [False, True])
def test_batches_without_padding(per_token, count, tmp_path):
    rows = random_rows(count, per_token=per_token, seed=2)
    trainer = trainer_for(tiny_model(), rows, tmp_path, collator=flatten)
    assert_same_loss_and_gradients(trainer, tiny_model(), rows)


def collate_images(prior, frames, answers):
    """A collator that yields pixels: prompt, image and answer of each example."""

    def collate(examples):
        at = [example["index"] for example in examples]
        inputs = prior.backbone.process(prior.text, frames[at])
        prompt, width = inputs["input_ids"], answers.shape[1]
        return inputs | {
            "input_ids": torch.cat((prompt, answers[at]), 1),
            "labels": torch.cat((torch.full_like(prompt, -100), answers[at]), 1),
            "attention_mask": torch.ones(len(at), prompt.shape[1] + width, dtype=torch.int64),
            "mm_token_type_ids": F.pad(inputs["mm_token_type_ids"], (0, width)),
        }

    return collate


def test_a_vision_language_model(tmp_path):
    prior = ActionPrior.from_pretrained("nano", action_dim=2, prompt="Drive.", device="cpu")
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (4, 3, 84, 84), dtype=torch.uint8, generator=generator)
    answers = torch.randint(0, 200, (4, 5), generator=generator)
    rows = [{"index": i, "weight": weight} for i, weight in enumerate((0.0, 1.0, 0.5, 0.0))]
    model = prior.backbone.model.requires_grad_()
    collate = collate_images(prior, frames, answers)
    trainer = trainer_for(model, rows, tmp_path, collator=collate, remove_unused_columns=False)
    watch = Watch(model.lm_head)
    loss = loss_of(trainer, rows)
    loss.backward()
    assert watch.outputs == [1]
    ours = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    batch = collate(rows)
    labels = batch.pop("labels")
    nll = F.cross_entropy(model(**batch).logits[:, :-1].mT, labels[:, 1:], reduction="none")
    expected = (torch.tensor([row["weight"] for row in rows])[:, None] * nll).sum() / answers.numel()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-4, atol=1e-6)


# ---- evaluation ----


def test_evaluation_uses_the_weights_that_it_is_given(tmp_path):
    rows = random_rows(4)
    bare = [{k: v for k, v in row.items() if k != "weight"} for row in rows]
    trainer = trainer_for(tiny_model(), rows, tmp_path, evaluation=rows)
    with torch.no_grad():
        weighted, mean = plain_loss(tiny_model(), rows).item(), plain_loss(tiny_model(), bare).item()
    assert abs(weighted - mean) > 0.1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(weighted, rel=1e-5)
    assert trainer.evaluate(Dataset.from_list(bare))["eval_loss"] == pytest.approx(mean, rel=1e-5)


def test_metrics_get_true_logits(tmp_path):
    rows = random_rows(6)
    model = tiny_model()
    trainer = WeightedTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=6),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=pad,
        compute_metrics=lambda seen: {"top": float(seen.predictions.argmax(-1).sum())},
    )
    with torch.no_grad():
        batch = pad([{k: v for k, v in row.items() if k != "weight"} for row in rows])
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = plain_loss(model, rows).item()
    metrics = trainer.evaluate()
    assert metrics["eval_top"] == expected.argmax(-1).sum()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(
        trainer.predict(trainer.eval_dataset).predictions, expected, rtol=1e-5, atol=1e-5
    )


# ---- returns ----


def test_weights_of_returns_by_hand():
    returns = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 16.0, 10.0, 14.0]
    cutoff = np.median(returns) + 0.5 * (np.percentile(returns, 75) - np.percentile(returns, 25))
    kept = np.array([value for value in returns if value > cutoff])
    middle = (kept.min() + kept.max()) / 2
    expected = [
        max(0, (value - middle) / (kept.max() - middle)) if value > cutoff else 0 for value in returns
    ]
    assert weights_of_returns(returns) == pytest.approx(expected)
    assert weights_of_returns(torch.tensor(returns)) == pytest.approx(expected)
    assert sum(value > 0 for value in expected) == 2
    low, high = (len(ops.exploration_filter(torch.tensor(returns), e).indices) for e in (-9.0, 9.0))
    assert low < len(kept) < high


def test_weights_come_from_the_whole_dataset_not_from_a_batch():
    dataset = Dataset.from_dict({"text": ["a"] * 40, "return": [float(i) for i in range(40)]})
    weighted = weigh_by_return(dataset, entropy=1.0)
    assert weighted.column_names == ["text", "weight"]
    assert list(weighted["weight"]) == weights_of_returns(range(40), entropy=1.0)
    assert not any(weighted["weight"][:20])
    assert weighted["weight"][39] == 1.0
    assert dataset.column_names == ["text", "return"]


@pytest.mark.parametrize(
    "returns, message",
    [([], "returns are empty"), ([1.0, math.nan], "returns hold a NaN"), ([2.0, 2.0], "none of the 2")],
)
def test_returns_that_give_no_weights(returns, message):
    with pytest.raises(ValueError, match=message):
        weights_of_returns(returns)


def test_datasets_that_cannot_be_weighed():
    dataset = Dataset.from_dict({"return": [1.0, 2.0, 3.0]})
    with pytest.raises(TypeError, match=r"must be a datasets\.Dataset, not list"):
        weigh_by_return([{"return": 1.0}])
    with pytest.raises(TypeError, match="IterableDataset"):
        weigh_by_return(dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match='column "return"'):
        weigh_by_return(Dataset.from_dict({"reward": [1.0]}))
    with pytest.raises(ValueError, match='no "weight"'):
        weigh_by_return(dataset.add_column("weight", [1.0, 1.0, 1.0]))


# ---- refusals ----


def test_only_trainers():
    for wrong in (object, Trainer.__init__, "Trainer"):
        with pytest.raises(TypeError, match="trainer_class must be"):
            return_weighted_loss(wrong)


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, 'no column "weight": add one'),
        ({"return": 1.0}, r"no column \"weight\": call weigh_by_return\(dataset\) first"),
    ],
)
def test_training_data_without_the_column(row, message, tmp_path):
    rows = [{"input_ids": [1, 2], "labels": [1, 2]} | row]
    with pytest.raises(ValueError, match=message):
        trainer_for(tiny_model(), rows, tmp_path)


@pytest.mark.parametrize(
    "weights, message",
    [
        ([None, None], 'a batch has no "weight"'),
        ([1.0, None], "missing in some examples"),
        ([1.0, -1.0], "must be finite and not negative"),
        ([1.0, math.nan], "must be finite and not negative"),
        ([1.0, math.inf], "must be finite and not negative"),
        ([1.0, [1.0] * 3], r"shape \[3\] in an example of \d tokens"),
        ([1.0, [[1.0]]], r"shape \[1, 1\]"),
    ],
)
def test_weights_that_do_not_fit(weights, message, tmp_path):
    rows = random_rows(2)
    trainer = trainer_for(tiny_model(), rows, tmp_path)
    with pytest.raises(ValueError, match=message):
        loss_of(trainer, [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)])


def test_collators_that_do_not_fit(tmp_path):
    rows = random_rows(4)
    trainer = trainer_for(tiny_model(), rows, tmp_path, collator=lambda rows: {"input_ids": 0})
    with pytest.raises(ValueError, match="labels: the data collator gives none"):
        loss_of(trainer, rows)
    trainer = trainer_for(tiny_model(), rows, tmp_path, collator=lambda rows: pad(rows[:2]))
    with pytest.raises(ValueError, match="2 rows of 4 examples"):
        loss_of(trainer, rows)


def test_arguments_that_are_not_supported(tmp_path):
    rows = random_rows(2)
    with pytest.raises(ValueError, match="use_liger_kernel"):
        trainer_for(tiny_model(), rows, tmp_path, use_liger_kernel=True)
    with pytest.raises(ValueError, match="torch_compile"):
        trainer_for(tiny_model(), rows, tmp_path, torch_compile=True)
    with pytest.raises(ValueError, match="compute_loss_func"):
        WeightedTrainer(
            tiny_model(),
            arguments(tmp_path),
            train_dataset=Dataset.from_list(rows),
            compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum(),
        )
    trainer = trainer_for(tiny_model(), rows, tmp_path)
    batch = trainer.data_collator(rows)
    with pytest.raises(ValueError, match="parallelism_config"):
        trainer.compute_loss(trainer.model, batch | {"shift_labels": batch["labels"]})


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def capped_model():
    config = Gemma2Config(
        **SMALL, num_key_value_heads=1, head_dim=16, intermediate_size=32, final_logit_softcapping=2.0
    )
    return Gemma2ForCausalLM(config)


def model_with(head):
    model = tiny_model()
    model.set_output_embeddings(head(model))
    return model


def model_with_hooked_head():
    model = tiny_model()
    model.lm_head.forward = model.lm_head.forward
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: model_with(lambda _: torch.nn.Linear(32, VOCABULARY)), "its output head has a bias"),
        (lambda: model_with(lambda m: torch.nn.Sequential(m.lm_head)), "its output head is Sequential"),
        (model_with_hooked_head, "forward of its output head was replaced"),
        (lambda: peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["lm_head"])), "is Linear"),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_ff=16, num_layers=1)),
            "encoder-decoder",
        ),
    ],
)
def test_models_that_are_refused_at_once(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_for(make(), random_rows(2), tmp_path)


def test_models_that_change_their_logits_are_refused_at_the_first_step(tmp_path):
    rows = random_rows(2)
    for keep_logits in (False, True):
        trainer = trainer_for(capped_model(), rows, tmp_path)
        trainer._keep_logits = keep_logits
        with pytest.raises(ValueError, match="scales, caps or cuts its logits"):
            loss_of(trainer, rows)


def twice(model):
    forward = model.forward
    model.forward = lambda **inputs: (forward(**inputs), forward(**inputs))[1]
    return model


def around(model):
    model.forward = lambda input_ids, **_: model.model(input_ids)
    return model


def with_prompt_tuning(model):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize(
    "change, message",
    [
        (twice, "calls its output head twice"),
        (around, "did not call its output head"),
        (with_prompt_tuning, "prompt tuning and logits_to_keep"),
    ],
)
def test_forwards_that_are_refused_at_the_first_step(change, message, tmp_path):
    rows = [row | {"weight": 1.0} for row in random_rows(2)]
    trainer = trainer_for(change(tiny_model()), rows, tmp_path)
    with pytest.raises(ValueError, match=message):
        loss_of(trainer, rows)
    assert "forward" not in vars(trainer.model.get_output_embeddings())
