"""COVR, the baselines and the ablations of its paper, as changes of a run's settings (Xia et al. 2026, tables
of results and of ablations). They go with every preset and every kind of agent.

What the paper leaves open of a row, docs/sweeps.md says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables."""

    summary: str
    change: Callable[["TrainConfig"], None]
    """Turns the settings of COVR into those of the method."""


def _covr(config: "TrainConfig") -> None:
    """The presets are COVR's."""


def _off(config: "TrainConfig") -> None:
    config.covr.vlm = "off"


def _frozen(config: "TrainConfig") -> None:
    config.covr.vlm, config.covr.cold_start = "frozen", 0


def _annealed(config: "TrainConfig") -> None:
    _frozen(config)
    config.covr.decay = 1.0


def _vlm_alone(config: "TrainConfig") -> None:
    config.covr.decides, config.covr.vlm = "vlm", "frozen"


def _vlm_as_policy(config: "TrainConfig") -> None:
    config.covr.decides = "vlm"
    config.vlm.temperature = 1.0  # it has to explore
    config.vlm.background = False


def _replay(sampler: str) -> Callable[["TrainConfig"], None]:
    def change(config: "TrainConfig") -> None:
        _off(config)
        config.replay.sampler = sampler  # type: ignore[assignment]

    return change


def _best_returns(share: float) -> Callable[["TrainConfig"], None]:
    def change(config: "TrainConfig") -> None:
        _replay("best")(config)
        config.replay.best_share = share

    return change


def _kept(rule: str, share: float = 0.0) -> Callable[["TrainConfig"], None]:
    def change(config: "TrainConfig") -> None:
        config.covr.filter = rule  # type: ignore[assignment]
        if share:
            config.covr.top_share = share

    return change


def _covr_with(name: str, value: object) -> Callable[["TrainConfig"], None]:
    return lambda config: setattr(config.covr, name, value)


METHODS: dict[str, Method] = {
    "covr": Method("COVR: the VLM guides the agent, whose best samples tune the VLM", _covr),
    "off": Method("the agent alone: no VLM is loaded", _off),
    "vbe": Method("the VLM alone, as it comes (VBE): nothing is trained", _vlm_alone),
    "dpl": Method("a frozen VLM guides with a constant weight (DPL)", _frozen),
    "apl": Method("a frozen VLM guides with a weight that falls to 0 (APL)", _annealed),
    "vpf": Method("the VLM is the policy, tuned on its own best samples (VPF)", _vlm_as_policy),
    "per": Method("the agent alone, with prioritized replay (PER)", _replay("prioritized")),
    "ere": Method("the agent alone, with emphasis on recent experience (ERE)", _replay("recent")),
    "m1": Method("COVR with a random filter that keeps as many samples as EDDF", _kept("random")),
    "m2": Method("COVR with the top 80 % of returns instead of EDDF", _kept("top", 0.8)),
    "m3": Method("COVR with the top 90 % of returns instead of EDDF", _kept("top", 0.9)),
    "m4": Method("COVR with the top 95 % of returns instead of EDDF", _kept("top", 0.95)),
    "m5": Method("COVR without z-scores: the threshold in units of the return", _covr_with("z_score", False)),
    "m6": Method("COVR with rewards instead of returns", _covr_with("score", "reward")),
    "m7": Method("COVR with Q-values instead of returns", _covr_with("score", "q")),
    "m8": Method("COVR without return weights (RALW)", _covr_with("weights", "equal")),
    "m9": Method("COVR with random weights instead of RALW", _covr_with("weights", "random")),
    "m10": Method("no VLM: half of each batch from the top 80 % of returns", _best_returns(0.8)),
    "m11": Method("no VLM: half of each batch from the top 50 % of returns", _best_returns(0.5)),
}
"""By the name that `--method` takes."""


@cache
def roles_of(method: str) -> tuple[str, str]:
    """covr.vlm and covr.decides of a method, which say what there is in its runs."""
    from .config import TrainConfig

    config = TrainConfig()
    METHODS[method].change(config)
    return config.covr.vlm, config.covr.decides
