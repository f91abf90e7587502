"""The prior's throughput against `generate`, and how well fine-tuning hides behind other work.

    python benchmarks/bench_prior.py [--threads 1] [--rounds 11]

Times are medians of interleaved repetitions, so that a busy machine disturbs all candidates alike. Every
candidate's answers are compared before anything is timed.
"""

import argparse
import statistics
import threading
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


def bench_training(samples: int = 256) -> tuple[VLMTuner, Callable[[], None]]:
    """Returns a tuner whose round has been timed, and a function that runs such a round again."""
    frames = torch.randint(0, 256, (samples, 3, 84, 84), dtype=torch.uint8)
    actions = torch.rand(samples, 2) * 2 - 1
    returns = torch.ones(samples)
    for mode in ("lora", "full"):
        prior = ActionPrior.from_pretrained("nano", action_dim=2, device="cpu")
        config = TunerConfig(mode=mode, lora_rank=32, epochs=2, micro_batch=64, overlap=mode == "full")
        tuner = VLMTuner(prior, config)
        for _ in range(2):  # the first round warms up
            tuner.start(frames, actions, returns)
            report = tuner.wait()
        rate = report.trained * config.epochs / report.seconds
        print(f"{mode}: {tuner.parameters / 1e6:.2f} M weights trained, {rate:.0f} samples/s")

    def run() -> None:
        tuner.start(frames, actions, returns)
        tuner.wait()

    return tuner, run


def bench_overlap(tuner: VLMTuner, tune: Callable[[], None], rounds: int) -> None:
    """A stand-in for policy updates (convolutions and their gradients, one thread) beside a round."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(9, 32, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.ReLU()
    )
    images = torch.rand(32, 9, 84, 84)

    def update() -> None:
        net(images).square().mean().backward()

    began = time.perf_counter()
    tune()
    alone = time.perf_counter() - began
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < alone:
        update()
        count += 1

    def policy() -> None:
        for _ in range(count):
            update()

    def both() -> None:
        thread = threading.Thread(target=policy)
        thread.start()
        tune()
        thread.join()

    def serial() -> None:
        policy()
        tune()

    seconds = interleaved(
        {"policy": policy, "tuner": tune, "serial": serial, "overlapped": both}, max(3, rounds // 3)
    )
    slowest = max(seconds["policy"], seconds["tuner"])
    print("  ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    print(f"overlapped takes {seconds['overlapped'] / slowest:.2f}x the longer of the two alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=11, help="repetitions of each timing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    bench_inference(arguments.rounds)
    tuner, tune = bench_training()
    bench_overlap(tuner, tune, arguments.rounds)


if __name__ == "__main__":
    main()
