"""A run of `covr-fast train carracing` for some time, then its figures, and its actor on the CPU.

    python benchmarks/gpu/train.py --device cuda --seconds 120 [--json FILE]

The run ends by itself, or by an interrupt after so many seconds, as by Ctrl-C; then it must be resumable.
Anything else is a failure. Prints and writes the speed of the loop and the share of each part of it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TINY = {
    "steps": 64, "warmup": 32, "log-every": 16, "decisions-per-update": 8, "env.num-envs": 2,
    "env.batch-size": 2, "env.action-repeat": 1, "env.max-episode-steps": 6,
    "env.height": 48, "env.width": 48,
    "replay.batch-size": 16, "replay.capacity": 200, "covr.psi-0": 30, "covr.min-samples": 4,
    "eval.episodes": 1, "vlm.every": 3, "tuner.max-steps": 4,
}  # fmt: skip
COMMAND = [sys.executable, "-m", "covr_fast.cli"]
SAVED = 60.0  # seconds that saving and the evaluation may take after the interrupt


def train(run: Path, device: str, seconds: float, options: list[str]) -> str:
    """Whether the run "finished" or was "interrupted".

    Raises:
        SystemExit: it failed.
    """
    arguments = ["train", "carracing", "--out", str(run), "--device", device, "--no-video", *options]
    process = subprocess.Popen([*COMMAND, *arguments])
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        code = process.wait(SAVED)
    outcomes = {0: "finished", 130: "interrupted"}
    if code not in outcomes:
        raise SystemExit(f"covr-fast {' '.join(arguments)} ended with {code}")
    return outcomes[code]


def figures(run: Path) -> dict[str, Any]:
    """The last value of every metric of a run."""
    last: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    tiny = os.environ.get("COVR_BENCH_TINY") == "1"
    options = [*(f"--{name}={value}" for name, value in TINY.items()), "--eval.no-vlm"] if tiny else []
    import envpool

    print(f"simulator: {envpool.__file__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        outcome = train(run, arguments.device, arguments.seconds, options)
        last = figures(run)
        if arguments.json:
            arguments.json.write_text(json.dumps({"last values": last}))
        without = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        evaluated = subprocess.run([*COMMAND, "evaluate", str(run), "--episodes=2"], check=False, env=without)
        if evaluated.returncode:
            raise SystemExit(f"covr-fast evaluate ended with {evaluated.returncode}")
    shares = {name.removeprefix("time/"): f"{last[name]:.0%}" for name in last if name.startswith("time/")}
    print(
        f"{outcome} at step {last['step']} after {last['seconds']:.0f} s: "
        f"{last['steps_per_second']:.0f} steps/s, "
        f"{last['updates']} updates, {last.get('round/round', 0)} rounds; {shares}"
    )


if __name__ == "__main__":
    main()
