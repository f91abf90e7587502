"""A VLM without its weights: the model on torch's meta device, where every tensor has a shape and no values.

The code of prior and tuner runs on it as it is, so what they would allocate can be counted.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .backbones import Backbone, backbone_class
from .loading import Source, base_of, read_config
from .nano import write_nano
from .processor import load_processor, quiet

META = torch.device("meta")
_NF4_TABLES = 4 * (16 + 256 + 1)
"""Bytes per 4-bit layer: the 16 values of NF4, the 256 of its scales, and their offset."""


def open_on_meta(source: Source, dtype: torch.dtype, attention: str) -> Backbone:
    """The backbone of a model. Of its files only configuration and processor are read.

    Raises:
        OSError: there is no such model, or the base of this adapter cannot be found.
        ValueError: it has no configuration, or the architecture or the adapter is not supported.
    """
    base = base_of(source, weights=False) if source.adapted else source
    if base.folder is not None:
        backbone = _open_checkpoint(base.name, base.folder, dtype, attention)
    else:
        with tempfile.TemporaryDirectory() as folder, quiet():
            write_nano(folder, seed=0)
            backbone = _open_checkpoint(base.name, Path(folder), dtype, attention)
    if source.adapted:
        from peft import PeftConfig, get_peft_model

        adapter = PeftConfig.from_pretrained(str(source.folder))
        adapter.inference_mode = False
        backbone.model = get_peft_model(backbone.model, adapter)
    return backbone


def _open_checkpoint(name: str, folder: Path, dtype: torch.dtype, attention: str) -> Backbone:
    from transformers import AutoModelForImageTextToText

    config = read_config(name, folder)
    cls = backbone_class(config.model_type)
    with META, quiet():
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    model.name_or_path = model.config.name_or_path = name
    return cls(model, load_processor(folder, config))


def weights_in_files(folder: Path) -> int | None:
    """How many numbers the safetensors files of a checkpoint hold, by their headers; None without such."""
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    count = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return count if files else None


def quantized_bytes(weights: Iterable[Tensor], model: Any, bits: int) -> int:
    """Bytes of `weights` of a model whose linear layers bitsandbytes stores in 8 or 4 bits.

    8: with a float32 scale per output. 4: NF4, with a byte for the scale of a block of 64 numbers, and a
    float32 for 256 of these scales.
    Not quantized, as by transformers: the head, tied weights, and the last layer.
    """
    named = dict(model.named_parameters())
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {id(named[name]) for name in (*tied, *tied.values(), list(named)[-1]) if name in named}
    kept.add(id(model.get_output_embeddings().weight))
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - kept
    total = 0
    for weight in weights:
        if id(weight) not in linear:
            total += weight.nbytes
        elif bits == 8:
            total += weight.numel() + 4 * len(weight)
        else:
            blocks = math.ceil(weight.numel() / 64)
            total += math.ceil(weight.numel() / 2) + blocks + 4 * math.ceil(blocks / 256) + _NF4_TABLES
    return total


@contextmanager
def shapes_only(image_tokens: int) -> Iterator[None]:
    """Lets the code of a VLM run on meta tensors, in the places where it needs more than shapes.

    SDPA takes and keeps what a fused kernel does: torch would run its plain formula there, which keeps all
    scores. It is replaced in torch's module, and not by a mode of functions, because these end where backward
    begins. See `_Masks` for the others, and `_Remembered` for speed.

    Args:
        image_tokens: of all images of a call.
    """
    plain = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **more: Any
    ) -> Any:
        if query.is_meta:
            return _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
        return plain(query, key, value, attn_mask, *args, **more)

    F.scaled_dot_product_attention = attention
    try:
        with _Masks(image_tokens), _Remembered():  # type: ignore[no-untyped-call]
            yield
    finally:
        F.scaled_dot_product_attention = plain


class _Masks(TorchFunctionMode):
    """Values that the models ask for, where a meta tensor has none: those of frames without padding.

    A mask of images (one dimension) is all True, one of tokens (two) at `image_tokens` places. A condition
    (SmolVLM asks whether nothing is padded) holds. A list of numbers (of images in each row) has ones. A
    number is NaN: that is also what fresh LoRA gives where it is asked whether it can be merged.
    """

    def __init__(self, image_tokens: int) -> None:
        super().__init__()
        self._image_tokens = image_tokens

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.tolist and args[0].is_meta:
            return [1] * len(args[0])
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is Tensor.__float__ and args[0].is_meta:
            return math.nan
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            args = (args[0], self._places(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _places(self, index: Any) -> Any:
        """An index in which a mask is replaced by as many places as it has True."""
        found: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, Tensor) and part.dtype == torch.bool:
                count = self._image_tokens if part.ndim > 1 else len(part)
                found += [torch.zeros(count, dtype=torch.int64, device=part.device)] * part.ndim
            else:
                found.append(part)
        return tuple(found)


class _FusedAttention(torch.autograd.Function):
    """The shapes of a fused attention kernel: for its backward it keeps inputs, output and, in float32, the
    logarithm of each query's sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class _Remembered(TorchDispatchMode):
    """Gives the shapes that an operation gave the last time for arguments of the same shapes.

    torch finds most shapes of meta tensors in Python, which takes 50 to 2000 us each, and the layers of a
    model ask for the same ones. Views are always made anew.
    """

    _known: ClassVar[dict[Any, "Callable[..., Any] | None"]] = {}
    """What makes an operation's result; None if only the operation can."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            key = (func, _shapes(args), _shapes(tuple(kwargs.items())))
            make = self._known.get(key, func)
        except TypeError:  # an argument without a hash, such as a tensor with values
            return func(*args, **kwargs)
        if make is not func:
            return func(*args, **kwargs) if make is None else make(*args, **kwargs)
        result = func(*args, **kwargs)
        self._known[key] = _maker(result, args, kwargs)
        return result


def _shapes(value: Any) -> Any:
    """A key that is equal for arguments of which an operation makes the same shapes."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError("its values may matter")
        return value.dtype, value.shape, value.stride()
    if isinstance(value, (tuple, list)):
        return tuple([_shapes(each) for each in value])
    return type(value), value


def _maker(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Callable[..., Any] | None":
    """What makes such a result again: new tensors, or the argument that was changed in place."""
    if result is None:  # lists that were changed in place
        return lambda *args, **kwargs: None
    if args and result is args[0]:
        return lambda *args, **kwargs: args[0]
    if "out" in kwargs and result is kwargs["out"]:
        return lambda *args, **kwargs: kwargs["out"]
    results = [result] if isinstance(result, Tensor) else result
    if not isinstance(results, (tuple, list)) or not all(
        isinstance(x, Tensor) and x.is_meta for x in results
    ):
        return None
    given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    if len(given | {x.untyped_storage()._cdata for x in results}) < len(given) + len(results):
        return None  # views of arguments, or of one another
    shapes = [(x.shape, x.stride(), x.dtype) for x in results]

    def make() -> list[Tensor]:
        return [torch.empty_strided(*x, dtype=dtype, device=META) for *x, dtype in shapes]

    if [x.untyped_storage().nbytes() for x in results] != [x.untyped_storage().nbytes() for x in make()]:
        return None  # parts of a larger one
    if results is not result:
        return lambda *args, **kwargs: make()[0]
    kind = type(result)
    return lambda *args, **kwargs: kind(make())
