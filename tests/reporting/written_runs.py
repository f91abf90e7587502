"""Run folders as a run writes them, without a run: every file that the report reads, with chosen figures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from covr_fast import TrainConfig

ROUNDS = 2
SAMPLES = 60


def write_run(
    folder: Path,
    final: float,
    *,
    seed: int = 0,
    preset: str = "racetrack",
    kind: str | None = None,
    method: str = "covr",
    model: str | None = None,
    steps: int = 3000,
    random: float = 2.0,
    episodes: int = 3,
    samples: bool = False,
    **settings,
) -> Path:
    """A finished run whose evaluation of the actor (of the VLM, where the method has no agent) has the mean
    return `final`. `settings`: by full names, with __ for the point."""
    folder.mkdir(parents=True)
    config = TrainConfig.preset(preset, model, kind, method).to_dict() | {"steps": steps, "seed": seed}
    for name, value in settings.items():
        part, _, leaf = name.rpartition("__")
        (config[part] if part else config)[leaf] = value
    (folder / "config.json").write_text(json.dumps(config))

    spread = np.linspace(-1, 1, episodes)
    means = {"random": random, "vlm_before": final / 8, "vlm_after": final / 4, "actor": final}
    if method in ("vbe", "vpf"):
        means |= {"vlm_after": final}
        del means["actor"]
    if method == "off":
        del means["vlm_before"], means["vlm_after"]
    rounds = [_round(number, steps) for number in range(1, ROUNDS + 1)] if "vlm_after" in means else []
    summary = {
        "environment": config["env"]["id"], "seed": seed, "device": "cpu",
        "machine": "Z80, 2 cores", "versions": {"covr-fast": "0.1.0", "torch": "2.13.0"},
        "steps": steps, "decisions": steps, "frames": steps, "updates": steps // 2,
        "episodes": 40, "seconds": 120.0 + seed, "steps_per_second": steps / (120.0 + seed), "rounds": rounds,
        "time_shares": {"policy update": 0.5, "fine-tuning": 0.25, "simulation": 0.125, "other": 0.125},
        "evaluations": {
            name: {"mean": mean, "std": float(spread.std()), "returns": (mean + spread).tolist()}
            for name, mean in means.items()
        },
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))

    lines = [{"step": 0, "seconds": 1.0, "eval/random_mean": random, "eval/vlm_before_mean": final / 8}]
    for tenth in range(1, 11):
        step = steps * tenth // 10
        lines.append({"step": step, "seconds": 12.0 * tenth, "episode_return": final * tenth / 10,
                      "prior_to_action": 1 / tenth, "steps_per_second": 25.0})  # fmt: skip
        if tenth % 5 == 0 and "actor" in means:
            lines.append({"step": step, "seconds": 12.0 * tenth, "eval/actor_mean": final * tenth / 10})
        if tenth % 5 == 0 and rounds:
            number = tenth // 5
            record = {f"round/{name}": value for name, value in rounds[number - 1].items() if name != "step"}
            lines.append({"step": step, "seconds": 12.0 * tenth, **record})
            lines.append({"step": step, "seconds": 12.0 * tenth, "eval/vlm_mean": final / 8 + number})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    if samples:
        (folder / "rounds").mkdir()
        for number in range(1, ROUNDS + 1):
            np.savez(folder / f"rounds/round-{number}.npz", **round_arrays(number, seed))
        Image.new("RGB", (8, 8), (0, 90, 180)).save(folder / "episode.gif")
    return folder


def _round(number: int, steps: int) -> dict[str, float]:
    return {
        "step": steps * number // 2, "round": number, "samples": SAMPLES, "kept": SAMPLES // 4,
        "tau": 0.5 + number, "cutoff": 1.5 + number, "entropy": 0.5 - number,
        "entropy_per_number": 0.25 - number / 2, "iqr_coefficient": 0.5,
        "nonzero_share": 0.4,
        "loss_before": 2.0, "loss_after": 1.0, "tuning_seconds": 3.0, "version": number,
        **{f"kept_share_quarter_{quarter}": 0.5 / quarter for quarter in (1, 2, 3, 4)},
    }  # fmt: skip


def round_arrays(number: int, seed: int) -> dict[str, np.ndarray]:
    """What RUN/rounds/round-N.npz holds."""
    rng = np.random.default_rng([number, seed])
    returns = rng.gamma(2, 2, SAMPLES).astype(np.float32)
    kept = np.sort(np.argsort(-returns)[: SAMPLES // 4])
    dropped = np.setdiff1d(np.arange(SAMPLES), kept)
    best = returns[kept]
    weights = np.clip(2 * (best - best.min()) / (best.max() - best.min()) - 1, 0, None)
    return {
        "returns": returns,
        "time": np.arange(SAMPLES, dtype=np.int32) % 20,
        "episode": np.arange(SAMPLES) // 20,
        "kept": kept,
        "weights": weights.astype(np.float32),
        "cutoff": np.float64(best.min()),
        "step": np.int64(1500 * number),
        "frames": rng.integers(0, 256, (4, 3, 12, 10), np.uint8),
        "frame_at": np.concatenate([kept[:2], dropped[:2]]),
    }
