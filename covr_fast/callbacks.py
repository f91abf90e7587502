"""What a program of your own does while a run goes on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .envs import Rows
    from .evaluate import Evaluation
    from .trainer import Trainer


class Callback:
    """Is called at certain points of a run: `Trainer(config, out, callbacks=[...])`. Override what you need.

    The calls come in the thread that calls `Trainer.run`, in the order of the list. The run waits for them,
    and an exception that one raises ends it like an error in the loop: it is saved for a resume.
    """

    def on_step(self, trainer: "Trainer", rows: "Rows") -> None:
        """The end of a turn of the loop: once per decision of a batch of environments.

        Its transitions `rows` (see `envs.Rows`) are in the replay buffer, the next decisions of these
        environments are simulating, and the policy updates, the fine-tuning round, the metrics, the
        evaluation and the checkpoint that were due are done.
        """

    def on_round(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """A round of fine-tuning has ended, and the prior has its weights, if it kept enough to learn from.
        `record` is what summary.json says of it under "rounds"."""

    def on_evaluation(self, trainer: "Trainer", policy: str, result: "Evaluation") -> None:
        """`policy` was evaluated: "actor", "vlm" (the VLM alone during training: after a round, or where it
        decides), "vlm_before" or "vlm_after" (before and after training), or "random"."""
