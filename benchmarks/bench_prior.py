"""The prior's throughput against `generate`, and the tuner's.

    python benchmarks/bench_prior.py [--threads 1] [--rounds 11] [--device cuda] [--batch 64] [--model DIR]

Times are medians of interleaved repetitions, so that a busy machine disturbs all candidates alike. Every
candidate's answers are compared before anything is timed. On a GPU the decode is timed replayed as a graph
and launched kernel by kernel.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from covr_fast.vlm import ActionPrior, PriorBatch, TunerConfig, VLMTuner

TASK = (
    "You drive a race car on a track that is seen from above. The grey band is the road, green is grass, and "
    "red and white corners mark sharp turns. The car is the small red shape near the bottom of the image. "
    "Keep it in the middle of the road, slow down before sharp turns, speed up on straight parts. The first "
    "number steers, from -1 (left) to 1 (right); the second is the pedal, from -1 (brake) to 1 (gas). "
    "Answer in this format: Action: [0.40, -0.30]"
)


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each candidate, all of which have run before."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            finish()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_inference(model: str, batch: int, rounds: int, device: str) -> None:
    frames = torch.randint(0, 256, (batch, 3, 84, 84), dtype=torch.uint8).to(device)
    print(f"batch {batch} of 84x84 frames, two numbers with two decimals, {model}, {device}")
    for name, prompt in (("default prompt", None), ("a task in words", TASK)):
        prior = ActionPrior.from_pretrained(model, action_dim=2, prompt=prompt, device=device, graph=True)
        candidates: dict[str, Callable[[], PriorBatch]] = {
            "fast": lambda prior=prior: prior(frames),
            "generate": lambda prior=prior: prior.reference(frames),
            "generate, batch 1": lambda prior=prior: prior.reference(frames[:1]),
        }
        if device == "cuda":
            plain = ActionPrior.from_pretrained(model, action_dim=2, prompt=prompt, device=device)
            candidates["fast, kernel by kernel"] = lambda plain=plain: plain(frames)
        check(candidates, prior.backbone.dtype)
        seconds = interleaved(candidates, rounds, device)
        fast = seconds.pop("fast")
        layout = prior.layout((84, 84))
        print(f"{name}: {len(layout.prefix)} shared + {len(layout.body)} own prompt tokens")
        print(f"  {'fast':22} {batch / fast:8.0f} actions/s  ({fast * 1e3:.1f} ms a call)")
        for other, time_ in seconds.items():
            rate = (1 if other.endswith("batch 1") else batch) / time_
            print(f"  {other:22} {rate:8.0f} actions/s  fast is {batch / fast / rate:.1f}x")


def check(candidates: dict[str, Callable[[], PriorBatch]], dtype: torch.dtype) -> None:
    """Says how often the candidates choose the same tokens. In float32 any difference is an error."""
    expected = candidates["generate"]().token_ids
    for name, run in candidates.items():
        for _ in range(3):  # the third call of a batch size records its graph and replays it
            tokens = run().token_ids
        same = (tokens == expected[: len(tokens)]).float().mean().item()
        if same < 1 and dtype == torch.float32:
            raise SystemExit(f"{name!r} does not answer as generate() does: nothing to time")
        if same < 1:
            print(f"{name}: {same:.2%} of the tokens are generate()'s ({dtype} rounds differently)")


def bench_training(device: str, samples: int = 256) -> None:
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
        print(f"{mode}: {tuner.parameters / 1e6:.2f} M weights trained, {rate:.0f} samples/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=11, help="repetitions of each timing")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16, help="frames per call")
    parser.add_argument(
        "--model", default="nano", help="asked for answers: nano, a checkpoint directory or a hub id"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench_inference(arguments.model, arguments.batch, arguments.rounds, arguments.device)
    bench_training(arguments.device)


if __name__ == "__main__":
    main()
