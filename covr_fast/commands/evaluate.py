"""covr-fast evaluate: episodes of a run's actor, or of its VLM."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import UserError
from .common import check_least, quiet_libraries

if TYPE_CHECKING:
    from ..config import TrainConfig
    from ..evaluate import Policy


def main(arguments: list[str]) -> int:
    import tyro

    @dataclass
    class Arguments:
        run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
        """Folder of a run."""
        episodes: int = 10
        """Episodes to play."""
        seed: int = 2_000_000
        """Seed of the first episode's environment."""
        vlm_alone: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Let the VLM make every decision, instead of the actor."""
        round: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
        """With --vlm-alone, the round after which the VLM plays; 0: before any. None: the last."""
        json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
        """Print JSON instead of lines for people."""

    parsed = tyro.cli(
        Arguments,
        prog="covr-fast evaluate",
        description="Let a run's actor play, alone, or its VLM.",
        args=arguments,
    )
    from ..checkpoint import load_actor
    from ..digits import evaluation_text, returns_text
    from ..evaluate import evaluate

    check_least(parsed, episodes=1, seed=0)
    if parsed.vlm_alone:
        quiet_libraries()
        policy, config, who = _vlm_player(parsed.run, parsed.round)
    elif parsed.round is not None:
        raise UserError(f"--round {parsed.round} is of the VLM: add --vlm-alone")
    else:
        (policy, config), who = load_actor(parsed.run), {"policy": "actor"}
    result = evaluate(policy, config.env, parsed.episodes, seed=parsed.seed)
    if parsed.json:
        returns = result.returns.tolist()
        content = {
            "run": str(parsed.run),
            "environment": config.env.id,
            "preset": config.begun_as,
            "method": config.method,
            **who,
            "episodes": [{"seed": parsed.seed + i, "return": value} for i, value in enumerate(returns)],
            "mean": result.mean,
            "std": result.std,
        }
        print(json.dumps(content, indent=2))
        return 0
    player = ""
    if parsed.vlm_alone:
        after = f"after round {who['round']}" if who["round"] else "before any round"
        player = f", VLM alone {after} (version {who['version']} of its weights)"
    print(f"returns: {returns_text(*result.returns, decimals=0)}")
    said = evaluation_text(result.mean, result.std, parsed.episodes)
    print(f"{config.env.id}{player}: {said}")
    return 0


def _vlm_player(run: Path, number: int | None) -> "tuple[Policy, TrainConfig, dict[str, Any]]":
    """The policy of a run's VLM after a round (None: the last), the run's settings, and who plays."""
    from ..checkpoint import Checkpoint, load_config
    from ..evaluate import vlm_policy
    from ..load_vlm import load_round

    config = load_config(run)
    config.check()
    saved = Checkpoint(run)
    rounds = {weights.number: weights for weights in saved.rounds(config)}
    if number is None:
        number = max(rounds)
    if number not in rounds:
        known = ", ".join(map(str, rounds))
        raise UserError(f"--round {number}: {run} has the weights after the rounds {known} (0: before any)")
    prior = load_round(config, saved, rounds[number])
    who = {"policy": "vlm", "round": number, "version": prior.version}
    return vlm_policy(prior, config), config, who
