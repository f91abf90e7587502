"""The buffer's file format: a JSON header, then the tensors' bytes, each with a CRC-32.

8 bytes   magic
8 bytes   length of the header, little endian
4 bytes   CRC-32 of the header
header    {"version", "config", "tensors": [{"name", "dtype", "shape", "bytes", "crc32"}, ...]}
tensors   in that order, without gaps
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files import replacing

MAGIC = b"COVRBUF\n"
VERSION = 1
_PREFIX = struct.Struct("<8sQI")
_CHUNK = 64 << 20


def write(path: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes a temporary file and renames it to `path` once it is on the disk: `path` is never incomplete."""
    entries = []
    for name, tensor in tensors.items():
        checksum = 0
        for piece in _pieces(tensor):
            checksum = zlib.crc32(_bytes(piece), checksum)
        entries.append(
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "crc32": checksum,
            }
        )
    header = json.dumps({"version": VERSION, "config": config, "tensors": entries}).encode()
    with replacing(Path(path)) as file:
        file.write(_PREFIX.pack(MAGIC, len(header), zlib.crc32(header)))
        file.write(header)
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                file.write(_bytes(piece))


class Reader:
    """An open file. Its `config` and the `shapes` of its tensors are read at once."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise ValueError(f"{name} is not a saved replay buffer")
        _, length, checksum = _PREFIX.unpack(prefix)
        header = file.read(min(length, os.fstat(file.fileno()).st_size))
        if len(header) < length or zlib.crc32(header) != checksum:
            raise ValueError(f"{name} is damaged: its header does not match its checksum")
        content = json.loads(header)
        if content["version"] != VERSION:
            raise ValueError(
                f"{name} has format version {content['version']}, this release reads version {VERSION}: load "
                "it with the release that wrote it"
            )
        self.config: dict[str, Any] = content["config"]
        self._entries: list[dict[str, Any]] = content["tensors"]
        self.shapes: dict[str, list[int]] = {entry["name"]: entry["shape"] for entry in self._entries}

    def read(self, into: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors: those named in `into` are filled, which must have the right shapes; the others are
        new."""
        tensors = {}
        for entry in self._entries:
            name, dtype = entry["name"], getattr(torch, entry["dtype"])
            tensors[name] = (
                into[name] if name in into else torch.empty(entry["shape"], dtype=dtype, device="cpu")
            )
            checksum = 0
            for piece in _pieces(tensors[name]):
                on_cpu = piece if piece.is_cpu else torch.empty_like(piece, device="cpu")
                chunk = _bytes(on_cpu)
                if self._file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
                    raise ValueError(f"{self._name} is damaged: it ends within {name!r}")
                checksum = zlib.crc32(chunk, checksum)
                if on_cpu is not piece:
                    piece.copy_(on_cpu)
            if checksum != entry["crc32"]:
                raise ValueError(f"{self._name} is damaged: {name!r} does not match its checksum")
        return tensors


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as flat uint8 views in order. One that is not contiguous is split into its rows."""
    if tensor.numel() == 0:
        return
    if not tensor.is_contiguous():
        for row in tensor:
            yield from _pieces(row)
        return
    yield from torch.split(tensor.view(-1).view(torch.uint8), _CHUNK)


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.cpu().numpy())  # type: ignore[arg-type]
