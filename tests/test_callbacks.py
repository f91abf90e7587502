"""Callbacks of a program's own: when they are called, and with what."""

import numpy as np
import pytest
from small_runs import small_config

from covr_fast import Trainer
from covr_fast.callbacks import Callback


class Witness(Callback):
    """Writes down its calls."""

    def __init__(self) -> None:
        self.steps, self.rounds, self.evaluations = [], [], []

    def on_step(self, trainer, rows) -> None:
        self.steps.append((trainer.step, len(rows.reward)))

    def on_round(self, trainer, record) -> None:
        assert trainer.prior.version == record["version"], "the prior has other weights"
        self.rounds.append(dict(record))

    def on_evaluation(self, trainer, policy, result) -> None:
        self.evaluations.append((trainer.step, policy, result.returns.tolist()))


def test_they_see_every_step_round_and_evaluation(tmp_path):
    witness, other = Witness(), Witness()
    config = small_config(eval__every=80, eval__rounds=True, eval__vlm=True)
    trainer = Trainer(config, tmp_path, callbacks=[witness, other])
    summary = trainer.run()
    assert witness.steps == [(step, 2) for step in range(2, 162, 2)]
    assert witness.rounds == summary["rounds"]
    assert len(witness.rounds) >= 2
    order = [policy for _, policy, _ in witness.evaluations]
    assert order[:2] == ["random", "vlm_before"]
    assert order[-2:] == ["actor", "vlm_after"]
    assert order.count("vlm") == len(summary["rounds"])
    actors = [step for step, policy, _ in witness.evaluations if policy == "actor"]
    assert actors == [80, 160], "once after the last step, where eval.every is due as well"
    for step, policy, returns in witness.evaluations:
        if step in (0, 160) and policy in summary["evaluations"]:
            assert returns == summary["evaluations"][policy]["returns"]
    assert np.mean(witness.evaluations[-2][2]) == summary["evaluations"]["actor"]["mean"]
    assert (other.steps, other.evaluations) == (witness.steps, witness.evaluations)


class Failing(Callback):
    def on_round(self, trainer, record) -> None:
        raise RuntimeError("the disk of my own is full")


def test_an_error_of_one_ends_the_run_which_can_go_on(tmp_path, capsys):
    trainer = Trainer(small_config(), tmp_path, callbacks=[Failing()])
    with pytest.raises(RuntimeError, match="disk of my own"):
        trainer.run()
    assert "and saved: --resume" in capsys.readouterr().out
    assert Trainer(small_config(), tmp_path, resume=True).run()["steps"] == 160


def test_one_that_overrides_nothing_is_called_and_changes_nothing(tmp_path):
    with_one = Trainer(small_config(), tmp_path / "a", callbacks=[Callback()]).run()
    without = Trainer(small_config(), tmp_path / "b").run()
    assert with_one["evaluations"] == without["evaluations"]
