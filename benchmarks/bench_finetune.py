"""Peak memory of fine-tuning with and without full logits: `python benchmarks/bench_finetune.py`.

Three steps each of the Trainer's own loss and of return_weighted_loss, on the CPU, in a process of its own.
The model is a small Llama with the vocabulary of Qwen2.5-VL. The figure is by how much the largest resident
memory of the process grows over that of three steps on two tokens, which have made weights and gradients.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

VOCABULARY, WIDTH, BATCH, TOKENS = 151_936, 256, 4, 512
VARIANTS = ("plain", "weighted", "half of the weights 0")


def peak() -> float:
    """The largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(variant: str) -> float:
    """GB by which the steps on long rows raise the peak."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from covr_fast.integrations.transformers import return_weighted_loss

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def run(tokens: int) -> None:
        rows = [{"input_ids": torch.randint(VOCABULARY, (tokens,))} for _ in range(3 * BATCH)]
        for i, row in enumerate(rows):
            row["labels"] = row["input_ids"]
            if variant != "plain":
                row["weight"] = float(variant == "weighted" or i % 2)
        trainer_class = Trainer if variant == "plain" else return_weighted_loss(Trainer)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=3,
                per_device_train_batch_size=BATCH,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                optim="sgd",
            )
            trainer_class(model, arguments, train_dataset=rows, data_collator=collate).train()

    run(2)
    before = peak()
    run(TOKENS)
    return peak() - before


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(f"{measure(sys.argv[1]):.2f}")
    else:
        logits = BATCH * TOKENS * VOCABULARY * 4 / 1e9
        print(f"{BATCH} x {TOKENS} tokens, vocabulary {VOCABULARY:,}: logits of {logits:.2f} GB")
        for variant in VARIANTS:
            done = subprocess.run(
                [sys.executable, str(Path(__file__)), variant], capture_output=True, text=True, check=True
            )
            print(f"{variant}: {done.stdout.split()[-1]} GB")
