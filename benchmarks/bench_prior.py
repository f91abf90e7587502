"""The prior's throughput against `generate`, and the tuner's.

    python benchmarks/bench_prior.py [--threads 1] [--rounds 11] [--device cuda] [--batch 64] \\
        [--model MODEL] [--json FILE]

On a GPU the decode is timed both replayed as a graph and launched kernel by kernel. Without a checkpoint,
`--model qwen-3b-random` has the shape of Qwen2.5-VL-3B.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from race import Function, check_same, heading, on_device, race, sized, table, wall, write_rows
from random_qwen import TASK, open_prior

from covr_fast.vlm import TunerConfig, VLMTuner

Row = tuple[str, dict[str, Any]]


def answers(model: str, batch: int, rounds: int, device: str) -> Iterator[Row]:
    """Answers per second to frames of 84x84, with a short and a long prompt, one by one and in batches."""
    frames = torch.randint(0, 256, (batch, 3, 84, 84), dtype=torch.uint8).to(device)
    for name, prompt in (("default prompt", None), ("a task in words", TASK)):
        load = partial(open_prior, model, action_dim=2, prompt=prompt, device=device)
        prior, plain = load(graph=True), load(graph=False) if device == "cuda" else None
        layout = prior.layout((84, 84))
        prompts = f"{name} ({len(layout.prefix)} shared + {len(layout.body)} own tokens)"
        for count in dict.fromkeys((batch, 1)):
            images = frames[:count]
            functions = {"ours": partial(prior, images), "generate": partial(prior.reference, images)}
            if plain:
                functions["ours, kernel by kernel"] = partial(plain, images)
            check(functions, prior.backbone.dtype)
            result = race(functions, rounds, partial(wall, device=device))
            if device == "cuda":
                result["on_device"] = on_device(
                    functions["ours"], 3, record=False
                )  # it has streams of its own
            yield f"{model}, {prompts}, batch {count}", {**result, "items": count}


def check(functions: dict[str, Function], dtype: torch.dtype) -> None:
    """In float32 any token that differs is an error; otherwise says how many differ."""

    def tokens(name: str, run: Function) -> torch.Tensor:
        # The third call of a batch size records its graph and replays it. generate() has none, and is slow.
        for _ in range(1 if name == "generate" else 3):
            answer = run()
        return answer.token_ids

    def same(expected: torch.Tensor, found: torch.Tensor) -> bool:
        share = (found == expected).float().mean().item()
        if share < 1:
            print(f"{share:.2%} of the tokens are the same ({dtype})")
        return share == 1 or dtype != torch.float32

    check_same({name: partial(tokens, name, run) for name, run in functions.items()}, same)


def training(model: str, device: str) -> Iterator[Row]:
    """Rounds of the tuner, backward passes and held-out evaluations included; the items are samples."""
    samples = sized(256, 8)
    frames = torch.randint(0, 256, (samples, 3, 84, 84), dtype=torch.uint8)
    actions = torch.rand(samples, 2) * 2 - 1
    # All weights are an option for nano only: 3 B weights with Adam's moments take 50 GB.
    for mode in ("lora", "full") if model == "nano" else ("lora",):
        prior = open_prior(model, action_dim=2, device=device)
        micro_batch = 64 if model == "nano" else 16  # by memory
        config = TunerConfig(mode=mode, lora_rank=32, epochs=2, micro_batch=micro_batch)
        tuner = VLMTuner(prior, config)
        for _ in range(2):  # the first round warms up
            tuner.start(frames, actions, torch.ones(samples))
            report = tuner.poll()
        name = f"a round of {model} ({tuner.parameters / 1e6:.2f} M weights trained)"
        timed = {"seconds": {mode: report.seconds}, "ratio": {}, "unavailable": {}}
        yield name, {**timed, "items": report.trained * config.epochs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=11, help="repetitions of each timing")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16, help="frames per call")
    parser.add_argument("--model", default="nano", help="nano, qwen-3b-random, a directory or a hub id")
    parser.add_argument("--json", type=Path, help="also write the figures there, after every row")
    arguments = parser.parse_args()
    model, device = arguments.model, arguments.device
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: dict[str, dict[str, Any]] = {}
    for measured in (answers(model, arguments.batch, arguments.rounds, device), training(model, device)):
        for name, row in measured:
            rows[name] = row
            write_rows(arguments.json, rows)
    print(f"{heading(device)}\n{table(rows)}")


if __name__ == "__main__":
    main()
