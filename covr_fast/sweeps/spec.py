"""What a sweep is to run: a TOML file, or one of those that come with covr_fast, by name."""

import os
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..config import TrainConfig, check_types, located
from ..errors import UserError, unknown
from ..files import full_names
from ..methods import METHODS
from ..presets import PRESETS

SHIPPED = Path(__file__).parent / "specs"
"""Folder of the specs that come with covr_fast."""

_TOP = {"summary", "presets", "seeds", "model", "settings", "groups", "agents", "methods"}
_GROUP = {"agent", "method", "settings", "by_preset"}
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
"""What fields take, as TOML has it."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep."""

    preset: str
    group: str
    seed: int
    config: TrainConfig
    asked: dict[str, Any]
    """The settings by full names that the spec sets, agent, model and method among them."""

    @property
    def place(self) -> Path:
        """Its folder, in the sweep's."""
        return Path(self.preset) / self.group / f"seed-{self.seed}"


@dataclass(frozen=True)
class Spec:
    """A sweep, read and checked."""

    name: str
    summary: str
    runs: list[PlannedRun]

    @property
    def groups(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(run.group for run in self.runs))


def shipped_specs() -> dict[str, str]:
    """Name and summary of each spec that comes with covr_fast."""
    return {path.stem: str(_read(path)["summary"]) for path in sorted(SHIPPED.glob("*.toml"))}


def read_spec(
    given: str,
    *,
    seeds: int | None = None,
    presets: Sequence[str] = (),
    only: Sequence[str] = (),
    model: str | None = None,
    steps: int | None = None,
) -> Spec:
    """Reads a spec.

    Args:
        given: a file, or the name of one that comes with covr_fast.
        seeds: as many seeds, from 0 on, instead of those of the spec.
        presets: instead of those of the spec.
        only: names of groups, without the others.
        model: the VLM of every run; it also decides what pictures those without a VLM get.
        steps: of every run.

    Raises:
        UserError: there is no such spec; a name in it is unknown (the message suggests similar ones); two
            runs have one name; settings do not fit together.
    """
    path = _find(given)
    content = _read(path)
    _check_names(path, "entry", content, _TOP)
    own = _texts(path, content, "presets") if "presets" in content or not presets else []
    groups = _groups(path, content, {*own, *presets})
    _check_names(path, "group", only, groups)
    chosen = _seeds(path, content.get("seeds", 1) if seeds is None else seeds)
    common = _settings(path, content.get("settings", {}))
    last = {} if steps is None else {"steps": steps}
    model = model or content.get("model")
    if not isinstance(model, str | None):
        raise UserError(f"{path}: model={model!r} must be the name of a VLM, or its folder")
    runs = [
        _planned(path, preset, name, {"model": model} | group, seed, common, last)
        for preset in presets or own
        for name, group in groups.items()
        if name in only or not only
        for seed in chosen
    ]
    # On a file system that ignores case, folders that differ by it are one.
    names = Counter(str(run.place).lower() for run in runs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"{path}: two runs have the name {twice[0]}: rename a group, or remove one of them")
    return Spec(path.stem, str(content.get("summary", path.stem)), runs)


def _find(given: str) -> Path:
    path = Path(given)
    if path.is_file():
        return path
    if not path.suffix and os.sep not in given:
        if (shipped := SHIPPED / f"{given}.toml").is_file():
            return shipped
        raise unknown("sweep", given, shipped_specs())
    raise UserError(f"{path} does not exist: give a TOML file, or a name that `covr-fast sweep` lists")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _check_names(path: Path, kind: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{path}: {unknown(kind, name, known)}")


def _texts(path: Path, content: Mapping[str, Any], name: str) -> list[str]:
    values = content.get(name)
    if not (isinstance(values, list) and values and all(isinstance(value, str) for value in values)):
        raise UserError(f"{path}: {name}={values!r} must be a list of names")
    return values


def _seeds(path: Path, given: Any) -> list[int]:
    seeds = list(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given
    whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds)
    if not whole or not seeds or min(seeds) < 0:
        raise UserError(f"{path}: seeds={given!r} must be their number, at least 1, or a list of them")
    return list(seeds)


def _groups(path: Path, content: Mapping[str, Any], presets: Collection[str]) -> dict[str, dict[str, Any]]:
    """Those of the spec, or a grid of its agents and methods. Also those that will not run are checked."""
    grid = {"agents", "methods"} & content.keys()
    if ("groups" in content) == bool(grid):
        raise UserError(f"{path}: give either groups, or agents and methods")
    if grid:
        agents = _texts(path, content, "agents") if "agents" in content else [None]
        methods = _texts(path, content, "methods") if "methods" in content else ["covr"]
        for name, values in ("agents", agents), ("methods", methods):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise UserError(f"{path}: {name} has {twice[0]!r} twice: name it once")
        return {
            "-".join(filter(None, (agent, method))): {"method": method} | ({"agent": agent} if agent else {})
            for agent in agents
            for method in methods
        }
    groups = content["groups"]
    if not (isinstance(groups, dict) and groups and all(isinstance(g, dict) for g in groups.values())):
        raise UserError(f"{path}: groups must be tables, such as [groups.rad]")
    for name, group in groups.items():
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"{path}: the group {name!r} cannot name a folder: leave out its slashes")
        _check_names(path, f"entry of the group {name}:", group, _GROUP)
        for entry in ("agent", "method"):
            if not isinstance(group.get(entry, ""), str):
                raise UserError(f"{path}: {entry}={group[entry]!r} of the group {name} must be a name")
        by_preset = group.get("by_preset", {})
        if not isinstance(by_preset, dict):
            raise UserError(f"{path}: by_preset of the group {name} must have a table for each preset")
        _check_names(path, f"preset of the group {name}:", by_preset, PRESETS)
        for settings in (group.get("settings", {}), *by_preset.values()):
            _settings(path, settings)
        if unused := by_preset.keys() - presets:
            raise UserError(
                f"{path}: by_preset of the group {name} is about {min(unused)}, which is not among the "
                f"presets ({', '.join(sorted(presets))}): add it there, or remove it here"
            )
    return groups


def _settings(path: Path, given: Any) -> dict[str, Any]:
    """Settings by full names, of which TOML makes nested tables."""
    if not isinstance(given, dict):
        raise UserError(f"{path}: settings={given!r} must be a table")
    flat = full_names(given)
    _check_names(path, "setting", flat, _setting_names())
    reserved = {"seed": "seeds", "agent.kind": "agent", "vlm.model": "model", "method": "method"}
    for name in flat.keys() & reserved.keys():
        raise UserError(f"{path}: {name} does not belong into settings: give {reserved[name]} instead")
    return flat


def _setting_names() -> set[str]:
    return set(full_names(TrainConfig().to_dict())) - {"begun_as"}


def _planned(
    path: Path,
    preset: str,
    name: str,
    group: Mapping[str, Any],
    seed: int,
    common: Mapping[str, Any],
    last: Mapping[str, Any],
) -> PlannedRun:
    own = _settings(path, group.get("by_preset", {}).get(preset, {}))
    settings = {**_settings(path, group.get("settings", {})), **own, **last}
    who = {"agent.kind": group.get("agent"), "vlm.model": group.get("model"), "method": group.get("method")}
    try:
        config = TrainConfig.preset(preset, who["vlm.model"], who["agent.kind"], who["method"] or "covr")
        for setting, value in common.items():
            _set(config, setting, value)
        METHODS[config.method].change(config)  # which a setting of all groups must not undo
        for setting, value in settings.items():
            _set(config, setting, value)
        config.seed, config.vlm.model = seed, located(config.vlm.model)
        config.check()
    except ValueError as error:  # of a frozen section, or a UserError
        raise UserError(f"{path}: {preset}, group {name}: {error}") from error
    final = full_names(config.to_dict())
    asked = {key: value for key, value in who.items() if value is not None}
    return PlannedRun(preset, name, seed, config, asked | {key: final[key] for key in {**common, **settings}})


def _set(config: TrainConfig, name: str, value: Any) -> None:
    section, _, leaf = name.rpartition(".")
    value = tuple(value) if isinstance(value, list) else value
    _check_type(getattr(config, section) if section else config, name, value)
    if section == "tuner":  # it is frozen
        config.tuner = replace(config.tuner, **{leaf: value})
    else:
        setattr(getattr(config, section) if section else config, leaf, value)


def _check_type(section: Any, name: str, value: Any) -> None:
    """Raises a UserError if a setting cannot have a value of this type."""
    tried, leaf = copy(section), name.rpartition(".")[2]
    object.__setattr__(tried, leaf, value)  # also of a frozen section
    try:
        check_types(tried)
    except UserError:
        expected = _words(get_type_hints(type(section))[leaf])
        shown = list(value) if isinstance(value, tuple) else value
        raise UserError(f"{name}={shown!r} must be {expected}") from None


def _words(hint: Any) -> str:
    """What a field takes in a TOML file, which has no tuples and no None."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " or ".join(_words(each) for each in inner if each is not NoneType)
    if origin is tuple:
        return "a list of whole numbers" if inner[0] is int else "a list of texts"
    return _WORDS[hint]
