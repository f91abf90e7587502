"""The prior's throughput against `generate`, and the tuner's.

    python benchmarks/bench_prior.py [--threads 1] [--rounds 11]

Times are medians of interleaved repetitions, so that a busy machine disturbs all candidates alike. Every
candidate's answers are compared before anything is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from covr_fast.vlm import ActionPrior, TunerConfig, VLMTuner

TASK = (
    "You drive a race car on a track that is seen from above. The grey band is the road, green is grass, and "
    "red and white corners mark sharp turns. The car is the small red shape near the bottom of the image. "
    "Keep it in the middle of the road, slow down before sharp turns, speed up on straight parts. The first "
    "number steers, from -1 (left) to 1 (right); the second is the pedal, from -1 (brake) to 1 (gas). "
    "Answer in this format: Action: [0.40, -0.30]"
)
BATCH = 16


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def bench_inference(rounds: int) -> None:
    frames = torch.randint(0, 256, (BATCH, 3, 84, 84), dtype=torch.uint8)
    print(f"batch {BATCH} of 84x84 frames, two numbers with two decimals, nano")
    for name, prompt in (("default prompt", None), ("a task in words", TASK)):
        prior = ActionPrior.from_pretrained("nano", action_dim=2, prompt=prompt, device="cpu")
        if not torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids):
            raise SystemExit("the fast path does not answer as generate() does: nothing to time")
        seconds = interleaved(
            {
                "fast": lambda prior=prior: prior(frames),
                "generate": lambda prior=prior: prior.reference(frames),
                "generate, batch 1": lambda prior=prior: prior.reference(frames[:1]),
            },
            rounds,
        )
        fast, batched, single = (seconds[key] for key in ("fast", "generate", "generate, batch 1"))
        layout = prior.layout((84, 84))
        print(f"{name}: {len(layout.prefix)} shared + {len(layout.body)} own prompt tokens")
        print(f"  fast               {BATCH / fast:8.0f} actions/s  ({fast * 1e3:.1f} ms a call)")
        print(f"  generate           {BATCH / batched:8.0f} actions/s  fast is {batched / fast:.1f}x")
        print(f"  generate, batch 1  {1 / single:8.0f} actions/s  fast is {BATCH * single / fast:.1f}x")


def bench_training(samples: int = 256) -> None:
    """Samples per second of a round, backward passes and held-out evaluations included."""
    frames = torch.randint(0, 256, (samples, 3, 84, 84), dtype=torch.uint8)
    actions = torch.rand(samples, 2) * 2 - 1
    for mode in ("lora", "full"):
        prior = ActionPrior.from_pretrained("nano", action_dim=2, device="cpu")
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench_inference(arguments.rounds)
    bench_training()


if __name__ == "__main__":
    main()
