"""The prior's throughput against `generate`, and the tuner's.

    python benchmarks/bench_prior.py [--threads 1] [--rounds 11] [--device cuda] [--batch 64] [--model DIR]

On a GPU the decode is timed both replayed as a graph and launched kernel by kernel.
"""

import argparse
from functools import partial

import torch
from race import Function, check_same, heading, race, table, wall

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner

TASK = (
    "You drive a race car on a track that is seen from above. The grey band is the road, green is grass, and "
    "red and white corners mark sharp turns. The car is the small red shape near the bottom of the image. "
    "Keep it in the middle of the road, slow down before sharp turns, speed up on straight parts. The first "
    "number steers, from -1 (left) to 1 (right); the second is the pedal, from -1 (brake) to 1 (gas). "
    "Answer in this format: Action: [0.40, -0.30]"
)


def answers(model: str, batch: int, rounds: int, device: str) -> str:
    """Answers per second to frames of 84x84, with a short and a long prompt, one by one and in batches."""
    frames = torch.randint(0, 256, (batch, 3, 84, 84), dtype=torch.uint8).to(device)
    rows = {}
    for name, prompt in (("default prompt", None), ("a task in words", TASK)):
        load = partial(ActionPrior.from_pretrained, model, action_dim=2, prompt=prompt, device=device)
        prior, plain = load(graph=True), load() if device == "cuda" else None
        layout = prior.layout((84, 84))
        prompts = f"{name} ({len(layout.prefix)} shared + {len(layout.body)} own tokens)"
        for count in dict.fromkeys((batch, 1)):
            images = frames[:count]
            functions = {"ours": partial(prior, images), "generate": partial(prior.reference, images)}
            if plain:
                functions["ours, kernel by kernel"] = partial(plain, images)
            check(functions, prior.backbone.dtype)
            result = race(functions, rounds, partial(wall, device=device))
            rows[f"{prompts}, batch {count}"] = {**result, "items": count}
    return table(rows)


def check(functions: dict[str, Function], dtype: torch.dtype) -> None:
    """In float32 any token that differs is an error; otherwise says how many differ."""

    def tokens(run: Function) -> torch.Tensor:
        for _ in range(3):  # the third call of a batch size records its graph and replays it
            answer = run()
        return answer.token_ids

    def same(expected: torch.Tensor, found: torch.Tensor) -> bool:
        share = (found == expected).float().mean().item()
        if share < 1:
            print(f"{share:.2%} of the tokens are the same ({dtype})")
        return share == 1 or dtype != torch.float32

    check_same({name: partial(tokens, run) for name, run in functions.items()}, same)


def training(device: str, samples: int = 256) -> None:
    """Samples per second of a round, backward passes and held-out evaluations included."""
    frames = torch.randint(0, 256, (samples, 3, 84, 84), dtype=torch.uint8)
    actions = torch.rand(samples, 2) * 2 - 1
    for mode in ("lora", "full"):
        prior = ActionPrior.from_pretrained("nano", action_dim=2, device=device)
        config = TunerConfig(mode=mode, lora_rank=32, epochs=2, micro_batch=64)
        tuner = VLMTuner(prior, config)
        for _ in range(2):  # the first round warms up
            tuner.start(frames, actions, torch.ones(samples))
            report = tuner.poll()
        rate = report.trained * config.epochs / report.seconds
        print(f"- {mode}: {tuner.parameters / 1e6:.2f} M weights trained, {rate:.0f} samples/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=11, help="repetitions of each timing")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16, help="frames per call")
    parser.add_argument("--model", default="nano", help="asked for answers: nano, a directory or a hub id")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(heading(arguments.device))
    print(answers(arguments.model, arguments.batch, arguments.rounds, arguments.device), end="\n\n")
    training(arguments.device)


if __name__ == "__main__":
    main()
