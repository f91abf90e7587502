"""When a run is saved, and what the console says about it. A signal ends a run only where nothing is lost."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .agents import Agent
from .buffer import ReplayBuffer
from .checkpoint import RESCUED, has_checkpoint, rescue_agent, save_checkpoint
from .config import TrainConfig
from .errors import DivergedError, UserError, os_error_text
from .logger import RunLogger
from .schedule import is_due
from .versions import LARGEST_FULL, are_kept, last_published, stage

if TYPE_CHECKING:
    from .vlm import ActionPrior

CHECKPOINT_SHARE = 0.02
"""Most of a run's time that regular checkpoints take."""


@dataclass
class Counters:
    """How far a run is."""

    step: int = 0
    """Environment steps, summed over environments: decisions times env.action_repeat."""
    decisions: int = 0
    """Decisions, summed over environments."""
    frames: int = 0
    """Simulator frames: fewer than environment steps where episodes ended within a decision."""
    updates: int = 0
    """Policy updates."""
    returns: list[float] = field(default_factory=list)
    """Sum of rewards of each finished training episode, in the order in which they ended."""


@dataclass
class RunSaver:
    """Writes the checkpoints of a run: regular ones, and the one at its end, however it ends."""

    config: TrainConfig
    """Of the run; says when regular checkpoints are due."""
    folder: Path
    """The run folder."""
    agent: Agent | None
    """None: the VLM decides."""
    prior: "ActionPrior | None"
    """None: there is no VLM, or it stays as it comes."""
    buffer: ReplayBuffer
    counters: Counters
    state: Callable[[], dict[str, Any]]
    """Gives what counters.pt is to contain."""
    log: RunLogger

    def __post_init__(self) -> None:
        self._saved_at = time.perf_counter()
        self._saving_took = 0.0
        self._said_unkept = False

    def save_if_due(self, before: int) -> None:
        """A regular checkpoint, if it is due after the steps since `before`. If it cannot be written, the run
        says so and goes on."""
        if not self._due(before):
            return
        try:
            self._save(with_replay=True)
        except OSError as error:
            stays = "the one before it stays" if has_checkpoint(self.folder) else "there is none yet"
            why = os_error_text(error)
            self.log.say(f"no checkpoint at step {self.counters.step} ({why}): {stays}, and training goes on")

    def keep_round(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the VLM's weights, those of the last of these rounds, because the next round is about to
        replace them. If they cannot be written, the run says so and goes on."""
        assert self.prior is not None
        if not are_kept(self.prior) and not self._said_unkept:
            self._said_unkept = True
            self.log.say(
                f"only the newest weights of the VLM are kept: tuner.mode={self.config.tuner.mode!r} makes "
                f"more than {LARGEST_FULL // 10**6} MB in each round"
            )
        if (last := last_published(records)) is None:
            return
        try:
            stage(self.folder, last, self.prior)
        except OSError as error:
            why = os_error_text(error)
            self.log.say(f"the weights of round {last['round']} are not kept ({why}), and training goes on")

    def save_last(self, *, with_replay: bool) -> None:
        """The checkpoint at the end of a run. If the disk has no room for it, the agent alone is saved.

        Raises:
            UserError: the checkpoint could not be written; the message says what was saved.
        """
        try:
            with interrupt_afterwards():
                self._save(with_replay=with_replay)
        except OSError as error:
            what = f"of step {self.counters.step}, nothing could be saved"
            if self.agent is not None:
                with suppress(OSError):
                    rescue_agent(self.folder, self.agent)
                    rescued = self.folder / RESCUED
                    what = f"of step {self.counters.step}, only the agent was saved, as {rescued}"
            stays = f"; --resume {self.folder} goes on from the checkpoint before it"
            raise UserError(
                f"{os_error_text(error)}: {what}{stays if has_checkpoint(self.folder) else ''}"
            ) from error

    @contextmanager
    def saved_on(self, *endings: type[BaseException]) -> Iterator[None]:
        """Saves the run for a later resume if the block ends with one of these exceptions."""
        try:
            yield
        except DivergedError:
            raise  # the former checkpoint is worth more than one of NaN
        except endings as error:
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__
            self.save_for_resume(what)
            if isinstance(error, MemoryError):
                raise UserError(str(error)) from error
            raise

    def save_for_resume(self, why: str) -> None:
        """Saves a run that ends early, replay buffer included, and says how to continue it."""
        self.log.say(f"{why} at step {self.counters.step}: saving")
        self.save_last(with_replay=True)
        self.log.say(f"{why} at step {self.counters.step} and saved: --resume {self.folder} continues")

    def _due(self, before: int) -> bool:
        if is_due(self.config.checkpoint_every, before, self.counters.step):
            return True
        # A large replay buffer on a slow disk is written less often.
        pause = max(60 * self.config.checkpoint_minutes, self._saving_took / CHECKPOINT_SHARE)
        return self.config.checkpoint_minutes > 0 and time.perf_counter() - self._saved_at >= pause

    def _save(self, *, with_replay: bool) -> None:
        """Writes a checkpoint in place of the former one, which stays if an OSError prevents that."""
        learnt = {} if self.agent is None else self.agent.modules()
        if not all(torch.isfinite(p).all() for m in learnt.values() for p in m.parameters()):
            raise DivergedError(f"the agent's weights are NaN at step {self.counters.step}")
        started = time.perf_counter()
        buffer = self.buffer if with_replay else None
        try:
            with self.log.clock("checkpoint"):
                save_checkpoint(self.folder, self.agent, self.prior, self.state(), buffer)
        finally:
            self._saved_at = time.perf_counter()
            self._saving_took = self._saved_at - started


@contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Collects the numbers of received signals in the list that it yields, instead of raising.

    Only a second Ctrl-C raises KeyboardInterrupt at once. SIGINT is always handled, SIGTERM and SIGHUP where
    the program handles them already. A terminal that closes may send several SIGHUPs.
    """
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return
    handled = [n for n in (signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(n))]
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, *handled)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interrupt_afterwards() -> Iterator[None]:
    """Delays an interrupt to the end of the block. It is dropped if the block ends with an error; a second
    Ctrl-C is not delayed."""
    with deferred_interrupts() as received:
        yield
    if received:
        signal.raise_signal(received[0])
