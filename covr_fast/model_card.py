"""What a run adds to the model card of its VLM: the task, the rounds of fine-tuning and the returns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .digits import mean_and_std
from .report import EVALUATIONS, ROUND_COLUMNS


def write_run_card(folder: Path, state: Mapping[str, Any], returns: Mapping[str, Sequence[float]]) -> None:
    """Writes README.md for a run's VLM.

    Args:
        folder: the saved prior.
        state: of the run, as in counters.pt.
        returns: by name in `report.EVALUATIONS`, the returns of the episodes that were evaluated.
    """
    from .vlm.model.card import write_card  # loads transformers, which a run without a VLM does without

    if not state:
        write_card(folder, *_returns(returns))
        return
    training, env = _training(state["settings"], state["step"], state["rounds"]), state["settings"]["env"]
    write_card(folder, training, *_returns(returns), frame=(env["height"], env["width"]))


def _training(settings: Mapping[str, Any], step: int, rounds: list[dict[str, float]]) -> str:
    env, tuner, vlm = settings["env"], settings["tuner"], settings["vlm"]
    tuned = [round for round in rounds if "version" in round]
    kept = sum(round["kept"] for round in tuned)
    untuned = f", {len(rounds) - len(tuned)} more found nothing to learn from" if tuned != rounds else ""
    lines = [
        f"- Environment: `{env['id']}`, frames of {env['height']}x{env['width']}, one action per "
        f"{env['action_repeat']} simulator frames, {step} environment steps",
        f"- Tuned: {'LoRA' if tuner['mode'] == 'lora' else 'all weights'}, peak learning rate "
        f"{tuner['learning_rate']:g}, seed {settings['seed']}",
        f"- Rounds: {len(tuned)}, on {kept:.0f} samples of the agent's own that the filter kept{untuned}",
    ]
    if vlm["motion"]:
        lines.append("- Frames: the newest three in grey, as red, green and blue")
    text = "## Training\n\n" + "\n".join(lines)
    if not rounds:
        return text
    names = [name for name, (key, _) in ROUND_COLUMNS.items() if any(key in round for round in rounds)]
    table = [_row(names), _row(["---:"] * len(names))]
    for round in rounds:
        cells = (ROUND_COLUMNS[name] for name in names)
        table.append(_row([form.format(round[key]) if key in round else "-" for key, form in cells]))
    explained = (
        "D_f are the samples of episodes that finished since the round before; losses are of held-out "
        "samples, in nats per token."
    )
    return "\n\n".join([text, "\n".join(table), explained])


def _returns(returns: Mapping[str, Sequence[float]]) -> list[str]:
    measured = {label: returns[name] for name, label in EVALUATIONS.items() if name in returns}
    if not measured:
        return []
    table = [_row(["policy", "mean", "std", "episodes"]), _row(["---", "---:", "---:", "---:"])]
    for label, each in measured.items():
        table.append(_row([label, *mean_and_std(float(np.mean(each)), float(np.std(each))), str(len(each))]))
    return ["## Returns of episodes\n\n" + "\n".join(table)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
