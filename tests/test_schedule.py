import pytest

from covr_fast.errors import UserError
from covr_fast.schedule import FineTuneSchedule


@pytest.mark.parametrize(
    "rule, expected",
    [("linear", [5_000, 15_000, 30_000, 50_000, 75_000]), ("recurrence", [5_000, 15_000, 45_000, 165_000])],
)
def test_rounds(rule, expected):
    schedule = FineTuneSchedule(rule=rule)
    fired = []
    for step in range(0, 170_000, 1000):
        if schedule.due(step):
            fired.append(step)
            schedule.advance()
    assert fired[: len(expected)] == expected


def test_never_at_step_zero():
    assert not FineTuneSchedule(psi_0=1).due(0)
    assert FineTuneSchedule(psi_0=1).due(1)


def test_a_late_round_does_not_shift_the_next():
    schedule = FineTuneSchedule(psi_0=100)
    assert schedule.due(150)
    schedule.advance()
    assert schedule.next_round == 300


def test_resuming_after_some_rounds():
    assert FineTuneSchedule(rounds=2).next_round == 30_000
    assert FineTuneSchedule(rule="recurrence", rounds=2).next_round == 45_000


def test_bad_psi():
    with pytest.raises(UserError, match="psi_0=0"):
        FineTuneSchedule(psi_0=0)
