"""The entries of a tensordict as flat tensors, and the keys that name them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase, is_non_tensor, is_tensorclass, unravel_key
from torch import Tensor

NestedKey = str | tuple[str, ...]
Key = tuple[str, ...]
Shape = tuple[int, ...]


class Keys(NamedTuple):
    """The entries with a special meaning."""

    obs: tuple[Key, ...]
    action: Key
    reward: Key

    @classmethod
    def of(cls, obs: Sequence[NestedKey], action: NestedKey, reward: NestedKey) -> "Keys":
        """As FastReplayBuffer is given them; the reward is under "next".

        Raises:
            TypeError, ValueError: not keys, none for the observations, or a key twice or under "next".
        """
        if isinstance(obs, str) or not isinstance(obs, Sequence):
            raise TypeError(f"obs_keys is {obs!r}: it must be a tuple of keys, such as ('pixels',)")
        found = tuple(_flat(key, "obs_keys") for key in obs)
        if not found or len(set(found)) < len(found):
            raise ValueError(f"obs_keys is {obs!r}: it must hold at least one key, and each once")
        if under_next := [text(key) for key in found if key[0] == "next"]:
            names = ", ".join(under_next)
            raise ValueError(f"obs_keys has {names}: name the root's entries, 'next' is implied")
        return cls(found, _flat(action, "action_key"), ("next", *_flat(reward, "reward_key")))


def _flat(key: NestedKey, option: str) -> Key:
    try:
        flat = unravel_key(key)
    except RuntimeError:
        raise TypeError(f"{option} has {key!r}: a key is a string, or for nested entries a tuple") from None
    return (flat,) if isinstance(flat, str) else flat


def read(tensordict: TensorDictBase) -> tuple[dict[Key, Tensor], dict[Key, Shape]]:
    """(every entry as [N, *shape] on the CPU, the further batch dimensions of every nested tensordict). N is
    the product of the tensordict's batch dimensions.

    Raises:
        ValueError, TypeError: entries that are not dense tensors, or that only some of the rows have.
    """
    tensors: dict[Key, Tensor] = {}
    nested: dict[Key, Shape] = {}
    dims, n = tensordict.ndim, math.prod(tensordict.shape)
    for key, value in _walk(tensordict, ()):
        if isinstance(value, TensorDictBase):
            nested[key] = tuple(value.batch_size[dims:])
            continue
        shape = value.shape[dims:]
        # A memory-mapped tensor is of a subclass of Tensor, but its views are plain tensors.
        tensors[key] = value.detach().cpu().as_subclass(Tensor).reshape(n, *shape)
    return tensors, nested


def _walk(part: TensorDictBase, prefix: Key) -> Iterator[tuple[Key, Tensor | TensorDictBase]]:
    if isinstance(part, LazyStackedTensorDict) and (some := _all_keys(part) - _names(part)):
        raise ValueError(
            f"only some of the stacked tensordicts have {texts((*prefix, *key) for key in some)}: give all "
            "of them the same entries"
        )
    for name in part.keys():  # noqa: SIM118  (iterating over a tensordict gives its rows)
        key = (*prefix, name)
        try:
            value = part.get(name)
        except RuntimeError as error:
            raise ValueError(f"{text(key)} cannot be stacked: {error}") from error
        if is_non_tensor(value):
            raise TypeError(
                f"{text(key)} is not a tensor: the buffer holds numbers. Encode it, or leave it out with "
                f"tensordict.exclude({text(key)})"
            )
        if is_tensorclass(value):
            raise TypeError(
                f"{text(key)} is a {type(value).__name__}, samples would have a TensorDict there: extend "
                "with tensordict.to_tensordict()"
            )
        if isinstance(value, TensorDictBase):
            yield key, value
            yield from _walk(value, key)
        elif value.layout != torch.strided or value.is_nested or value.is_quantized:
            raise TypeError(f"{text(key)} is not a dense tensor of numbers: convert it with to_dense()")
        else:
            yield key, value


def _names(part: TensorDictBase) -> set[Key]:
    return {key if isinstance(key, tuple) else (key,) for key in part.keys(include_nested=True)}


def _all_keys(part: TensorDictBase) -> set[Key]:
    """Includes the keys that a lazy stack hides because not all of its parts have them."""
    if isinstance(part, LazyStackedTensorDict):
        return set().union(*(_all_keys(each) for each in part.tensordicts))
    return _names(part)


def text(key: Key) -> str:
    """The key as written in code."""
    return repr(key[0] if len(key) == 1 else key)


def texts(keys: Iterable[Key]) -> str:
    return ", ".join(sorted(map(text, keys)))
