"""The published figures, against the paper's tables as text."""

import pytest

from covr_fast.paper import TASKS
from covr_fast.presets import PRESETS

CONTROL = """\
| method | CartpoleSwingup | ReacherEasy | CheetahRun | WalkerWalk | FingerSpin | BallInCupCatch |
| SAC | 237+-49 | 239+-183 | 118+-13 | 95+-19 | 230+-194 | 85+-130 |
| SAC + COVR | 740+-108 | 246+-345 | 156+-29 | 194+-57 | 247+-51 | 185+-331 |
| DeepMDP | 389+-44 | 471+-173 | 306+-25 | 384+-197 | 509+-72 | 704+-24 |
| DeepMDP + COVR | 793+-26 | 461+-443 | 352+-35 | 397+-71 | 653+-18 | 757+-169 |
| RAD | 694+-28 | 734+-87 | 364+-38 | 552+-87 | 813+-65 | 825+-49 |
| RAD + COVR | 872+-2 | 969+-18 | 504+-13 | 802+-25 | 976+-9 | 960+-23 |
| ResAct | 819+-44 | 917+-59 | 503+-42 | 772+-65 | 974+-42 | 948+-44 |
| DrQ | 759+-92 | 601+-213 | 344+-67 | 612+-164 | 901+-104 | 913+-53 |
| CURL | 582+-146 | 538+-233 | 299+-48 | 403+-24 | 767+-56 | 769+-43 |
| VLM alone (VBE) | 178+-31 | 94+-138 | 3+-2 | 26+-11 | 0+-0 | 49+-213 |
| Frozen VLM, prior loss (DPL) | 776+-5 | 224+-387 | 255+-16 | 209+-64 | 815+-8 | 751+-148 |
| Frozen VLM, annealed prior loss (APL) | 820+-3 | 292+-436 | 367+-30 | 696+-48 | 839+-9 | 905+-95 |
| VLM as policy, fine-tuned (VPF) | 749+-21 | 162+-137 | 127+-2 | 132+-4 | 0+-0 | 0+-0 |
"""
HARD = {"HopperHop-v1": (188, 9), "WalkerRun-v1": (485, 25), "PendulumSwingup-v1": (792, 82)}
HIGHWAY = {
    "SAC": 69, "DrQ": 115, "ResAct": 227, "DGC": 208, "dpl": 113, "apl": 146, "vpf": 91, "vbe": -11,
    "covr": 248, "m1": 144, "m2": 204, "m3": 217, "m4": 192, "m5": 210, "m6": 221, "m7": 200, "m8": 204,
    "m9": 184, "m10": 183, "m11": 175,
}  # fmt: skip
PEDESTRIANS = {"SAC": 38, "DrQ": 110, "ResAct": 212, "DGC": 146, "covr": 235}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_dmcontrol():
    (_, *envs), *rows = map(cells, CONTROL.strip().splitlines())
    for column, env in enumerate(envs, 1):
        written = [(row.name, row.mean, row.std) for row in TASKS[f"{env}-v1"].rows]
        assert written == [(row[0], *map(int, row[column].split("+-"))) for row in rows]


def test_the_hard_tasks():
    for env, figures in HARD.items():
        (row,) = TASKS[env].rows
        assert (row.mean, row.std) == figures
        assert TASKS[env].steps == 500_000


@pytest.mark.parametrize("env, figures", [("carla-highway", HIGHWAY), ("carla-pedestrians", PEDESTRIANS)])
def test_carla(env, figures):
    named = {row.name if row.method in (None, "off") else row.method: row for row in TASKS[env].rows}
    assert {name: row.mean for name, row in named.items()} == figures
    deviations = {row.method: row.std for row in named.values() if row.std is not None}
    assert deviations == {"covr": {"carla-highway": 81, "carla-pedestrians": 89}[env]}


def test_the_vlm_alone_on_the_highway():
    assert dict(TASKS["carla-highway"].vlm_by_round) == {0: -13, 5: 97}
    assert not any(task.vlm_by_round for env, task in TASKS.items() if env != "carla-highway")


def test_every_task_is_a_preset_with_the_papers_steps():
    for env, task in TASKS.items():
        config = PRESETS[task.preset].make(True, "rad")
        assert (config.env.id, config.steps) == (env, task.steps)


@pytest.mark.parametrize(
    "env, kind, method, name",
    [
        ("CartpoleSwingup-v1", "rad", "covr", "RAD + COVR"),
        ("CartpoleSwingup-v1", "sac", "off", "SAC"),
        ("CartpoleSwingup-v1", "fast", "covr", None),
        ("CartpoleSwingup-v1", "drqv2", "off", None),
        ("CartpoleSwingup-v1", "rad", "dpl", "Frozen VLM, prior loss (DPL)"),
        ("CartpoleSwingup-v1", "fast", "vbe", "VLM alone (VBE)"),
        ("CartpoleSwingup-v1", "rad", "m1", None),
        ("carla-highway", "rad", "covr", "COVR"),
        ("carla-highway", "rad", "off", None),
        ("carla-highway", "rad", "m9", "Ablation: random weights"),
        ("HopperHop-v1", "rad", "covr", "COVR"),
        ("HopperHop-v1", None, None, None),
    ],
)
def test_a_group_finds_its_row(env, kind, method, name):
    row = TASKS[env].row(kind, method)
    assert (row and row.name) == name
