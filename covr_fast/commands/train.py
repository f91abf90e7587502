"""covr-fast train: a run, begun or resumed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UserError, as_user_error
from .common import interrupt_when_ended, preset_of, quiet_libraries, spelled_out, value_of

if TYPE_CHECKING:
    from ..config import TrainConfig


def main(arguments: list[str]) -> int:
    import tyro

    from ..checkpoint import load_config
    from ..config import TrainConfig
    from ..costs import cost_of
    from ..methods import METHODS
    from ..presets import PRESETS

    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: covr-fast train PRESET [--out DIR] [--FIELD VALUE ...]\n\npresets:")
        for name, preset in PRESETS.items():
            print(f"  {name:<20}{preset.summary}, with {preset.model}")
            print(f"{'':<22}{cost_of(name)}")
        print("\n--method METHOD, with any preset (--covr off is --method off):")
        for method, each in METHODS.items():
            print(f"  {method:<20}{each.summary}")
        print("\ncovr-fast train PRESET --help lists every field with its default in that preset.")
        return 0 if arguments else 2
    name, rest = arguments[0], spelled_out(arguments[1:])
    suited = preset_of(name, rest)  # first: raises for an unknown name

    @dataclass
    class Arguments:
        config: Annotated[TrainConfig, tyro.conf.arg(name="")]
        out: Path | None = None
        """Run folder, which must not contain a run. None: runs/PRESET-seedN or, with a method other than
        covr, runs/PRESET-METHOD-seedN, with a number if that exists."""
        resume: Path | None = None
        """Folder of an interrupted run to continue. Settings that are not given here stay as they were."""

    default = suited
    if resumed := value_of("--resume", rest):
        default = load_config(Path(resumed))
        _check_preset(name, default, resumed)
    with as_user_error():
        parsed = tyro.cli(
            Arguments,
            prog=f"covr-fast train {name}",
            description=PRESETS[name].summary,
            default=Arguments(default),
            args=rest,
        )
    config = parsed.config
    if (asked := config.begun_as) != default.begun_as:
        raise UserError(f"--begun-as is for the record: covr-fast train {asked} takes another preset")
    if config.agent.kind != default.agent.kind:  # in a new run both have the kind that was asked for
        raise UserError(
            f"the run was begun with agent.kind={default.agent.kind}: it cannot go on with "
            f"{config.agent.kind}"
        )
    if parsed.resume and parsed.out:
        raise UserError("--resume continues in its own folder: leave out --out")
    config.check()

    from ..logger import display
    from ..report import print_summary
    from ..run_folder import RunFolder
    from ..trainer import Trainer

    if config.has_vlm:
        quiet_libraries()
    interrupt_when_ended()
    console = display()
    given = parsed.resume or parsed.out
    named = name if config.method == "covr" else f"{name}-{config.method}"
    folder = RunFolder(given) if given else RunFolder.numbered(Path("runs") / f"{named}-seed{config.seed}")
    with folder.claimed(resume=parsed.resume is not None):
        trainer = Trainer(config, folder, resume=parsed.resume is not None)
        begun = f", from step {trainer.step}" if parsed.resume else ""
        who = f"with {config.vlm.model}" if config.has_vlm else "without a VLM"
        console.print(
            f"{PRESETS[name].summary}, {who}; seed {config.seed}, on {trainer.device}, "
            f"into {folder.path}{begun}"
        )
        if config.method != "covr":
            console.print(METHODS[config.method].summary)
        if not resumed and (changed := _differences(TrainConfig.preset(name), suited)):
            console.print(f"for what was asked for the preset sets {', '.join(changed)}")
        summary = trainer.run()
    print_summary(summary, console)
    names = sorted(path.name for path in folder.path.iterdir() if not path.name.startswith("."))
    console.print(f"{folder.path} holds {', '.join(names)}")
    return 0


def _check_preset(name: str, config: "TrainConfig", run: str) -> None:
    """Raises a UserError if the run began as another preset or, where that was not recorded, in another
    environment than the preset's."""
    from ..config import TrainConfig

    begun = config.begun_as
    if begun and begun != name:
        raise UserError(
            f"the run was begun as {begun}, not {name}: covr-fast train {begun} --resume {run} continues it"
        )
    of_preset = TrainConfig.preset(name).env.id  # none in the preset for one's own environment
    if not begun and of_preset and config.env.id != of_preset:
        raise UserError(f"the run was begun with env.id={config.env.id}, and preset {name} is of {of_preset}")


def _differences(before: "TrainConfig", after: "TrainConfig") -> list[str]:
    """The settings in which `after` differs, except those that were asked for, as `name=value`."""
    from ..files import full_names

    old, new = full_names(before.to_dict()), full_names(after.to_dict())
    asked = {"vlm.model", "agent.kind", "method", "begun_as"}
    changed = (name for name in new if name not in asked and new[name] != old[name])
    return [f"{name}={new[name]}" for name in changed]
