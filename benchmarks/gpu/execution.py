"""Runs stages and keeps what they said, in files too, whatever happens."""

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from race import rows_of

from .report import markdown, stage_targets
from .stages import ROOT, Stage, groups

GRACE = 15.0  # seconds in which an interrupted stage may finish what it writes
LEAST = 5.0  # a stage is not begun with less time left


class Check:
    """A run of the check into a folder.

    - gpu.json: everything, written after every stage; gpu.md: the same to be read and committed.
    - log.txt: the output of all stages that ended; NAME.log that of a stage that is running.
    """

    def __init__(self, out: Path, deadline: float, environment: Mapping[str, str], workers: int) -> None:
        """`deadline` is a time of time.monotonic(); of a group, `workers` stages run at once."""
        self.out = out
        self.result: dict[str, Any] = {"ok": False, "left out": [], "stages": {}}
        self._deadline = deadline
        self._environment = environment
        self._workers = workers
        self._running: set[subprocess.Popen[bytes]] = set()
        (out / "log.txt").write_text("")

    def run(self, stages: list[Stage]) -> None:
        """Runs them all; only if the build fails, the others are left out."""
        for together in groups(stages):
            with ThreadPoolExecutor(self._workers) as pool:
                for name, outcome in pool.map(self._run, together):
                    self.result["stages"][name] = outcome
                    self.write()
                    self._print(name, outcome)
            if not self.result["stages"].get("build", {"ok": True})["ok"]:
                self.result["left out"] = [stage.name for stage in stages[1:]]
                break
        outcomes = self.result["stages"].values()
        self.result["ok"] = bool(outcomes) and all(outcome["ok"] for outcome in outcomes)
        self.write()

    def stop(self) -> None:
        """Ends what is running, and begins nothing any more."""
        self._deadline = 0.0
        for process in list(self._running):
            _kill(process)

    def write(self) -> None:
        for name, content in (
            ("gpu.json", json.dumps(self.result, indent=1)),
            ("gpu.md", markdown(self.result)),
        ):
            new = self.out / f"{name}.new"
            new.write_text(content + "\n")
            new.replace(self.out / name)

    # ---- one stage ----

    def _run(self, stage: Stage) -> tuple[str, dict[str, Any]]:
        limit = min(stage.limit, self._deadline - time.monotonic())
        if limit < LEAST:
            return stage.name, {"ok": False, "seconds": 0.0, "said": ["not run: no time was left"]}
        log = self.out / f"{stage.name.replace(' ', '_')}.log"
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "figures.json"
            command = [*stage.command, *([f"{stage.figures}={file}"] if stage.figures else [])]
            ended = self._execute(command, log, limit, stage.environment)
            figures = _figures(file)
        text = log.read_text(errors="replace")
        outcome: dict[str, Any] = {
            "ok": ended == "",
            "seconds": round(time.monotonic() - begin, 1),
            "said": _said(text, 1 if ended == "" else 25) + ([ended] if ended else []),
        }
        if named := failures(text):
            outcome["failures"] = named
        if figures:
            outcome["figures"] = figures
        with (self.out / "log.txt").open("a") as whole:
            whole.write(f"==== {stage.name}: {' '.join(command)}\n{text}\n{ended}\n")
        log.unlink()
        return stage.name, outcome

    def _execute(self, command: list[str], log: Path, limit: float, environment: Mapping[str, str]) -> str:
        """What went wrong with the command, or an empty string."""
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **self._environment, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return f"cannot be run: {error}"
            self._running.add(process)
            try:
                status = process.wait(limit)
                return "" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                # An interrupted pytest still writes its report.
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                return f"ended after {limit:.0f} s"
            finally:
                _kill(process)  # with all that it has started, or that would keep the device
                self._running.discard(process)

    def _print(self, name: str, outcome: dict[str, Any]) -> None:
        state = "ok" if outcome["ok"] else "FAILED"
        print(f"{name}: {state} ({outcome['seconds']:.0f} s)", flush=True)
        shown = stage_targets(self.result, name)
        if not outcome["ok"]:
            shown += outcome.get("failures", [])[:10] + outcome["said"][-8:]
        for line in shown:
            print(f"    {line[:160]}", flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _figures(file: Path) -> dict[str, Any]:
    """What a stage measured; nothing if it did not get there."""
    try:
        return rows_of(file)
    except (OSError, ValueError):
        return {}


def _said(text: str, lines: int) -> list[str]:
    """The last lines that are not empty."""
    return [line for line in text.splitlines() if line.strip()][-lines:]


_FAILED = [
    re.compile(r"^(?:\[gw\d+\] \[[ \d]+%\] )?(?:FAILED|ERROR) (tests/\S+::.*?)(?: - .*)?$"),  # xdist, summary
    re.compile(r"^(tests/\S+::.*?) (?:FAILED|ERROR)(?: +\[ *\d+%\])?$"),
]


def failures(output: str) -> list[str]:
    """The failed tests that pytest names, in its summary or, if it got no further, as they happened."""
    found = (pattern.match(line.strip()) for line in output.splitlines() for pattern in _FAILED)
    return list(dict.fromkeys(match[1] for match in found if match))
