"""Whether a run fits a device: the memory of VLM, agent and replay buffer, added up before any is loaded."""

import math
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from .agents import make_agent
from .buffer.batch import Batch
from .buffer.options import key_specs
from .buffer.storage import ring_shapes
from .config import TrainConfig
from .errors import UserError
from .labeller import MAX_BATCH
from .live_bytes import LiveBytes
from .load_vlm import task_words
from .schedule import FineTuneSchedule
from .tasks import find_task
from .view import agent_obs_shape
from .vlm.footprint import Footprint, Part, Request, footprint

COMMON_GPUS = (24, 40, 80)
"""GB of GPUs that a machine without one is compared with."""
_CONTEXT = Part("CUDA itself", 10**9, "context, libraries, unused rests of blocks: assumed")
_RANK = 16
"""The `lora_rank` that is offered to save memory."""


class Device(NamedTuple):
    """Memory to fit into."""

    name: str
    nbytes: int


class Remedy(NamedTuple):
    """A setting that takes less memory."""

    flag: str
    saves: int
    """Bytes that it saves, alone."""


@dataclass(frozen=True)
class RunMemory:
    """What a run takes on the device on which it computes."""

    config: TrainConfig
    vlm: Footprint
    groups: dict[str, list[Part]]
    """The parts of each of those who work: the VLM that answers, a round, the agent, and what is besides."""

    @property
    def serving(self) -> int:
        """Bytes of a VLM that answers and is not tuned, without agent and replay buffer."""
        return sum(part.nbytes for part in (*self.vlm.serving, *self.groups["besides"]))

    def total(self, *, overlap: bool) -> int:
        """Bytes of a run whose rounds go on beside the loop, or in turn with it.

        In turn, only one of those who work takes its passing memory; the others have given theirs back.
        """
        passing = [sum(p.nbytes for p in parts if p.passing) for parts in self.groups.values()]
        kept = sum(p.nbytes for parts in self.groups.values() for p in parts if not p.passing)
        return kept + (sum(passing) if overlap else max(passing))

    @property
    def needed(self) -> int:
        """Bytes of the run as it is set."""
        return self.total(overlap=self.config.tuner.overlap)


def run_memory(
    config: TrainConfig, device_type: Literal["cpu", "cuda"], like: RunMemory | None = None
) -> RunMemory:
    """The memory of a run with these settings on a CPU, or on a GPU, which need not be there.

    Args:
        like: of a run on the same kind of device with the same agent, which is not measured again.

    Raises:
        FileNotFoundError, ValueError: as for `footprint`; a UserError for an unknown environment, or a run
            without a VLM.
    """
    if not config.has_vlm:
        raise UserError("covr.vlm='off' loads no VLM, so there is nothing to fit: leave out --covr off")
    action_dim = find_task(config.env).action_dim
    vlm = footprint(_request(config, action_dim, device_type))
    agent: list[Part] = []
    if config.has_agent:
        agent = _agent(config, action_dim, device_type) if like is None else like.groups["the agent"][-2:]
    tuning = vlm.tuning if config.has_rounds else []
    if device_type == "cpu" or config.replay.device != "cpu":
        agent.insert(0, _replay(config))
    else:  # frames are there too
        tuning = [part for part in tuning if part.name != "frames"]
    context = [_CONTEXT] if device_type == "cuda" else []
    groups = {
        "the VLM, to answer": vlm.serving,
        "a round of fine-tuning": tuning,
        "the agent": agent,
        "besides": context,
    }
    return RunMemory(config, vlm, groups)


def _request(config: TrainConfig, action_dim: int, device_type: Literal["cpu", "cuda"]) -> Request:
    vlm = config.vlm
    asked = [MAX_BATCH if vlm.background else config.env.batch_size]
    if config.eval.vlm:
        asked.append(config.eval.episodes)
    return Request(
        model=str(vlm.model),
        action_dim=action_dim,
        size=(config.env.height, config.env.width),
        rows=max(asked),
        samples=_samples(config),
        tuner=config.tuner,
        prompt=task_words(config) if vlm.prompt is None else vlm.prompt,
        decimals=vlm.decimals,
        image_size=vlm.image_size,
        device_type=device_type,
        dtype=None if vlm.dtype == "auto" else getattr(torch, vlm.dtype),
        quantization=vlm.quantization,
        graph=vlm.graph,
        confidence=config.covr.confidence,
    )


def _samples(config: TrainConfig) -> int:
    """The most samples of a round, of the decisions since the round before: the top share, or half, because
    EDDF keeps those above a threshold that is not below the median (Xia et al. 2026, Eq. 5)."""
    schedule = FineTuneSchedule(config.covr.psi_0, config.covr.schedule)
    steps = schedule.psi
    while schedule.due(config.steps):
        steps = schedule.psi
        schedule.advance()
    most = min(config.decisions(min(steps, config.steps)), config.replay.capacity)
    return math.ceil(config.covr.top_share * most) if config.covr.filter == "top" else most // 2


def _replay(config: TrainConfig) -> Part:
    """The frames of the replay buffer; the rest of a transition is small."""
    count, envs = config.replay.capacity, config.env.num_envs
    keys = key_specs(config.env.obs_shape, None, config.env.frame_stack, False)
    (shape,) = ring_shapes(keys, envs, -(-count // envs))
    frame = "x".join(map(str, shape[2:]))
    return Part(
        "replay buffer",
        math.prod(shape),
        f"{shape[0] * shape[1]:,} frames of {frame} for {count:,} decisions",
    )


def _agent(config: TrainConfig, action_dim: int, device_type: str) -> list[Part]:
    """Networks, optimizers and an update: measured on the CPU on small batches, of which an update
    takes an amount for each row."""
    shape = agent_obs_shape(config)
    peaks, sizes = [], (4, 8)
    with LiveBytes("cpu") as memory:
        agent = make_agent(shape, (action_dim,), replace(config.agent, compile=False), device="cpu")
        for rows in sizes:
            agent.update(_batch(config, rows, action_dim), guide=True)
            kept = memory.peak = memory.now
            agent.update(_batch(config, rows, action_dim), guide=True)
            peaks.append(memory.peak - kept)
    rows = config.replay.batch_size
    update = peaks[0] + (peaks[1] - peaks[0]) * (rows - sizes[0]) // (sizes[1] - sizes[0])
    count = sum(p.numel() for module in agent.modules().values() for p in module.parameters())
    graphed = config.agent.graph and device_type == "cuda"
    return [
        Part("networks", kept, f"{count:,} weights, gradients, Adam's moments"),
        Part("an update", update, f"{rows} transitions", passing=not graphed),
    ]


def _batch(config: TrainConfig, rows: int, action_dim: int) -> Batch[torch.Tensor]:
    shape, dtype = agent_obs_shape(config), config.agent.batch_form.dtype
    obs, next_obs = (torch.zeros(rows, *shape, dtype=dtype) for _ in range(2))
    one, index = torch.zeros(rows), torch.zeros(rows, dtype=torch.int64)
    no, action = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows, action_dim)
    extras = {"prior": action, "prior_mask": one}
    return Batch(obs, action, one, next_obs, one, no, no, index, one, extras)


# ---- devices and remedies ----


def gpus() -> list[Device]:
    """The CUDA devices of this machine."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        nbytes = properties.total_memory
        found.append(Device(f"cuda:{index}, {properties.name}, {nbytes / 1e9:.0f} GB", nbytes))
    return found


def host() -> Device:
    """The memory of this machine."""
    nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(f"this machine's CPU, {nbytes / 1e9:.0f} GB", nbytes)


def remedies(memory: RunMemory, device_type: Literal["cpu", "cuda"]) -> tuple[list[Remedy], int]:
    """Settings that would save at least 1 % of the memory, the largest saving first; and the bytes that a run
    with all of them would take."""
    found, everything = [], deepcopy(memory.config)
    for flag, change in _changes(memory):
        config = deepcopy(memory.config)
        change(config)
        saves = memory.needed - run_memory(config, device_type, memory).needed
        if saves >= memory.needed // 100:
            found.append(Remedy(flag, saves))
            change(everything)
    best = run_memory(everything, device_type, memory).needed if found else memory.needed
    return sorted(found, key=lambda remedy: -remedy.saves), best


def _changes(memory: RunMemory) -> Iterator[tuple[str, Any]]:
    """Flags, and functions that make the same change in a config."""
    config, tuner = memory.config, memory.config.tuner

    def tuned(**changes: Any) -> Any:
        return lambda c: setattr(c, "tuner", replace(c.tuner, **changes))

    if tuner.mode == "full":
        yield "--tuner.mode lora", tuned(mode="lora")
    elif memory.vlm.bits is None:
        yield "--vlm.quantization 4bit", lambda c: setattr(c.vlm, "quantization", "4bit")
    if tuner.mode == "lora" and tuner.lora_rank > _RANK:
        yield f"--tuner.lora-rank {_RANK}", tuned(lora_rank=_RANK)
    if tuner.micro_batch > 4:
        yield "--tuner.micro-batch 4", tuned(micro_batch=4)
    if not tuner.gradient_checkpointing:
        yield "--tuner.gradient-checkpointing", tuned(gradient_checkpointing=True)
    if tuner.cache_image_features:
        yield "--tuner.no-cache-image-features", tuned(cache_image_features=False)
    if config.vlm.image_size > max(config.env.height, config.env.width):
        yield "--vlm.image-size 0", lambda c: setattr(c.vlm, "image_size", 0)
    if tuner.overlap:
        yield "--tuner.no-overlap", tuned(overlap=False)
    if config.replay.device != "cpu":
        yield "--replay.device cpu", lambda c: setattr(c.replay, "device", "cpu")


# ---- for people and programs ----


@dataclass(frozen=True)
class Answer:
    """Whether a run fits the devices at hand, or common ones."""

    memory: RunMemory
    device_type: Literal["cpu", "cuda"]
    verdicts: list[tuple[Device, int, bool]]
    """Devices, the bytes of the run there, and whether the device is of this machine."""
    remedies: list[Remedy]
    with_all: int
    """Bytes with all remedies."""

    @property
    def fits_here(self) -> bool:
        """Whether the run fits a device of this machine."""
        return any(here and needed <= device.nbytes for device, needed, here in self.verdicts)


def answer(config: TrainConfig) -> Answer:
    """Compares a run with the GPUs of this machine. If it has none, or the run is for the CPU, with its host
    memory; and for a run that need not be on the CPU with common GPUs too.

    Raises:
        UserError: settings that do not fit together.
        FileNotFoundError, ValueError: as for `run_memory`.
    """
    config.check()
    own = gpus()
    device_type: Literal["cpu", "cuda"] = "cpu" if config.device == "cpu" else "cuda"
    memory = run_memory(config, device_type)
    verdicts = []
    if device_type == "cuda":
        devices = own or [Device(f"a GPU of {size} GB", size * 10**9) for size in COMMON_GPUS]
        verdicts = [(device, memory.needed, bool(own)) for device in devices]
    if not own or device_type == "cpu":
        on_cpu = memory if device_type == "cpu" else run_memory(config, "cpu")
        verdicts.append((host(), on_cpu.needed, True))
    tight = any(needed > device.nbytes for device, needed, _ in verdicts)
    less, with_all = remedies(memory, device_type) if tight else ([], memory.needed)
    return Answer(memory, device_type, verdicts, less, with_all)


def as_json(answer: Answer) -> dict[str, Any]:
    """The answer as plain types; memory is in bytes."""
    memory = answer.memory
    return {
        "model": str(memory.config.vlm.model),
        "dtype": str(memory.vlm.dtype).removeprefix("torch."),
        "quantized_bits": memory.vlm.bits,
        "parts": {
            owner: [part._asdict() for part in parts] for owner, parts in memory.groups.items() if parts
        },
        "serving": memory.serving,
        "rounds_in_turn": memory.total(overlap=False),
        "rounds_beside": memory.total(overlap=True),
        "devices": [
            device._asdict() | {"needed": needed, "fits": needed <= device.nbytes, "here": here}
            for device, needed, here in answer.verdicts
        ],
        "remedies": [remedy._asdict() for remedy in answer.remedies],
        "with_all_remedies": answer.with_all,
        "fits_here": answer.fits_here,
    }


def print_answer(answer: Answer) -> None:
    """Prints the parts, their sums, the verdicts, and what would take less."""
    memory, config = answer.memory, answer.memory.config
    vlm, beside = memory.vlm, config.tuner.overlap
    dtype = str(vlm.dtype).removeprefix("torch.")
    stored = f"{dtype}, linear layers in {vlm.bits} bits" if vlm.bits else dtype
    height, width = config.env.height, config.env.width
    print(f"{config.vlm.model} in {stored}, in a run of {config.begun_as} on a {_KINDS[answer.device_type]}")
    shown = f", shown at {config.vlm.image_size}," if config.vlm.image_size else ""
    tokens = f"{vlm.image_tokens} of the prompt's {vlm.prompt_tokens} tokens"
    print(f"A frame of {height}x{width}{shown} is {tokens}.")
    print(f"GB from shapes, not measured on a {_KINDS[answer.device_type]}:")
    for owner, parts in memory.groups.items():
        if parts:
            print(f"\n{owner}")
        for part in parts:
            print(_row(part.name, part.nbytes, part.how))
    chosen = "as it is set"
    print("\nall together")
    print(_row("only answering", memory.serving))
    print(_row("rounds in turn", memory.total(overlap=False), "" if beside else chosen))
    print(_row("rounds beside", memory.total(overlap=True), chosen if beside else "with tuner.overlap"))
    print()
    for device, needed, _ in answer.verdicts:
        print(f"{device.name}: {_verdict(needed, device.nbytes)}")
    if answer.remedies:
        print("\nwhat would take less, each alone")
        for remedy in answer.remedies:
            print(f"  {remedy.flag:<34}{-remedy.saves / 1e9:>7.2f}")
        print(f"  {'all of these: ' + format(answer.with_all / 1e9, '.1f') + ' GB in all'}")


def _row(name: str, nbytes: int, how: str = "") -> str:
    return f"  {name:<18}{nbytes / 1e9:>7.2f}   {how}".rstrip()


_KINDS = {"cpu": "CPU", "cuda": "GPU"}


def _verdict(needed: int, there: int) -> str:
    if needed > there:
        return f"does not fit: needs {needed / 1e9:.1f} GB"
    return f"fits{', but tightly' if needed > 0.9 * there else ''}: needs {needed / 1e9:.1f} GB"
