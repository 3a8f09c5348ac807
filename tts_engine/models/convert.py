"""pytorch_model.bin, in one file or in shards, written anew as safetensors. The only place that reads a pickle format.

torch.load reads it with weights_only, which makes tensors and plain containers and calls nothing else that a file names. A
shard is mapped, not read into memory: its pages, and the copies of tied or strided tensors, are all that one takes. What is
written stands under another name until it is whole and on the disk.
"""

import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelError
from .weights import CONFIG, HUB_FILES, INDEX, SINGLE

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MOST_SHARED = 2  # times the bytes of a shard that its tensors may take: tied ones are written under each of their names


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    files: int
    tensors: int
    num_bytes: int


def convert(source: Path, destination: Path) -> Converted:
    """Write the checkpoint at `source` as safetensors into a new directory, config and tokenizer beside it.

    Every tensor keeps its name, dtype and bits; one that shares memory with others is written under each name. Killed at any
    moment it leaves nothing at `destination`; what it was writing lies beside it, in a name ending in ".part".
    Raises ModelError for anything that is not a complete checkpoint of tensors, and for a destination that exists.
    """
    source, destination = Path(source), Path(os.path.abspath(destination))
    shards = _shards(source)
    _read_json(source / CONFIG)
    if os.path.lexists(destination):
        raise ModelError(f"{destination} exists; give the name of a directory to be made")
    part = destination.with_name(f"{destination.name}.part")
    try:
        with _made(part):
            done = _write(source, shards, part)
            _sync(part)
            part.rename(destination)
            _sync(destination.parent)
    except OSError as error:
        raise ModelError(f"{destination} cannot be written: {error.strerror or error}") from error
    return done


def _shards(source: Path) -> dict[str, set[str] | None]:
    """The pickled files, in order of their names, each with the tensors that the index places there; None without an index."""
    if not source.is_dir():
        raise ModelError(f"{source} is not a directory; expected one with {CONFIG} and {PICKLED}")
    if found := sorted(path.name for path in source.glob("*.safetensors*")):
        raise ModelError(f"{source} holds {found[0]}: it is safetensors already, there is nothing to convert")
    single, index = source / PICKLED, source / PICKLED_INDEX
    if index.is_file() and single.is_file():
        raise ModelError(f"{source} holds both {PICKLED} and {PICKLED_INDEX}; remove the one that is not meant")
    if single.is_file():
        return {PICKLED: None}
    if not index.is_file():
        raise ModelError(f"{source}: expected {PICKLED} or {PICKLED_INDEX}; neither is there")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise ModelError(f'{index}: expected an object "weight_map" from tensor names to file names')
    shards: dict[str, set[str] | None] = {}
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard or not shard.endswith(".bin"):
            raise ModelError(f"{index} lists the file {shard!r}; expected the plain name of a .bin file within {source}")
        if not (source / shard).is_file():
            raise ModelError(f"{index} lists {shard}, which is not in {source}; download it again")
        shards[shard] = {name for name, place in names.items() if place == shard}
    return shards


def _write(source: Path, shards: dict[str, set[str] | None], part: Path) -> Converted:
    """Shard after shard, then what stands beside them; all of it synced."""
    placed: dict[str, str] = {}
    total = 0
    for number, (shard, names) in enumerate(shards.items(), start=1):
        file = SINGLE if names is None else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sizes = _write_shard(source / shard, names, part / file)
        placed |= dict.fromkeys(sizes, file)
        total += sum(sizes.values())
    if SINGLE not in placed.values():
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}, indent=2)
        (part / INDEX).write_text(text + "\n", encoding="utf-8")
        _sync(part / INDEX)
    for path in sorted({path for pattern in HUB_FILES for path in source.glob(pattern)}):
        if path.name != PICKLED_INDEX and path.is_file():
            shutil.copyfile(path, part / path.name)
            _sync(part / path.name)
    return Converted(files=len(shards), tensors=len(placed), num_bytes=total)


def _write_shard(shard: Path, names: set[str] | None, file: Path) -> dict[str, int]:
    """One pickled file as one safetensors file; the bytes of each tensor. `names` are those the index places in it."""
    tensors = _read(shard)
    if names is not None and names != tensors.keys():
        name = min(names ^ tensors.keys())
        has, places = ("lacks", "places") if name in names else ("holds", "does not place")
        raise ModelError(f"{shard} {has} tensor {_quoted(name)}, which {PICKLED_INDEX} {places} there; download both again")
    try:
        save_file(_apart(tensors), file, metadata={"format": "pt"})
        with safe_open(file, framework="pt"):  # refuses a header that the names have spoilt
            pass
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:  # a name or a dtype that the format does not have
        raise ModelError(f"{shard} cannot be written as safetensors: {_first_line(error)}") from error
    _sync(file)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _read(shard: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, in memory that is mapped from it."""
    _refuse_damaged(shard)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(shard, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what goes wrong is the file's choice
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {_quoted(asked[1])}" if asked else "its pickle cannot be read as data"
        raise ModelError(f"{shard} is refused: {reason}; expected a dictionary of tensors and nothing else") from error
    if not isinstance(loaded, dict) or not loaded:
        what = "an empty dictionary" if loaded == {} else f"a {type(loaded).__name__}"
        raise ModelError(f"{shard} holds {what}; expected a dictionary of tensors and nothing else")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelError(f"{shard} holds {_quoted(name)}, a {type(value).__name__}; expected tensors by name and nothing else")
        if value.layout is not torch.strided or value.is_meta or value.is_quantized or value.is_conj() or value.is_neg():
            raise ModelError(f"{shard}: tensor {_quoted(name)} is not stored number by number; expected plain tensors")
    need, have = sum(value.nbytes for value in loaded.values()), shard.stat().st_size
    if need > MOST_SHARED * have:
        raise ModelError(f"{shard} has {have} bytes and its tensors would take {need}; expected at most {MOST_SHARED} times that")
    return loaded


def _refuse_damaged(shard: Path) -> None:
    """Raise ModelError unless every part of the archive is whole. Mapped bytes are taken as they lie: nobody else would look."""
    try:
        with zipfile.ZipFile(shard) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            summed = any(entry.CRC for entry in entries)  # PyTorch can leave the checksums out, all of them
            damaged = packed[0] if packed else archive.testzip() if summed else None
    except Exception as error:  # zipfile raises half a dozen types
        raise ModelError(f"{shard} is cut short, damaged, or older than PyTorch 1.6: {_first_line(error)}") from error
    if damaged is not None:
        wrong = "compressed, which torch.save never does" if packed else "damaged; download it again"
        raise ModelError(f"{shard}: its part {_quoted(damaged)} is {wrong}")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, each contiguous in memory of its own, as safetensors asks; what is so already is not copied."""
    taken: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous() if memory not in taken else tensor.clone(memory_format=torch.contiguous_format)
        taken.add(memory)
    return apart


@contextmanager
def _made(part: Path) -> Iterator[None]:
    """A new directory for the time of the block; it goes where the block fails."""
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise ModelError(f"{part} is there: a conversion under way, or the rest of one that was killed; in that case remove "
                         "it") from None  # fmt: skip
    try:
        yield
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Put a file, or a directory's names, on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _quoted(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else text[:77] + "..."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
