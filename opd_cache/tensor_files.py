"""Tensors in safetensors files: opened, and compared with what they were written from before anybody else sees them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opd_cache.store.disk import unlike_written

T = TypeVar("T")
FORMAT = {"format": "pt"}  # in the header of a model's weights
COMPARED_BYTES = 256 << 20
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def open_tensors(path: Path) -> Any:
    """safetensors' file, for a `with`. Raises OSError with the system's own reason, SafetensorError."""
    return open_again([path], lambda: safe_open(path, "pt"))


def read_tensors(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all files, one in memory at a time."""
    for path in sorted(paths):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)


def tensor_shapes(paths: Iterable[Path]) -> dict[str, torch.Size]:
    """Shapes by name, of all files."""
    shapes = {}
    for path in sorted(paths):
        with open_tensors(path) as file:
            shapes.update({name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def open_again(paths: Iterable[Path], load: Callable[[], T]) -> T:
    """What `load` gives from files that it lets safetensors open, which calls every failure to open one a missing file.
    Then the system is asked for its reason; where it has none by now, `load` gets a second chance."""
    try:
        return load()
    except FileNotFoundError as error:
        if error.errno is not None:
            raise
        for path in paths:
            path.open("rb").close()
        return load()


def in_parts(tensors: Iterable[tuple[str, Tensor]], most_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors by name, as many at once as have `most_bytes`, or one that is larger. Without any, one empty part."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > most_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one file. Raises DiskError when it reads back otherwise."""
    save_file(dict(tensors), path, metadata)
    if check_tensors(path, tensors, metadata) != tensors.keys():
        raise unlike_written(path)


def check_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> set[str]:
    """The names in a file, after the tensors of these names were compared bit by bit. Raises DiskError."""
    try:
        with open_tensors(path) as file:
            names, found_metadata = set(file.keys()), file.metadata()
        known = ((name, tensors[name]) for name in sorted(names & tensors.keys()))
        is_same = found_metadata == metadata and all(_are_same(path, part) for part in in_parts(known, COMPARED_BYTES))
    except SafetensorError as error:
        raise unlike_written(path) from error
    if not is_same:
        raise unlike_written(path)
    return names


def _are_same(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    # What was read of a file stays mapped, and counts as memory, as long as it is open.
    with open_tensors(path) as file:
        return all(_is_same(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def _is_same(found: Tensor, wanted: Tensor) -> bool:
    """Shape, type and every bit."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return torch.equal(_bits(found), _bits(wanted.detach().to(found.device)))


def _bits(tensor: Tensor) -> Tensor:
    """As integers of the tensor's own width, where there are some."""
    return tensor.contiguous().reshape(-1).view(INTEGERS.get(tensor.itemsize, torch.uint8))
