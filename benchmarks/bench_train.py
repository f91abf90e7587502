"""Training from pixels end to end, against Stable-Baselines3's SAC on Gymnasium's vector environments.

    python benchmarks/bench_train.py [--environments carracing ...] [--decisions-per-update 1 4 16] \\
        [--rounds 3] [--seconds 5] [--threads 1] [--json FILE] [> FILE.md]

Both have the same network (Stable-Baselines3's policy has the encoder of ours), batch, pictures, number of
environments, torch threads, and updates per decision. Before anything is timed, weights and operations of the
networks are compared, sampled observations are looked up among those that the environments gave, and updates
are counted. Each contestant trains in a process of its own, in turn.

Stable-Baselines3 simulates, then updates. Its environments are in a process each (AsyncVectorEnv) or all in
one (SyncVectorEnv), whichever simulates faster here. `pip install '.[train,bench]'` brings them:
gymnasium[box2d], highway-env and dm_control.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from race import PACKAGES, heading, race, write_rows
from training import ours, sb3
from training.chunks import Chunk, Contestant, Facts
from training.peer_envs import SOURCES
from training.settings import ENVIRONMENTS, Settings, settings_of
from training.simulation import ours_alone, peer_alone
from training.vector import VECTORS

OURS = "covr_fast"
SAME = ("obs_shape", "batch_size", "threads")
NEARLY = ("parameters", "act operations", "critic operations")


# ---- one race ----


def check_same(ours: Facts, peer: Facts) -> None:
    """Raises an AssertionError unless both train the same network on the same batches: within a percent."""
    for name in SAME:
        assert ours[name] == peer[name], f"{name}: {ours[name]} and {peer[name]}"
    for name in NEARLY:
        assert abs(ours[name] / peer[name] - 1) < 0.01, f"{name}: {ours[name]} and {peer[name]}"


def compare(
    contestants: Mapping[str, tuple[Any, ...]],
    rounds: int,
    seconds: float,
    repeat: int,
    check: Callable[[Facts, Facts], None] = lambda ours, peer: None,
) -> dict[str, Any]:
    """Lets contestants work in turn.

    Args:
        contestants: by name, the arguments of a Contestant; ours first.
        rounds: chunks of each.
        seconds: of a chunk.
        repeat: environment steps per decision.
        check: gets the facts of ours and of a peer; raises where they differ.

    Returns:
        a row of `race.race` whose times are those of an environment step; and, by name, "steps_per_second",
        "updates_per_second", "cpu_per_step" (seconds of processors), "shares" of the time by activity, and
        "facts".
    """
    running: dict[str, Contestant] = {}
    facts: dict[str, Facts] = {}
    runs: dict[str, Callable[[], float] | str] = {}

    def seconds_per_step(contestant: Contestant) -> float:
        chunk = contestant.chunk(seconds)
        return chunk.took / (chunk.decisions * repeat)

    with ExitStack() as stack:
        for name, arguments in contestants.items():
            contestant = Contestant(*arguments)
            stack.callback(contestant.close)
            try:
                facts[name] = contestant.facts()
            except RuntimeError as error:
                runs[name] = " ".join(str(error).split())[:160]
                continue
            running[name], runs[name] = contestant, partial(seconds_per_step, contestant)
        if len(running) < 2:
            why = {name: run for name, run in runs.items() if isinstance(run, str)}
            return {"seconds": {}, "ratio": {}, "unavailable": why, "facts": facts}
        first, *others = running
        for name in others:
            check(facts[first], facts[name])
        result = race(runs, rounds, timer=lambda run: run(), warmups=0)
    chunks = {name: contestant.chunks for name, contestant in running.items()}
    return {
        **result,
        "facts": facts,
        "steps_per_second": {
            name: statistics.median(repeat * chunk.decisions / chunk.took for chunk in of)
            for name, of in chunks.items()
        },
        "updates_per_second": {
            name: statistics.median(chunk.updates / chunk.took for chunk in of) for name, of in chunks.items()
        },
        "cpu_per_step": {
            name: sum(chunk.cpu for chunk in of) / sum(repeat * chunk.decisions for chunk in of)
            for name, of in chunks.items()
        },
        "shares": {name: shares(of) for name, of in chunks.items()},
    }


def shares(chunks: Sequence[Chunk]) -> dict[str, float]:
    """Share of the time of all chunks by activity; "other" is the rest."""
    total = sum(chunk.took for chunk in chunks)
    found = {name: sum(chunk.seconds[name] for chunk in chunks) / total for name in chunks[0].seconds}
    return {**found, "other": 1 - sum(found.values())} if found else {}


# ---- the rows ----


def environment_rows(
    environment: str, ratios: Sequence[int], rounds: int, seconds: float, threads: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their names: the simulation alone, then training, by decisions per update."""
    settings = Settings(environment, ratios[0], threads)
    repeat, source = settings_of(settings).env.action_repeat, SOURCES[environment]
    peers = {f"{source}, {how}": how for how in VECTORS}
    simulations = {name: (peer_alone, settings, how) for name, how in peers.items()}
    alone = compare({OURS: (ours_alone, settings), **simulations}, rounds, seconds, repeat)
    yield f"{environment}, simulation alone", alone
    if alone["seconds"]:
        fastest = min(alone["seconds"].keys() - {OURS}, key=alone["seconds"].get)
        for ratio in ratios:
            settings = Settings(environment, ratio, threads)
            name = f"Stable-Baselines3 on {fastest}"
            contestants = {OURS: (ours.train, settings), name: (sb3.train, settings, peers[fastest])}
            row = compare(contestants, rounds, seconds, repeat, check_same)
            yield f"{environment}, {Fraction(1, ratio)} updates per decision", row


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| row | contestant | env steps/s | updates/s | slower than covr_fast | CPU per step | its time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, info in rows.items():
        for name in info["seconds"]:
            steps, updates = info["steps_per_second"][name], info["updates_per_second"][name]
            slower = (
                "{1:.2f}x ({0:.2f} to {2:.2f})".format(*info["ratio"][name]) if name in info["ratio"] else ""
            )
            time = ", ".join(
                f"{share:.0%} {what}" for what, share in info["shares"][name].items() if share > 0.005
            )
            cpu = f"{1e3 * info['cpu_per_step'][name]:.2f} ms"
            lines.append(f"| {row} | {name} | {steps:,.0f} | {updates:.1f} | {slower} | {cpu} | {time} |")
        for name, why in info["unavailable"].items():
            lines.append(f"| {row} | {name} | not measured: {why} | | | | |")
    return "\n".join(lines)


def work(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Whose update has how many operations: one line per environment."""
    lines = {}
    for row, info in rows.items():
        found = [f"{name} {f['update operations'] / 1e9:.2f}" for name, f in info["facts"].items() if f]
        if found:
            weights = next(iter(info["facts"].values()))["parameters"]
            lines[row.partition(",")[0]] = (
                f"{weights:,} weights; 1e9 operations of an update: {', '.join(found)}"
            )
    return "\n".join(f"- {environment}: {line}" for environment, line in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", nargs="+", choices=ENVIRONMENTS, default=ENVIRONMENTS)
    parser.add_argument("--decisions-per-update", nargs="+", type=int, default=(1, 4, 16))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="that a contestant trains in a round")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both")
    parser.add_argument("--json", type=Path, help="also write the figures there, after every row")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for environment in arguments.environments:
        found = environment_rows(
            environment,
            arguments.decisions_per_update,
            arguments.rounds,
            arguments.seconds,
            arguments.threads,
        )
        for name, row in found:
            rows[name] = row
            write_rows(arguments.json, rows)
            print(table({name: row}), file=sys.stderr, flush=True)
    simulators = ("gymnasium", "envpool", "highway-env", "dm_control", "mujoco")
    print(f"{heading(packages=(*PACKAGES, *simulators))}\n{table(rows)}\n\n{work(rows)}")


if __name__ == "__main__":
    main()
