"""Whether stored priors are what the VLM said: they are recomputed with the weights of their version."""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from .buffer import ReplayBuffer
from .checkpoint import Checkpoint, load_config
from .config import TrainConfig
from .errors import UserError
from .load_vlm import load_round
from .report import new_table
from .rounds import vlm_images
from .staleness import stored_priors
from .versions import RoundWeights
from .vlm import ActionPrior

_ROUNDING = 1e-6  # of float32; numbers of the finest grid are 1e-4 apart
_BACKGROUND_BATCH = 64  # the labeller's


@dataclass(frozen=True)
class Difference:
    """A stored prior that its weights do not give."""

    id: int
    """Of the transition."""
    version: int
    stored: str
    """The answer that spells the stored prior; its numbers if none does."""
    recomputed: str
    gap: float | None
    """log p(recomputed) - log p(stored) of the first token in which the two answers differ, in nats,
    normalized over the tokens that the grammar allows there. Near 0: a tie, which rounding may decide either
    way. None: the stored numbers are no answer."""


@dataclass
class VersionAudit:
    """The checked priors of one version of the weights."""

    weights: RoundWeights | None
    """None: these weights were not kept."""
    stored: int
    """Priors of this version in the replay buffer."""
    checked: int = 0
    differences: list[Difference] = field(default_factory=list)


@dataclass
class Audit:
    """The result of `audit`."""

    versions: dict[int, VersionAudit]
    held: int
    """Transitions that were left out because they repeat the prior of the decision before."""

    @property
    def differences(self) -> list[Difference]:
        return [each for version in self.versions.values() for each in version.differences]


def audit(run: Path, *, rows: int = 64, seed: int = 0) -> Audit:
    """Recomputes `rows` random stored priors of a run with the weights of their versions, and compares them
    token by token.

    Raises:
        UserError: the run has no replay buffer, no priors, or sampled ones; or no weights of their versions
            were kept.
    """
    config = load_config(run)
    config.check()
    if not config.has_vlm:
        raise UserError(f"{run} has no VLM (covr.vlm='off'), so it has no priors")
    if config.vlm.temperature > 0:
        raise UserError(
            f"{run} has sampled priors (vlm.temperature={config.vlm.temperature:g}), which depend on random "
            "numbers that are gone: only greedy priors (vlm.temperature=0) can be recomputed"
        )
    saved = Checkpoint(run)
    if not saved.has_replay():
        raise UserError(
            f"{run} holds no replay buffer, so no priors: audit a run that was interrupted, or that was "
            "trained with --save-replay"
        )
    buffer = saved.buffer(torch.device("cpu"))
    ids, versions = (torch.from_numpy(values) for values in stored_priors(buffer))
    own = _own(buffer, ids) if config.vlm.between == "hold" else torch.ones(len(ids), dtype=torch.bool)
    held, ids, versions = int((~own).sum()), ids[own], versions[own]
    if len(ids) == 0:
        raise UserError(f"{run} holds no priors: its replay buffer has {len(buffer)} transitions without one")
    opened = {weights.version: weights for weights in saved.rounds(config)}
    found = {
        version: VersionAudit(opened.get(version), int((versions == version).sum()))
        for version in versions.unique().tolist()
    }
    ids = ids[torch.isin(versions, torch.tensor(list(opened)))]
    if len(ids) == 0:
        raise UserError(
            f"{run} keeps the weights of the versions {_listed(opened)}, and its priors are of the versions "
            f"{_listed(found)}: nothing can be recomputed"
        )
    chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:rows]
    ids = ids[chosen].sort().values
    of_version = buffer.extras(ids)["prior_version"]
    for version, result in found.items():
        asked = ids[of_version == version]
        if result.weights is not None and len(asked):
            prior = load_round(config, saved, result.weights)
            result.checked, result.differences = len(asked), list(_compare(config, buffer, prior, asked))
            del prior
            gc.collect()  # models refer to themselves: without this, two of them would be in memory
    return Audit(found, held)


def print_audit(result: Audit, console: Console) -> None:
    """Prints a table by version, and each difference."""
    table = new_table("stored priors, recomputed", ["weights"], ["stored", "checked", "equal", "differing"])
    for version, each in sorted(result.versions.items()):
        where = "not kept"
        if each.weights is not None:
            where = f"after round {each.weights.number}" if each.weights.number else "before any round"
        numbers = (each.stored, each.checked, each.checked - len(each.differences), len(each.differences))
        table.add_row(f"version {version}, {where}", *map(str, numbers))
    console.print(table)
    if result.held:
        console.print(f"{result.held} transitions with the prior of the decision before were left out")
    for one in result.differences:
        closeness = (
            "and no answer spells the stored numbers"
            if one.gap is None
            else f"which is {one.gap:.3g} nats likelier at the first token that differs"
        )
        console.print(
            f"transition {one.id}, version {one.version}: stored {one.stored!r}, recomputed "
            f"{one.recomputed!r}, {closeness}",
            markup=False,
        )


def _listed(versions: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(versions)))


def _own(buffer: ReplayBuffer, ids: Tensor) -> Tensor:
    """bool[n], which of these transitions have a prior that is certainly their own, and not held from the
    decision before: it differs from the prior there, or begins an episode."""
    first, _, count = buffer.stream_bounds()
    rows = buffer.span_rows(first, count)  # one environment after another, each in the order of time
    extras = buffer.extras(rows["ids"])
    answer = torch.cat((extras["prior"].double(), extras["prior_version"].double()[:, None]), 1)
    changed = (answer[1:] != answer[:-1]).any(1).numpy()
    own = rows["time"] == 0
    own[1:] |= (rows["ids"][1:] == rows["ids"][:-1] + buffer.num_envs) & changed
    return torch.isin(ids, torch.from_numpy(rows["ids"][own]))


def _compare(
    config: TrainConfig, buffer: ReplayBuffer, prior: ActionPrior, ids: Tensor
) -> Iterator[Difference]:
    """The differences among transitions whose priors have the version of `prior`."""
    # Sums are rounded by the size of a batch, so the batches are as large as those of the run.
    size = _BACKGROUND_BATCH if config.vlm.background else config.env.batch_size
    for chunk in ids.split(size):
        asked = torch.cat((chunk, chunk[-1:].expand(size - len(chunk))))
        images = vlm_images(config, buffer, asked)
        answers = prior(images).token_ids.tolist()
        for i, stored in enumerate(buffer.extras(chunk)["prior"]):
            if found := _difference(prior, images[i : i + 1], stored, answers[i]):
                yield Difference(int(chunk[i]), prior.version, *found)


def _difference(
    prior: ActionPrior, image: Tensor, stored: Tensor, answer: list[int]
) -> tuple[str, str, float | None] | None:
    """None if `stored` float32[A] is what `answer` spells, else the last three fields of a Difference."""
    grammar = prior.grammar
    scale = 10**grammar.decimals
    nearest = (stored.double().clamp(-1, 1) * scale).round() / scale
    if not ((stored - nearest).abs() <= _ROUNDING).all():  # also for NaN
        numbers = ", ".join(f"{number:g}" for number in stored.tolist())
        return f"[{numbers}]", grammar.decode(answer), None
    spelled: list[int] = grammar.encode(stored[None])[0].tolist()
    for place, (here, there) in enumerate(zip(spelled, answer, strict=False)):  # one may be padded
        if here != there:
            log_prob = prior.next_token(image, answer[:place])
            return grammar.decode(spelled), grammar.decode(answer), log_prob[there] - log_prob[here]
    return None
