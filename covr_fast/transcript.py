"""What the VLM is told and what it says, as text in the run folder."""

import json
from pathlib import Path

from torch import Tensor

from .buffer import ReplayBuffer
from .config import TrainConfig
from .files import drop_lines_after, read_records, write_whole, writing
from .rounds import vlm_images
from .vlm import ActionPrior, PriorBatch

MOST_LINES = 4
"""Most answers that are written for one version of the weights."""


def write_prompt(folder: Path, prior: ActionPrior, size: tuple[int, int]) -> None:
    """Writes prompt.txt: the conversation as the model gets it, and what its image token stands for.

    Args:
        size: height and width of the frames that it gets.
    """
    layout = prior.layout(size)
    note = (
        f"{prior.backbone.processor.image_token} stands for a frame of {size[0]}x{size[1]} pixels, as "
        f"{len(layout.image_at)} tokens. The conversation is {layout.prompt_length} tokens, of which all "
        f"frames share the first {len(layout.prefix)}. The answer follows."
    )
    write_whole(folder / "prompt.txt", f"{prior.text}\n\n---\n{note}\n")


class Transcript:
    """answers.jsonl: what each version of the VLM answers about a few transitions, and the action that the
    agent executed there.

    `update` asks about the transitions that were stored last when the version came, and takes the most
    probable tokens. With vlm.background nothing may wait for the VLM: `note` takes the first answers of a
    version that the labeller got.
    """

    def __init__(self, folder: Path, config: TrainConfig, prior: ActionPrior, buffer: ReplayBuffer) -> None:
        self._path = folder / "answers.jsonl"
        self._config = config
        self._prior = prior
        self._buffer = buffer
        self._written = -1
        """The last version of the weights that is in the file."""

    def resume(self, step: int) -> None:
        """Goes on after what the file says up to `step`, the step of the checkpoint."""
        if self._path.exists():
            drop_lines_after(self._path, step)
            records, _ = read_records(self._path)
            self._written = max((record.get("version", -1) for record in records), default=-1)

    def update(self, step: int, ids: Tensor) -> None:
        """Writes answers about some of the transitions int64[n], if there are any, and if the weights are not
        those of the last answers."""
        if self._prior.version > self._written and len(ids):
            ids = ids[:MOST_LINES]
            self._write(step, ids, self._prior(vlm_images(self._config, self._buffer, ids)))

    def note(self, step: int, ids: Tensor, answers: PriorBatch) -> None:
        """Writes some of the VLM's answers about the transitions int64[n], if they are the first of a
        version."""
        if answers.version > self._written:
            self._write(step, ids, answers)

    def _write(self, step: int, ids: Tensor, answers: PriorBatch) -> None:
        rows = self._buffer.contains(ids).nonzero()[:MOST_LINES, 0]
        executed = self._buffer.actions(ids[rows]).tolist()
        with writing(self._path), self._path.open("a") as file:
            for row, action in zip(rows.tolist(), executed, strict=True):
                rounded = [round(number, 4) for number in action]
                line = {
                    "step": step,
                    "version": answers.version,
                    "text": answers.text[row],
                    "executed": rounded,
                }
                file.write(json.dumps(line) + "\n")
        if len(rows):
            self._written = answers.version
