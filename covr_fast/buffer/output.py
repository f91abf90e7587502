"""What a batch is written into: its tensors, and the request by which C++ fills them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C
from .batch import Batch, Observation
from .options import KeySpec, Options, Shape

Augment = Literal["shift", "crop", "translate"]
Draw = Callable[[Any, Any], None]
"""draw(request, how): puts ids into a request (of `_C`), or finds them there, and fills it. `how` is the
number of threads on a CPU, and memory for plans on a GPU."""
Changed = Callable[..., None]
"""changed(rows, names=None): these rows int64 [n] changed of the storage's tensors, of all or those named."""

HostRows = tuple[Any, Any, Any, Any, Any, Any, Any]
"""The arguments of `_C.Replay.add`: arrays of host memory."""

CPU = torch.device("cpu")  # takes 0.2 us less in every call than "cpu"
_IMAGE_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
_POOLED = 1 << 17  # bytes; from about here on malloc asks for fresh pages, which cost more than used ones


class OutputSpec:
    """The shapes, dtypes and kernel targets of the observations in a batch, for one set of options.

    Attributes:
        offset_range: augmentation offsets are drawn from [0, offset_range); 0 without augmentation.
        shift_origin: the offset of a window that leaves an image where it is.
        translate: an offset is the place of the image, and the same for obs and next_obs.
        targets: what the kernels write, one per key.

    Raises:
        ValueError: options that do not exist, or that these observations do not allow.
    """

    def __init__(
        self,
        keys: Sequence[KeySpec],
        augment: Augment | None,
        pad: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(f"memory_format is {memory_format}: use contiguous_format or channels_last")
        if dtype not in _IMAGE_DTYPES:
            raise ValueError(f"dtype is {dtype}: observations come as uint8, float32, bfloat16 or float16")
        if augment is not None:
            _check_augment(keys, augment, pad)
        self.offset_range = 0 if augment is None else 2 * pad + 1
        self.shift_origin = pad if augment == "shift" else 0
        self.translate = augment == "translate"
        added = {"crop": -pad, "translate": pad}.get(augment or "", 0)
        self.targets: list[_C.GatherTarget] = []
        self._outputs: list[tuple[Shape, torch.dtype, bool]] = []
        for key in keys:
            channels_last = memory_format == torch.channels_last and len(key.shape) == 3
            kind, border = (dtype, added) if key.is_image else (key.dtype, 0)
            shifted = augment is not None and key.is_image
            size = key.height + 2 * border, key.width + 2 * border
            self.targets.append(_C.GatherTarget(channels_last, shifted, self.translate, *size))
            self._outputs.append((key.out_shape(border), kind, channels_last))

    def allocate(self, n: int, empty: Callable[[Shape, torch.dtype], Tensor]) -> list[Tensor]:
        """n observations of every key, in memory that `empty` makes."""
        out = []
        for shape, dtype, channels_last in self._outputs:
            if channels_last:
                c, h, w = shape
                out.append(empty((n, h, w, c), dtype).permute(0, 3, 1, 2))
            else:
                out.append(empty((n, *shape), dtype))
        return out

    def contiguous(self, out: list[Tensor]) -> list[Tensor]:
        """What `allocate` has made, with its dimensions in the order of memory."""
        return [
            values.permute(0, 2, 3, 1) if channels_last else values
            for values, (_, _, channels_last) in zip(out, self._outputs, strict=True)
        ]


class Gather:
    """Fills batches, here on the CPU, where nothing waits: the lock of the C++ core is enough. For a GPU,
    `gpu.DeviceGather` overrides these methods.

    Attributes:
        device: where batches arrive, `index` and offsets included.
        batch_out, observations_out: the classes of requests.
        lock: on a GPU, excludes `changing` and `reading` of other threads. Acquire it before the lock of the
            core.
    """

    batch_out: Any = _C.BatchOut
    observations_out: Any = _C.ObservationsOut
    lock: AbstractContextManager[Any] = nullcontext()
    _changing: AbstractContextManager[Changed] = nullcontext(lambda *_: None)

    def __init__(self) -> None:
        self.device = CPU
        self._pool = _C.OutputPool()

    def add(self, core: _C.Replay, rows: HostRows) -> Any:
        """Adds rows of host memory. Returns their ids, an array int64 [rows]. It locks."""
        return core.add(*rows)

    def drain(self) -> None:
        """Everything that was added is in the host's tables: rows of device memory arrive late. It locks.

        Raises:
            FrameStackError, ValueError: rows of device memory were refused.
        """

    def changing(self) -> AbstractContextManager[Changed]:
        """For a block that changes the host's tables. It tells which rows; what it changes of streams need
        not be told. It locks."""
        return self._changing

    def start_reading(self) -> None:
        """From here on the caller may read frames, and what else is stored on the device."""

    def reading(self) -> AbstractContextManager[None]:
        """For a block that reads or changes what is stored on the device: frames are not replaced before they
        are read. It locks."""
        return self.lock

    def replaced(self) -> None:
        """All of the host's tables were replaced. Call it while `reading`."""

    def empty(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Memory for observations, where `fill` can write. What is large returns to a pool when no tensor
        shares it any more."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _POOLED:
            return torch.empty(shape, dtype=dtype, device=CPU)
        return torch.from_numpy(self._pool.take(nbytes)).view(dtype).view(shape)

    def fill(self, request: Any, draw: Draw, n: int, with_next: bool) -> None:
        """Fills what `request` names: n rows, with next_obs or without. It locks."""
        draw(request, torch.get_num_threads())

    def how(self, n: int, with_next: bool) -> Any:
        """The second argument of a `Draw` for n rows, with next_obs or without."""
        return torch.get_num_threads()

    def ids(self, index: Tensor) -> Tensor:
        """These ids, int64 [n] in host memory, in memory of a new batch."""
        return index.clone()

    def frames(self, ring: Tensor, streams: Tensor, slots: Tensor) -> Tensor:
        """The single frames ring[streams, slots], where batches arrive. Call it while `reading`."""
        return ring[streams, slots]


class BatchWriter:
    """Allocates batches and has them filled."""

    def __init__(self, options: Options, gather: Gather) -> None:
        self._keys = options.keys
        self._single = options.single
        self._gather = gather
        self.spec = cache(partial(OutputSpec, options.keys))  # (augment, pad, dtype, memory_format)

        def maker(dtype: torch.dtype) -> Callable[..., Tensor]:
            """Makes tensors [*sizes]. Dtype and device are settled here, which saves time in every batch."""
            return torch.empty(0, dtype=dtype, device=gather.device).new_empty

        self._floats, self._bools, self._ids = map(maker, (torch.float32, torch.bool, torch.int64))
        self._columns = [(c.name, maker(c.dtype), c.shape) for c in options.columns]
        self._extras = [extra.name for extra in options.columns[1:]]
        # The forms of a batch's parts. (A cached function of `self` would be a cycle: the memory of a buffer
        # that nobody refers to, and its pinned pages, would wait for the garbage collector.)
        self._asked: dict[tuple[int, OutputSpec], dict[str, Form]] = {}

    def allocate(self, n: int, spec: OutputSpec, index: Tensor | None = None) -> Batch:
        """A batch of n rows that is not filled yet."""
        floats, bools = self._floats, self._bools
        columns = {name: make(n, *shape) for name, make, shape in self._columns}
        offsets = self._ids(2, n, 2).unbind() if spec.offset_range else (None, None)
        empty = self._gather.empty
        return Batch(
            obs=self.join(spec.allocate(n, empty)),
            action=columns.pop("action"),
            reward=floats(n),
            next_obs=self.join(spec.allocate(n, empty)),
            discount=floats(n),
            terminated=bools(n),
            truncated=bools(n),
            index=self._ids(n) if index is None else index,
            weight=floats(n),
            extras=columns,
            obs_offset=offsets[0],
            next_obs_offset=offsets[1],
        )

    def check(self, out: Batch, n: int, spec: OutputSpec) -> None:
        """Raises TypeError or ValueError unless `allocate` could have made `out`."""
        if not isinstance(out, Batch):
            raise TypeError(f"out is a {type(out).__name__}: it must be a batch that sample() returned")
        if (n, spec) not in self._asked:
            self._asked[n, spec] = _forms(self.allocate(n, spec))
        ours, asked = _forms(out), self._asked[n, spec]
        for name in {**asked, **ours}:
            if ours.get(name) != asked.get(name):
                raise ValueError(
                    f"out.{name} is {_text(ours.get(name))}: it must be {_text(asked.get(name))}. A batch "
                    "that sample() returned, with the same arguments, can be filled again"
                )

    def request(self, batch: Batch, n_step: int, spec: OutputSpec) -> Any:
        """What C++ fills a batch by."""
        request = self._gather.batch_out(  # keywords would take 1 us
            batch.index,
            n_step,
            batch.reward,
            batch.discount,
            batch.terminated,
            batch.truncated,
            batch.weight,
            [batch.action, *map(batch.extras.__getitem__, self._extras)],
            batch.obs_offset,
            batch.next_obs_offset,
            spec.offset_range,
            spec.shift_origin,
            spec.translate,
        )
        obs, next_obs = self._split(batch.obs), self._split(batch.next_obs)
        for key in zip(spec.targets, spec.contiguous(obs), spec.contiguous(next_obs), strict=True):
            request.add_key(*key)
        return request

    def batch(self, batch: Batch, draw: Draw, n_step: int, spec: OutputSpec) -> Batch:
        """Fills the batch with the ids that `draw` puts into its index, or finds there."""
        self._gather.fill(self.request(batch, n_step, spec), draw, len(batch.index), True)
        return batch

    def observations(self, index: Tensor, draw: Draw, spec: OutputSpec) -> Observation:
        """Only the observations of these ids."""
        n = len(index)
        out = spec.allocate(n, self._gather.empty)
        request = self._gather.observations_out(index)
        for target, obs in zip(spec.targets, spec.contiguous(out), strict=True):
            request.add_key(target, obs, None)
        self._gather.fill(request, draw, n, False)
        return self.join(out)

    def _split(self, observations: Observation) -> list[Tensor]:
        """One tensor per key, in the order of the buffer's."""
        if isinstance(observations, Tensor):
            return [observations]
        return [observations[key.name] for key in self._keys]

    def join(self, observations: list[Tensor]) -> Observation:
        """A tensor, or a dict of them, of one tensor per key."""
        if self._single:
            return observations[0]
        return {key.name: values for key, values in zip(self._keys, observations, strict=True)}


def _check_augment(keys: Sequence[KeySpec], augment: str, pad: int) -> None:
    if augment not in ("shift", "crop", "translate"):
        raise ValueError(f"augment is {augment!r}: it must be None, 'shift', 'crop' or 'translate'")
    images = [key for key in keys if key.is_image]
    if not images:
        raise ValueError(f"augment={augment!r} needs an image observation (uint8, [C, H, W] or [H, W])")
    if pad < 0 or pad > 1024:
        raise ValueError(f"pad is {pad}: it must lie in [0, 1024]")
    if augment == "crop" and any(2 * pad >= min(key.height, key.width) for key in images):
        raise ValueError(f"pad is {pad}: a crop by {2 * pad} pixels leaves nothing of the images")


Form = tuple[torch.dtype, torch.Size, torch.device, tuple[int, ...]] | type


def _forms(batch: Batch) -> dict[str, Form]:
    """Of each part: what must be the same so that another batch can be written to its memory."""
    forms: dict[str, Form] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Mapping):
            forms |= {f"{field.name}[{key!r}]": _form(part) for key, part in value.items()}
        elif value is not None:
            forms[field.name] = _form(value)
    return forms


def _form(value: Any) -> Form:
    if not isinstance(value, Tensor):
        return type(value)
    # Strides of dimensions of one element mean nothing.
    strides = tuple(stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1)
    return value.dtype, value.shape, value.device, strides


def _text(form: Form | None) -> str:
    if form is None:
        return "missing"
    if isinstance(form, type):
        return f"a {form.__name__}"
    dtype, shape, device, strides = form
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device} with strides {list(strides)}"
