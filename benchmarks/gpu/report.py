"""The outcome of a check, to be read."""

from collections.abc import Iterator
from typing import Any

from race import table

from .targets import TARGETS, Target, shown


def markdown(result: dict[str, Any]) -> str:
    """Everything: the machine, stages, targets, failures and figures."""
    lines = [machine(result), "", *stage_table(result), "", *target_table(result)]
    for name, stage in result["stages"].items():
        if "failures" in stage:
            lines += ["", f"Failed in {name}:", "", *(f"- `{test}`" for test in stage["failures"])]
    for name, stage in result["stages"].items():
        if races := {row: race for row, race in stage.get("figures", {}).items() if "ratio" in race}:
            lines += ["", f"**{name}**", "", table(races)]
    return "\n".join(lines)


def machine(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result.get("versions", {}).items() if number)
    return f"{result.get('device')}; {result.get('begun')}; {versions}."


def stage_table(result: dict[str, Any]) -> list[str]:
    lines = ["| stage | outcome | seconds | said |", "| --- | --- | --- | --- |"]
    for name, stage in result["stages"].items():
        said = (stage["said"] or [""])[-1].replace("|", "/").strip("= ")[:110]
        lines.append(f"| {name} | {'ok' if stage['ok'] else 'FAILED'} | {stage['seconds']:.0f} | {said} |")
    return lines + [f"| {name} | left out | | |" for name in result["left out"]]


def target_table(result: dict[str, Any]) -> list[str]:
    lines = ["| figure | target | measured | |", "| --- | --- | --- | --- |"]
    for target in TARGETS:
        value = measured(result, target)
        found, met = "not measured", ""
        if value is not None:
            found, met = shown(value, target.unit), "met" if target.met(value) else "MISSED"
        lines.append(f"| {target.stage}: {target.what} | {target.wanted()} | {found} | {met} |")
    return lines


def stage_targets(result: dict[str, Any], stage: str) -> list[str]:
    """What one stage measured of the targets, a line each."""

    def lines() -> Iterator[str]:
        for target in TARGETS:
            value = measured(result, target) if target.stage == stage else None
            if value is not None:
                met = "met" if target.met(value) else "MISSED"
                yield f"{target.what}: {shown(value, target.unit)} ({target.wanted()}: {met})"

    return list(lines())


def measured(result: dict[str, Any], target: Target) -> float | None:
    try:
        return target.value(result["stages"][target.stage]["figures"])
    except KeyError:
        return None
