"""The paper's tables, with a column of ours."""

from .. import paper
from ..paper import PaperTask, Row
from ..vlm.model.nano import is_nano
from .aggregates import over_seeds, scores
from .context import Context, seeds_text
from .departures import departures
from .groups import Group, Task, short
from .markup import Markup, exact, join, note, scrolled_table, section, tag

_WITHOUT_VLM = ("off", "per", "ere", "m10", "m11")
_UNTRAINED = ("vbe",)
_MOST_SETTINGS = 3  # that a remark names
_SAME_BUDGET = 0.01
"""Relative difference in steps that the end of a batch of decisions explains."""
_HEADS = ["method", "published", "ours", tag("th", "what differs from the paper’s", scope="col")]


def published_section(context: Context) -> Markup:
    tables = []
    for task in context.study.tasks:
        tables += [tag("h3", task.title), _table(task)]
    return section(
        "published",
        "Beside the published figures",
        note(
            "Episode returns. Ours: mean ± standard deviation over seeds. Published: Xia et al. 2026 "
            f"(arXiv 2601.06122), {paper.SEEDS} seeds, {paper.EPISODES} evaluation episodes, {paper.VLM}; "
            "whether its ± is over seeds or episodes is not known here. Grey rows were not run. A figure "
            "of ours with a remark beside it does not compare with the published one."
        ),
        *(tables or [note("No run is finished.")]),
    )


def _table(task: Task) -> Markup:
    scored = [group for group in task.groups if group.scored]
    if task.paper is None:
        own = [[group.label, _ours(group), seeds_text(len(group.scored))] for group in scored]
        return scrolled_table(
            ["group", "ours", "seeds"], own, f"{task.title} is not in the paper: our figures alone."
        )
    of_row: dict[str | None, list[Group]] = {}
    for group in scored:
        row = task.paper.row(group.kind, group.method)
        of_row.setdefault(row.name if row else None, []).append(group)
    rows: list[list[object]] = []
    for row in task.paper.rows:
        rows += _row(task.paper, row, of_row.get(row.name, []))
    for group in of_row.get(None, []):
        remark = tag("td", "the paper has no such row", class_="remark")
        rows.append([f"{group.label}", tag("td", "-", class_="number"), _ours_cell(group), remark])
    return scrolled_table(_HEADS, rows, f"{task.paper.name}, {task.paper.steps:,} environment steps.")


def _row(task: PaperTask, row: Row, groups: list[Group]) -> list[list[object]]:
    """The row of the paper, as often as groups of ours belong to it."""
    if not groups:
        cells = [_published(row), "not run", "" if row.method else "not a method of covr_fast"]
        sides = ["absent number", "absent number", "absent"]
        greyed = [tag("td", cell, class_=side) for cell, side in zip(cells, sides, strict=True)]
        return [[tag("th", row.name, scope="row", class_="absent"), *greyed]]
    rows: list[list[object]] = []
    for group in groups:
        name = tag("th", row.name, tag("br"), tag("span", group.label, class_="note"), scope="row")
        remarks = "; ".join(differences(task, row, group))
        published = tag("td", _published(row), class_="number")
        rows.append([name, published, _ours_cell(group), tag("td", remarks, class_="remark")])
    return rows


def differences(task: PaperTask, row: Row, group: Group) -> list[str]:
    """What keeps a group's figure from being compared with a row of the paper."""
    found = []
    steps = sorted({run.steps for run in group.scored})
    if group.method not in _UNTRAINED and any(abs(s - task.steps) > _SAME_BUDGET * task.steps for s in steps):
        found.append(f"{' and '.join(f'{s:,}' for s in steps)} steps, not {task.steps:,}")
    if group.method not in _WITHOUT_VLM:
        if is_nano(group.model):
            found.append("the VLM is nano, which knows nothing before its first round")
        elif paper.VLM not in group.model:
            found.append(f"the VLM is {group.model}, not {paper.VLM}")
    if len(group.scored) < paper.SEEDS:
        found.append(f"{seeds_text(len(group.scored))}, not {paper.SEEDS}")
    episodes = sorted({run.final.episodes for run in group.scored if run.final})
    if episodes != [paper.EPISODES]:
        found.append(f"{' and '.join(map(str, episodes))} evaluation episodes, not {paper.EPISODES}")
    if row.kind is None and group.method not in ("vbe", "vpf"):
        found.append(f"the agent is {group.kind}, and the paper’s is not known here")
    whose, changed = departures(group, task)
    if changed:
        named = [f"{name}={short(value)}" for name, value in list(changed.items())[:_MOST_SETTINGS]]
        more = f" (+{len(changed) - len(named)} more)" if len(changed) > len(named) else ""
        found.append(f"settings differ from {whose}: {', '.join(named)}{more}")
    if not group.settings:
        found.append("its settings are not known: it has no config.json")
    return found


def _published(row: Row) -> str:
    return exact(row.mean) if row.std is None else f"{exact(row.mean)} ± {exact(row.std)}"


def _ours(group: Group) -> str:
    return over_seeds(scores(group))


def _ours_cell(group: Group) -> Markup:
    counted = tag("span", f" ({seeds_text(len(group.scored))})", class_="note")
    return tag("td", join([tag("strong", _ours(group)), counted]), class_="number")
