"""Every run, with the command that makes it."""

import json

from .command import command
from .context import Context
from .markup import Markup, note, number, scrolled_table, section, spread, tag
from .runs import Final, Run
from .speed import duration

_HEADS = [
    "run", "group", "seed", "actor", "VLM before", "VLM after", "random", "steps", "rounds", "wall time",
]  # fmt: skip


def runs_section(context: Context) -> Markup:
    study = context.study
    rows = [_row(run, group.label) for task in study.tasks for group in task.groups for run in group.runs]
    rows += [_row(run, "not finished") for run in study.unfinished]
    table = scrolled_table(
        _HEADS, rows, "Returns of the last evaluations, mean ± standard deviation over episodes.", words=2
    )
    settings = [_settings(run) for run in [*study.runs, *study.unfinished]]
    return section("runs", "Every run", table, note("How each was made:"), *settings)


def _row(run: Run, label: str) -> list[object]:
    return [
        str(run.folder),
        label,
        "-" if run.seed is None else str(run.seed),
        *(_return(run.evaluations.get(name)) for name in ("actor", "vlm_before", "vlm_after", "random")),
        f"{run.steps:,}",
        str(len(run.rounds)) if "rounds" in run.summary else "-",
        duration([run.summary["seconds"]]) if "seconds" in run.summary else "-",
    ]


def _return(final: Final | None) -> str:
    if final is None:
        return "-"
    return number(final.mean) if final.episodes == 1 else spread(final.mean, final.std)


def _settings(run: Run) -> Markup:
    line = command(run)
    said = tag("code", line) if line else note("Its preset is not known, so there is no command.")
    values = [[name, json.dumps(value)] for name, value in run.settings.items()]
    table = scrolled_table(["setting", "value"], values, "Every setting of config.json.", words=2)
    inner = tag("details", tag("summary", f"all {len(values)} settings"), table) if values else Markup("")
    return tag("details", tag("summary", str(run.folder)), tag("p", said), inner)
