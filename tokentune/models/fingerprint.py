"""What tells one model's weights from another's of the same shapes: a short record of their content.

    fingerprint_of_checkpoint("meta-llama/Llama-2-7b-hf")    # of its files
    fingerprint_of(model.state_dict())                       # of tensors in memory, in the types that they have there

Each tensor's type, shape and bytes are hashed, and then the sorted set of these hashes. Names, their order, the
division into files, and tied weights that are saved twice do not count. A tensor of up to `BLOCKS * BLOCK` bytes counts
whole, of a larger one as many bytes, in blocks that are evenly spaced. So a model that was trained further has another
fingerprint, also if only one of its matrices changed; a change of a few rows of a matrix (new tokens' embeddings) may
be missed.

Cost: at most 64 KiB to read per tensor, whatever its size (measured: 0.1 s for 272 tensors, in the page cache).
"""

import hashlib
import json
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.utils import cached_file

from tokentune.file_names import BASE_FINGERPRINT_NAME

BLOCKS, BLOCK = 16, 4096  # number, bytes
FORMAT = 1
# Made from the configuration; old checkpoints hold them, and saving such a checkpoint again leaves them out.
COMPUTED = ("rotary_emb.inv_freq", "position_ids", "masked_bias")
TYPES = {  # in the header of a safetensors file
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


@dataclass(frozen=True)
class Fingerprint:
    """Of a set of tensors, each counted once."""

    digest: str
    tensors: int
    numbers: int  # in all tensors
    dtypes: dict[str, int]  # torch's name -> number of tensors

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT} | asdict(self)

    def save(self, folder: Path) -> None:
        """Writes it into an adapter's folder."""
        (folder / BASE_FINGERPRINT_NAME).write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, content: Any) -> Self | None:
        """`as_dict` read back; None: it is none, or of another format."""
        try:
            if content["format"] == FORMAT:
                return cls(**{name: content[name] for name in cls.__dataclass_fields__})
        except (KeyError, TypeError):
            pass
        return None

    def difference(self, other: Self) -> str | None:
        """How the other one's weights differ from these, as the end of a sentence about it; None: they do not."""
        if other.digest == self.digest:
            return None
        mine, theirs = (" and ".join(sorted(found.dtypes)) for found in (self, other))
        if mine != theirs:
            return f"its weights are of type {theirs}, not {mine}"
        if (self.tensors, self.numbers) != (other.tensors, other.numbers):
            return (
                f"it has {other.numbers:,} numbers in {other.tensors:,} different tensors, not {self.numbers:,} in "
                f"{self.tensors:,}"
            )
        return "it has as many weights of the same type, with other values"


class _Stored(NamedTuple):
    """A tensor whose bytes can be read in parts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes
    read: Callable[[int, int], bytes]  # from one byte up to another


def fingerprint_of(tensors: Mapping[str, Tensor]) -> Fingerprint:
    """Of tensors in memory by name, such as a `state_dict()`. Each may be on any device; of one that is not contiguous
    a copy is made."""
    return _fingerprint(_held(name, tensor) for name, tensor in tensors.items())


def fingerprint_of_checkpoint(
    name_or_path: str, *, allow_pickle: bool = False, local_files_only: bool = False
) -> Fingerprint | None:
    """Of the weight files that transformers reads for a model: a local folder, or a hub id, whose files are downloaded.

    Args:
        allow_pickle: where there are no safetensors, read the tensors (and nothing else) of pytorch_model.bin.
        local_files_only: read what the hub's cache has.

    Returns:
        None if there are no such files, or they cannot be read.
    """
    kinds = ("model.safetensors", "pytorch_model.bin") if allow_pickle else ("model.safetensors",)
    try:
        for kind in kinds:
            if files := _files(name_or_path, kind, local_files_only):
                read = _in_safetensors if kind.endswith(".safetensors") else _in_pickle
                return _fingerprint(stored for file in files for stored in read(file))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError):
        pass  # loading the model says what is wrong with it
    return None


def _files(name_or_path: str, single: str, local_files_only: bool) -> list[Path]:
    """A checkpoint's one file, or those of its index."""

    def found(name: str) -> Path | None:
        path = cached_file(
            name_or_path,
            name,
            local_files_only=local_files_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else Path(path)

    if (file := found(single)) is not None:
        return [file]
    if (index := found(f"{single}.index.json")) is None:
        return []
    shards = [found(name) for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())]
    if None in shards:
        raise FileNotFoundError(f"{name_or_path}: files that its index names are missing")
    return shards


def _in_safetensors(path: Path) -> Iterator[_Stored]:
    """The tensors of a file: 8 bytes with the header's length, the header (JSON), the tensors' bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path}: no header")
        header, first = json.loads(file.read(length)), 8 + length
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]

            def read(start: int, stop: int, begin: int = begin) -> bytes:
                file.seek(first + begin + start)
                return file.read(stop - start)

            yield _Stored(name, TYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]), end - begin, read)


def _in_pickle(path: Path) -> Iterator[_Stored]:
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
        yield _held(name, tensor)


def _held(name: str, tensor: Tensor) -> _Stored:
    flat = tensor.detach().contiguous().view(-1)
    size, item = flat.numel() * flat.element_size(), flat.element_size()

    def read(start: int, stop: int) -> bytes:
        whole = flat[start // item : -(-stop // item)].cpu().view(torch.uint8).numpy().tobytes()
        return whole[start % item :][: stop - start]

    return _Stored(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), size, read)


def _fingerprint(tensors: Iterable[_Stored]) -> Fingerprint:
    found: dict[bytes, tuple[str, int]] = {}  # type and numbers of each
    for stored in tensors:
        if not stored.name.endswith(COMPUTED):
            found[_digest(stored)] = stored.dtype, math.prod(stored.shape)
    dtypes = Counter(dtype for dtype, _ in found.values())
    digest = hashlib.blake2b(b"".join(sorted(found)), digest_size=16).hexdigest()
    return Fingerprint(digest, len(found), sum(numbers for _, numbers in found.values()), dict(dtypes))


def _digest(stored: _Stored) -> bytes:
    """Of a tensor's type, shape and bytes. Raises ValueError: the file ends before them."""
    hashed = hashlib.blake2b(f"{stored.dtype} {list(stored.shape)}".encode(), digest_size=16)
    spans = [(0, stored.size)]
    if stored.size > BLOCKS * BLOCK:
        spans = [(start, start + BLOCK) for start in (n * stored.size // BLOCKS for n in range(BLOCKS))]
    for start, stop in spans:
        block = stored.read(start, stop)
        if len(block) != stop - start:
            raise ValueError(f"{stored.name}: its bytes are not all there")
        hashed.update(block)
    return hashed.digest()
