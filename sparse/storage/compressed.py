"""Sparse tensors in a safetensors file as indices and values, without their zeros.

They are loaded to the same bits. Format, version 1: a tensor X named N that gets smaller by it
becomes three entries of the file, all 1-D:

    N/shape   int64   the shape of X
    N/values  X.dtype its entries that are not +0.0, in flat (row-major) order; an all-zero X lists
                      its first entry, so that no entry of the file is empty
    N/gaps    uint8   where they are: before each value, the length of the run of left-out entries,
                      a run of r written as r // 255 bytes of 255 and one byte r % 255; after the
                      last value, the remaining run of t entries, as t // 255 bytes of 255
 or N/bitmap  uint8   where they are: one bit per entry of X, the first in the lowest bit of a byte

Of gaps and bitmap the one of fewer bytes is written, gaps if they are equal; gaps are smaller below
a density of about 1/8. If indices, values, shape and HEADER bytes together are not smaller than X,
X stays a plain entry, which every tool can read. Whether an entry is zero is decided by its bits,
so -0.0 and NaN are kept. The metadata of the file holds `sparse_bridges_compressed: "1"`. A file of
n bytes expands to at most 255 n entries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from .atomic import replace_files

MARK, VERSION = "sparse_bridges_compressed", "1"
PARTS = ("shape", "values", "gaps", "bitmap")
HEADER = 256
"""About as many bytes as two more entries take in the header of a file."""
LONG = 255  # the byte of a gap that means: 255 entries are left out, and the run goes on
AS_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry


def compress(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a file that holds `tensors`; `expand` is the inverse.

    Tensors of floats that get smaller by it (see above) are replaced by their parts, on the CPU;
    all others are passed on as they are. Raises ValueError for a tensor whose name ends like a
    part's.
    """
    entries: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if _part(name):
            raise ValueError(
                f"compress: the tensor name {name!r} ends like a part of a compressed tensor "
                f"({', '.join('/' + part for part in PARTS)}); rename it"
            )
        parts = _split(tensor) if tensor.is_floating_point() else None
        if parts is None:
            entries[name] = tensor
        else:
            entries |= {f"{name}/{part}": entry for part, entry in parts.items()}
    return entries


def expand(entries: Mapping[str, Tensor], where: str = "entries") -> dict[str, Tensor]:
    """Return the tensors that `compress` made `entries` of, with the same bits, on the CPU.

    `where` names the file in errors. Raises ValueError where parts do not fit together: one is
    missing or belongs to another tensor, a count differs, or an index is beyond the tensor.
    """
    return _expand(entries, dict.fromkeys(entries, where))


def _expand(entries: Mapping[str, Tensor], files: Mapping[str, str]) -> dict[str, Tensor]:
    """Return what `expand` does; `files` names, for errors, the file of every entry."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in entries.items():
        if part := _part(entry):
            name = entry[: -len(part) - 1]
            tensors[name] = parts.setdefault(name, {})[part] = tensor  # keeps the order of entries
        else:
            tensors[entry] = tensor
    for name, of_one in parts.items():
        where = ", ".join(dict.fromkeys(files[f"{name}/{part}"] for part in of_one))
        if name in entries:
            raise ValueError(f"{where}: {name} is there twice, plain and compressed; save it again")
        try:
            tensors[name] = _join(of_one)
        except ValueError as error:
            raise ValueError(
                f"{where}: the compressed tensor {name} is damaged: {error}; restore the file or "
                "save it again"
            ) from error
    return tensors


def _part(entry: str) -> str:
    """Return which part of a compressed tensor an entry is, one of PARTS; "" for a plain tensor."""
    name, slash, part = entry.rpartition("/")
    return part if slash and name and part in PARTS else ""


def _split(tensor: Tensor) -> dict[str, Tensor] | None:
    """Return the parts of a tensor, or None where they are no smaller than the tensor itself."""
    bits = tensor.detach().cpu().contiguous().view(AS_INT[tensor.element_size()]).numpy().ravel()
    there = bits != 0
    if not there.any():
        there[:1] = True
    n_values, n_bitmap = int(np.count_nonzero(there)), -(-bits.size // 8)
    budget = (bits.size - n_values) * tensor.element_size() - 8 * tensor.ndim - HEADER
    if budget <= min(n_values, n_bitmap):  # a gap takes at least one byte
        return None
    gaps = _to_gaps(np.flatnonzero(there), bits.size) if n_values <= n_bitmap else None
    if gaps is not None and gaps.size <= n_bitmap:
        index = {"gaps": torch.from_numpy(gaps)}
    else:
        index = {"bitmap": torch.from_numpy(np.packbits(there, bitorder="little"))}
    if budget <= min(len(entry) for entry in index.values()):
        return None
    values = torch.from_numpy(bits[there]).view(tensor.dtype)
    return {"shape": torch.tensor(tensor.shape, dtype=torch.int64), "values": values} | index


def _to_gaps(at: np.ndarray, n: int) -> np.ndarray:
    """Return the gaps that stand for the increasing places `at` (one or more) among n entries."""
    runs = np.diff(at, prepend=-1) - 1
    ends = np.cumsum(runs // LONG + 1)
    gaps = np.full(ends[-1] + (n - 1 - at[-1]) // LONG, LONG, dtype=np.uint8)
    gaps[ends - 1] = runs % LONG
    return gaps


def _join(parts: dict[str, Tensor]) -> Tensor:
    """Return the tensor that its parts stand for; ValueError where they are not of one tensor."""
    if set(parts) not in ({"shape", "values", "gaps"}, {"shape", "values", "bitmap"}):
        raise ValueError(f"its parts are {sorted(parts)}, not shape, values and gaps or bitmap")
    shape, values = parts["shape"], parts["values"]
    index = parts["gaps"] if "gaps" in parts else parts["bitmap"]
    if shape.dtype != torch.int64 or index.dtype != torch.uint8 or not values.is_floating_point():
        raise ValueError(f"its dtypes are {shape.dtype}, {values.dtype} and {index.dtype}")
    if any(part.ndim != 1 for part in parts.values()):
        raise ValueError("its parts are not 1-D")
    sizes = shape.tolist()
    if min(sizes, default=1) < 0:
        raise ValueError(f"its shape is {sizes}")
    n = prod(sizes)  # Python's integers do not overflow
    find = _from_gaps if "gaps" in parts else _from_bitmap
    at, n_values = find(index.contiguous().numpy(), n)
    if n_values != len(values):
        raise ValueError(f"{n_values} indices stand beside {len(values)} values")
    as_int = AS_INT[values.element_size()]
    bits = torch.zeros(n, dtype=as_int)
    bits.numpy()[at] = values.contiguous().view(as_int).numpy()
    return bits.view(values.dtype).view(sizes)


def _from_gaps(gaps: np.ndarray, n: int) -> tuple[np.ndarray, int]:
    """Return the places of the values, as increasing numbers below n, and how many they are."""
    long = gaps == LONG
    ends = np.cumsum(np.where(long, LONG, gaps.astype(np.int64) + 1))  # int64: 255 * bytes at most
    last = int(ends[-1]) if ends.size else 0
    if not 0 <= n - last < LONG:
        raise ValueError(f"its gaps lead to {last} of {n} entries")
    at = ends[~long] - 1
    return at, at.size


def _from_bitmap(bitmap: np.ndarray, n: int) -> tuple[np.ndarray, int]:
    """Return the places of the values, as a mask of n entries, and how many they are."""
    if bitmap.size != -(-n // 8):
        raise ValueError(f"its bitmap has {bitmap.size} bytes for {n} entries")
    there = np.unpackbits(bitmap, bitorder="little").view(bool)
    if there[n:].any():
        raise ValueError(f"its bitmap points beyond entry {n - 1}")
    return there[:n], int(np.count_nonzero(there))


def is_compressed(path: str | Path) -> bool:
    """Return whether a safetensors file holds compressed tensors.

    Raises ValueError where its metadata names another version of the format, where it holds parts
    although its metadata names none, and where it cannot be read.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            version = (file.metadata() or {}).get(MARK)
            parts = [name for name in file.keys() if _part(name)]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}; restore the file") from error
    if version is None and parts:
        raise ValueError(
            f"{path} holds {parts[0]} but no {MARK} in its metadata: it was not written to the "
            "end; save the model again"
        )
    if version not in (None, VERSION):
        raise ValueError(
            f"{path} is compressed in version {version}, and this library reads version {VERSION}; "
            "update sparse-bridges"
        )
    return version is not None


def load_compressed(paths: Iterable[str | Path]) -> dict[str, Tensor]:
    """Return the tensors of one or more files, compressed or plain.

    The files may be shards of one model: the parts of a tensor may be in different files. Raises
    ValueError where two files hold the same entry.
    """
    entries: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    for path in map(str, paths):
        is_compressed(path)  # refuses another version
        of_one = load_file(path)
        if twice := files.keys() & of_one.keys():
            raise ValueError(f"{path} and {files[min(twice)]} both hold {min(twice)}; save again")
        entries |= of_one
        files |= dict.fromkeys(of_one, path)
    return _expand(entries, files)


def save_compressed(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `compress(tensors)` as one safetensors file, which replaces an older one as a whole."""
    _write(compress(tensors), Path(path), metadata)


def mark(path: str | Path) -> None:
    """Add the version of the format to the metadata of a file with entries of `compress`."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    _write(load_file(path), Path(path), metadata)


def _write(entries: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None) -> None:
    metadata = {"format": "pt"} | dict(metadata or {}) | {MARK: VERSION}
    replace_files(path.parent, {path.name: _in_order(save(entries, metadata))})


def _in_order(file: bytes) -> bytes:
    """Return the safetensors file with its metadata sorted, which `save` leaves in any order."""
    n = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + n])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + file[8 + n :]
