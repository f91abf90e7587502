"""Many runs on the console: a line for each, and one for each group."""

import numpy as np
from rich.console import Console
from rich.table import Table

from ..digits import spread_text
from ..report import EVALUATIONS, new_table, shortest_names
from .context import seeds_text
from .groups import Study, Task
from .runs import Run


def print_study(study: Study, console: Console) -> None:
    """Prints a table per task: a line per run, and the mean and standard deviation of each group."""
    for task in study.tasks:
        console.print(_table(task))


def print_problems(study: Study, console: Console) -> None:
    """Prints a line for each run that is not finished, cannot be read or lacks something."""
    for broken in study.broken:
        console.print(f"{broken.folder} is left out: {broken.problem}")
    for run in study.unfinished:
        console.print(
            f"{run.folder} is left out of all figures: it is not finished ({run.steps} steps so far)"
        )
    for run in [*study.runs, *study.unfinished]:
        if run.torn:
            console.print(f"{run.folder / 'metrics.jsonl'}: its last line is torn and was left out")
        if run.lacks:
            console.print(f"{run.folder} lacks {', '.join(run.lacks)}")


def _table(task: Task) -> Table:
    table = new_table(
        f"{task.title}, runs compared: mean episode returns", ["run"], ["seed", *EVALUATIONS.values()]
    )
    folders = [run.folder for run in task.runs]
    names = dict(zip(folders, shortest_names(folders), strict=True))
    for group in task.groups:
        for run in group.runs:
            table.add_row(names[run.folder], str(run.seed), *(_mean([run], name) for name in EVALUATIONS))
        table.add_row(group.label, seeds_text(len(group.runs)), *(_mean(group.runs, n) for n in EVALUATIONS))
        table.add_section()
    return table


def _mean(runs: list[Run], name: str) -> str:
    """The mean over runs, with their standard deviation where there are several."""
    means = [run.evaluations[name].mean for run in runs if name in run.evaluations]
    if not means:
        return "-"
    return spread_text(float(np.mean(means)), float(np.std(means)), len(means))
