"""Returns as text: large ones as ever, small ones never as 0."""

from types import SimpleNamespace

import numpy as np
import pytest

from covr_fast import TrainConfig, evaluate
from covr_fast.digits import evaluation_text, returns_text, spread_text


@pytest.mark.parametrize(
    "mean, std, said",
    [
        (344.21, 101.26, "344.2 ± 101.3"),
        (-18.42, 0.0, "-18.4 ± 0.0"),
        (1.0, 0.04, "1.0 ± 0.0"),  # the deviation has the decimals of the mean
        (0.0, 3.25, "0.0 ± 3.2"),
        (0.0123, 0.0046, "0.012 ± 0.005"),
        (0.002, 0.3, "0.00 ± 0.30"),
        (-0.00031, 0.0, "-0.00031 ± 0.00000"),
        (0.0, 0.0, "0.0 ± 0.0"),
        (2e-9, 1e-9, "2.0e-09 ± 1.0e-09"),
        (float("nan"), float("nan"), "nan ± nan"),
    ],
)
def test_a_spread_has_the_decimals_of_the_larger(mean, std, said):
    assert spread_text(mean, std, 3) == said


def test_one_return_has_no_spread():
    assert evaluation_text(0.25, 0.0, 1) == "0.25 over 1 episode"
    assert evaluation_text(344.21, 101.26, 10, decimals=0) == "344 ± 101 over 10 episodes"


def test_several_returns_have_the_decimals_of_the_largest():
    assert returns_text(344.2, 0.2, decimals=0) == "344 0"
    assert returns_text(0.031, 0.002, decimals=0) == "0.031 0.002"
    assert returns_text() == ""


def test_a_run_says_small_returns_of_its_evaluations(monkeypatch, tmp_path):
    said = []
    log = SimpleNamespace(say=said.append, scalars=lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: evaluate.Evaluation(np.array([0.02, 0.04])))
    evaluations = evaluate.Evaluations(TrainConfig.preset("racetrack"), tmp_path, 1, None, None)
    evaluations.measure_before(0, log)
    assert said == ["random: 0.030 ± 0.010 over 2 episodes"]
