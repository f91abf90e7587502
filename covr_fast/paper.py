"""The published figures of COVR (Xia et al. 2026): episode returns by task and method.

Returns are means and deviations of three seeds with ten evaluation episodes each, after `PaperTask.steps`
environment steps. Whether a deviation is over seeds or over episodes is not said.
"""

from dataclasses import dataclass

VLM = "Qwen2.5-VL-3B"
"""The VLM behind the figures."""
SEEDS = 3
EPISODES = 10


@dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables."""

    name: str
    """The method, in the paper's words."""
    mean: float
    std: float | None
    """None: the paper gives none."""
    kind: str | None = None
    """agent.kind of the method's agent. None: it has none, or what we know of the paper does not name it."""
    method: str | None = None
    """The method's name here. None: covr_fast does not have this method."""


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper."""

    name: str
    preset: str
    env_id: str
    steps: int
    """Environment steps of a run."""
    rows: tuple[Row, ...]
    vlm_by_round: tuple[tuple[int, float], ...] = ()
    """The VLM driving alone: (fine-tuning rounds, return)."""

    def row(self, kind: str | None, method: str | None) -> Row | None:
        """The row of an agent and a method, if the paper has one. A row that names no agent fits any."""
        for wanted in (kind, None):
            for row in self.rows:
                if row.method is not None and (row.kind, row.method) == (wanted, method):
                    return row
        return None


_CONTROL = (
    ("Cartpole Swingup", "cartpole-swingup", "CartpoleSwingup-v1"),
    ("Reacher Easy", "reacher-easy", "ReacherEasy-v1"),
    ("Cheetah Run", "cheetah-run", "CheetahRun-v1"),
    ("Walker Walk", "walker-walk", "WalkerWalk-v1"),
    ("Finger Spin", "finger-spin", "FingerSpin-v1"),
    ("Ball in Cup Catch", "ball-in-cup-catch", "BallInCupCatch-v1"),
)

_CONTROL_ROWS: tuple[tuple[str, str | None, str | None, tuple[tuple[int, int], ...]], ...] = (
    ("SAC", "sac", "off", ((237, 49), (239, 183), (118, 13), (95, 19), (230, 194), (85, 130))),
    ("SAC + COVR", "sac", "covr", ((740, 108), (246, 345), (156, 29), (194, 57), (247, 51), (185, 331))),
    ("DeepMDP", "deepmdp", "off", ((389, 44), (471, 173), (306, 25), (384, 197), (509, 72), (704, 24))),
    (
        "DeepMDP + COVR", "deepmdp", "covr",
        ((793, 26), (461, 443), (352, 35), (397, 71), (653, 18), (757, 169)),
    ),
    ("RAD", "rad", "off", ((694, 28), (734, 87), (364, 38), (552, 87), (813, 65), (825, 49))),
    ("RAD + COVR", "rad", "covr", ((872, 2), (969, 18), (504, 13), (802, 25), (976, 9), (960, 23))),
    ("ResAct", None, None, ((819, 44), (917, 59), (503, 42), (772, 65), (974, 42), (948, 44))),
    ("DrQ", "drq", "off", ((759, 92), (601, 213), (344, 67), (612, 164), (901, 104), (913, 53))),
    ("CURL", None, None, ((582, 146), (538, 233), (299, 48), (403, 24), (767, 56), (769, 43))),
    ("VLM alone (VBE)", None, "vbe", ((178, 31), (94, 138), (3, 2), (26, 11), (0, 0), (49, 213))),
    (
        "Frozen VLM, prior loss (DPL)", None, "dpl",
        ((776, 5), (224, 387), (255, 16), (209, 64), (815, 8), (751, 148)),
    ),
    (
        "Frozen VLM, annealed prior loss (APL)", None, "apl",
        ((820, 3), (292, 436), (367, 30), (696, 48), (839, 9), (905, 95)),
    ),
    (
        "VLM as policy, fine-tuned (VPF)", None, "vpf",
        ((749, 21), (162, 137), (127, 2), (132, 4), (0, 0), (0, 0)),
    ),
)  # fmt: skip
"""Name, agent.kind, method, and (mean, standard deviation) in the order of _CONTROL."""


def _control(column: int) -> PaperTask:
    name, preset, env_id = _CONTROL[column]
    rows = (Row(row, *figures[column], kind, method) for row, kind, method, figures in _CONTROL_ROWS)
    return PaperTask(name, preset, env_id, 100_000, tuple(rows))


def _hard(name: str, preset: str, env_id: str, mean: int, std: int) -> PaperTask:
    return PaperTask(name, preset, env_id, 500_000, (Row("COVR", mean, std, method="covr"),))


_HIGHWAY = PaperTask(
    "CARLA #HW",
    "carla-highway",
    "carla-highway",
    100_000,
    (
        Row("SAC", 69, None, "sac", "off"),
        Row("DrQ", 115, None, "drq", "off"),
        Row("ResAct", 227, None),
        Row("DGC", 208, None),
        Row("Frozen VLM, prior loss (DPL)", 113, None, method="dpl"),
        Row("Frozen VLM, annealed prior loss (APL)", 146, None, method="apl"),
        Row("VLM as policy, fine-tuned (VPF)", 91, None, method="vpf"),
        Row("VLM alone (VBE)", -11, None, method="vbe"),
        Row("COVR", 248, 81, method="covr"),
        Row("Ablation: random filter instead of EDDF", 144, None, method="m1"),
        Row("Ablation: top 80 % instead of EDDF", 204, None, method="m2"),
        Row("Ablation: top 90 % instead of EDDF", 217, None, method="m3"),
        Row("Ablation: top 95 % instead of EDDF", 192, None, method="m4"),
        Row("Ablation: no z-score", 210, None, method="m5"),
        Row("Ablation: reward instead of return", 221, None, method="m6"),
        Row("Ablation: Q-value instead of return", 200, None, method="m7"),
        Row("Ablation: no RALW", 204, None, method="m8"),
        Row("Ablation: random weights", 184, None, method="m9"),
        Row("Ablation: no VLM, RL on the top 80 % and random samples", 183, None, method="m10"),
        Row("Ablation: no VLM, RL on the top 50 % and random samples", 175, None, method="m11"),
    ),
    vlm_by_round=((0, -13), (5, 97)),
)

_PEDESTRIANS = PaperTask(
    "CARLA #GP",
    "carla-pedestrians",
    "carla-pedestrians",
    100_000,
    (
        Row("SAC", 38, None, "sac", "off"),
        Row("DrQ", 110, None, "drq", "off"),
        Row("ResAct", 212, None),
        Row("DGC", 146, None),
        Row("COVR", 235, 89, method="covr"),
    ),
)

TASKS: dict[str, PaperTask] = {
    task.env_id: task
    for task in (
        *map(_control, range(len(_CONTROL))),
        _hard("Hopper Hop", "hopper-hop", "HopperHop-v1", 188, 9),
        _hard("Walker Run", "walker-run", "WalkerRun-v1", 485, 25),
        _hard("Pendulum Swingup", "pendulum-swingup", "PendulumSwingup-v1", 792, 82),
        _HIGHWAY,
        _PEDESTRIANS,
    )
}
"""By env.id."""
