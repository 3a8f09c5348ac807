"""From a checkpoint, in a local directory or on the hub, to a Decoder. safetensors only: no pickle, no remote code.

Tensors go from the file straight to their place in the fused matrices, quantised on the way where they are, in bounded blocks, so
that loading takes little more memory than the weights themselves. Without weights, a config.json is enough: RandomCheckpoint makes
them up.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from .decoder import Decoder, DecoderWeights, LayerWeights
from .linear import FP8, Fp8, Int8, Linear, Plain, Table, Widened, activations, float_form, quantise, quantise_fp8
from .spec import DecoderSpec

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HUB_WEIGHTS = ["*.safetensors"]
STORED = ("F32", "F16", "BF16")  # what a conversion to the wanted dtype is meaningful for; others need scales
BLOCK_BYTES = 16 << 20
QUANTISED_ENTRIES = {"cpu": 1 << 17, "cuda": 1 << 24}  # made bytes at a time, from float32, by kind of device
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def resolve_checkpoint(name: str | Path, load: str = "weights") -> Path:
    """A local directory as it is; a hub id ("owner/name") as the directory of its snapshot, downloaded where it is not cached.

    Weights are downloaded only to be loaded. HF_HUB_OFFLINE and the hub's other settings hold. Raises ModelError when there is
    neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ModelError(f"{name} is neither a directory nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES + (HUB_WEIGHTS if load == "weights" else [])))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(f"{name} is no local directory, not in the hub's cache, and the hub cannot be reached (or HF_HUB_OFFLINE "
                         "is set)") from error  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(f"{name} is no local directory and could not be fetched from the hub: {_first_line(error)}") from error


def load_decoder(source: "Path | Checkpoint", *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                 deterministic: bool = False) -> Decoder:  # fmt: skip
    """The decoder of a checkpoint or its directory, in `dtype` on `device`. ModelError, naming the file, for anything amiss.

    torch.int8, on a CPU only: all matrices that are multiplied with are W8A8. torch.float8_e4m3fn: those of the layers are, but not
    the lm_head: what is drawn hangs on it, and the kernel that draws reads floats. All else is of linear.activations.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    with torch.inference_mode():
        weights = _Loading(checkpoint, dtype, device, deterministic).weights()
    return Decoder(checkpoint.spec, weights, deterministic=deterministic)


def weight_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """What load_decoder leaves in memory, about: a PRM's own head is not counted."""
    if dtype not in (torch.int8, FP8):
        return spec.num_parameters * dtype.itemsize
    form, others = (Int8, (EMBEDDING,)) if dtype == torch.int8 else (Fp8, (EMBEDDING, LM_HEAD))
    matrices = [shape for name, shape in spec.tensor_shapes.items() if len(shape) == 2 and name not in others]
    rest = spec.num_parameters - sum(rows * columns for rows, columns in matrices)
    if spec.tied and form is Int8:
        matrices.append((spec.vocab_size, spec.hidden_size))
    return sum(rows * (columns + form.BYTES_PER_ROW) for rows, columns in matrices) + rest * activations(dtype).itemsize


class Checkpoint:
    """A directory's config and its tensors by name, read on demand."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if there is no readable config.json or no complete set of safetensors files."""
        self._open_config(directory)
        self._files = self._find_tensors()

    def _open_config(self, directory: Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ModelError(f"{self.directory} is not a directory; expected one with {CONFIG}")
        self.config = read_json(self.directory / CONFIG)

    @cached_property
    def spec(self) -> DecoderSpec:
        """Raises ModelError where the config is of no decoder that can be run."""
        return DecoderSpec.from_hf(self.config, str(self.directory / CONFIG))

    @property
    def tensor_names(self) -> list[str] | None:
        """All there are; None where any tensor can be had."""
        return list(self._files)

    def read_into(self, name: str, destination: Tensor, *, start: int = 0, total: int | None = None) -> None:
        """Fill `destination` with the tensor `name`, converted to its dtype; with `total`, with those of its so many rows that
        begin at `start`. Raises ModelError: missing, misshapen, damaged."""
        shape = [len(destination) if total is None else total, *destination.shape[1:]]
        if name not in self._files:
            raise ModelError(f"{self.directory} has no tensor {name!r}; expected one of shape {shape}")
        path = self._files[name]
        with _opened(path) as file:
            if name not in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                raise ModelError(f"{path} has no tensor {name!r}, which {INDEX} places there")
            stored = file.get_slice(name)
            if stored.get_shape() != shape:
                raise ModelError(f"{path}: tensor {name!r} has shape {stored.get_shape()}, expected {shape}")
            if stored.get_dtype() not in STORED:
                raise ModelError(f"{path}: tensor {name!r} is stored as {stored.get_dtype()}, expected one of {', '.join(STORED)}")
        rows = max(1, BLOCK_BYTES * len(destination) // destination.nbytes)
        for block in destination.split(rows):
            # The file is mapped into memory, and what was read of it counts as ours until it is closed: open it anew per block.
            with _opened(path) as file:
                block.copy_(file.get_slice(name)[start : start + len(block)])
            start += len(block)

    def _find_tensors(self) -> dict[str, Path]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            return self._read_index(index)
        if not single.is_file():
            pickles = sorted(p.name for p in self.directory.glob("*.bin"))
            found = f"only {pickles[0]}, a pickle file: rewrite it with tts-engine convert" if pickles else "neither is there"
            raise ModelError(f"{self.directory}: expected {SINGLE} or {INDEX}; {found}")
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)

    def _read_index(self, index: Path) -> dict[str, Path]:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
            raise ModelError(f'{index}: expected an object "weight_map" from tensor names to file names')
        for shard in sorted(set(names.values())):
            if Path(shard).name != shard:
                raise ModelError(f"{index} lists the file {shard!r}; expected a plain name within {self.directory}")
            if not (self.directory / shard).is_file():
                raise ModelError(f"{index} lists {shard}, which is not in {self.directory}; download it again")
        return {name: self.directory / shard for name, shard in names.items()}


class RandomCheckpoint(Checkpoint):
    """A directory's config with weights made up where they are wanted, for runs whose text does not matter.

    A tensor's values hang on its name, shape, dtype and kind of device alone, and on the row that is asked for first. Norms are 1,
    biases 0, and a matrix's entries normal with variance 1 / columns, so that what goes through it keeps its size.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if there is no readable config.json."""
        self._open_config(directory)

    @property
    def tensor_names(self) -> None:
        return None

    def read_into(self, name: str, destination: Tensor, *, start: int = 0, total: int | None = None) -> None:
        if destination.dim() == 1:
            destination.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        place = f"{name} {start}" if start else name
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little", signed=True)
        random = torch.Generator(destination.device).manual_seed(seed)
        destination.normal_(std=destination.shape[1] ** -0.5, generator=random)


SOURCES = {"weights": Checkpoint, "random": RandomCheckpoint}  # by EngineConfig.load


class _Loading:
    """One reading of a checkpoint, of every tensor that its spec names once."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str, deterministic: bool) -> None:
        self.checkpoint, self.spec, self.device, self.deterministic = checkpoint, checkpoint.spec, device, deterministic
        self.dtype, self.wide = dtype, activations(dtype)
        self.shapes = self.spec.tensor_shapes
        self.desk = torch.empty(0, dtype=torch.uint8)

    def weights(self) -> DecoderWeights:
        # The largest matrices first, while there is room beside them for what they are made from.
        embedding, lm_head = self.vocabulary()
        self.desk = torch.empty(0, dtype=torch.uint8)
        layers = [self.layer(i) for i in range(self.spec.num_layers)]
        norm = self.read("model.norm.weight")
        assert not self.shapes, f"nothing reads {', '.join(self.shapes)}"

        def head_row(token: int) -> Tensor:
            if self.spec.tied:
                return embedding.rows(torch.tensor([token], device=self.device))[0]
            row = torch.empty(1, self.spec.hidden_size, dtype=self.wide, device=self.device)
            self.checkpoint.read_into(LM_HEAD, row, start=token, total=self.spec.vocab_size)
            return row[0]

        return DecoderWeights(embedding=embedding, layers=layers, norm=norm, lm_head=lm_head,
                              head_row=head_row if self.spec.lm_head else None)  # fmt: skip

    def layer(self, i: int) -> LayerWeights:
        spec, at = self.spec, f"model.layers.{i}."
        attention, mlp = at + "self_attn.", at + "mlp."
        parts = ("q", "kv") if i == spec.num_layers - 1 else ("qkv",)
        return LayerWeights(
            attention_norm=self.read(at + "input_layernorm.weight"),
            heads=tuple(self.linear(*(f"{attention}{head}_proj" for head in part), bias=spec.qkv_bias) for part in parts),
            qk_norm=torch.cat((self.read(attention + "q_norm.weight").expand(spec.num_heads, -1),
                               self.read(attention + "k_norm.weight").expand(spec.num_kv_heads, -1))) if spec.qk_norm else None,
            out=self.linear(attention + "o_proj"),
            mlp_norm=self.read(at + "post_attention_layernorm.weight"),
            gate_up=self.linear(mlp + "gate_proj", mlp + "up_proj"),
            down=self.linear(mlp + "down_proj"),
        )  # fmt: skip

    def vocabulary(self) -> tuple[Table, Linear | None]:
        """The embedding and the lm_head. Where tied they are one matrix, but for bytes: these are half of the embedding again, for
        a product several times as fast. In oneDNN's order, in which no row is found again, it would be all of it, for a product a
        tenth to a third faster."""
        spec, embedding = self.spec, self.read(EMBEDDING)
        if spec.lm_head and self.dtype == FP8:
            return Plain(embedding), Plain(embedding if spec.tied else self.read(LM_HEAD))
        if not (spec.lm_head and spec.tied):
            return Plain(embedding), self.linear("lm_head") if spec.lm_head else None
        if self.dtype != torch.int8:
            form = Widened if self.form(embedding.numel()) is Widened else Plain
            with self.room():
                both = form(embedding)
            return both, both
        blocks = (rows.to(torch.float32, copy=True) for rows in embedding.split(self.rows_at_a_time(spec.hidden_size)))
        return Plain(embedding), self.quantised(spec.vocab_size, spec.hidden_size, blocks)

    def linear(self, *names: str, bias: bool = False) -> Linear:
        """The named modules as one matrix, stacked along dimension 0."""
        added = self.read(*(f"{name}.bias" for name in names)) if bias else None
        weights = [f"{name}.weight" for name in names]
        rows, columns = sum(self.shapes[name][0] for name in weights), self.shapes[weights[0]][1]
        if self.dtype == torch.int8:
            return self.quantised(rows, columns, self.blocks(*weights), added)
        if self.dtype == FP8:
            return self.fp8(rows, columns, self.blocks(*weights), added)
        form = self.form(rows * columns)
        if form is Plain:
            return Plain(self.read(*weights), added)
        weight = self.read(*weights, place=self.laid_out(rows, columns))
        with self.room():
            return form(weight, added)

    def form(self, entries: int) -> type:
        return float_form(entries, self.dtype, self.device, deterministic=self.deterministic)

    def quantised(self, rows: int, columns: int, blocks: Iterator[Tensor], bias: Tensor | None = None) -> Linear:
        """blocks: float32, the rows in their order."""
        weight, scales, sums = self.laid_out(rows, columns), torch.empty(rows), torch.empty(rows)
        start = 0
        for block in blocks:
            end = start + len(block)
            quantise(block, weight[start:end], scales[start:end], sums[start:end])
            start = end
        with self.room():
            return Int8(weight, scales, sums, bias)

    def fp8(self, rows: int, columns: int, blocks: Iterator[Tensor], bias: Tensor | None) -> Linear:
        """blocks: float32, the rows in their order."""
        with self.room():
            weight = torch.empty(rows, columns, dtype=FP8, device=self.device)
            scales = torch.empty(rows, device=self.device)
        start = 0
        for block in blocks:
            end = start + len(block)
            quantise_fp8(block, weight[start:end], scales[start:end])
            start = end
        return Fp8(weight, scales, bias)

    def laid_out(self, rows: int, columns: int) -> Tensor:
        """Where a matrix is put together before it is reordered: the same memory for all of the layers', so that none leaves a
        hole behind."""
        spec, size = self.spec, rows * columns * self.dtype.itemsize
        widest = max(2 * spec.intermediate_size, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
        if self.desk.nbytes < size:
            with self.room():
                self.desk = torch.empty(max(size, widest * spec.hidden_size * self.dtype.itemsize), dtype=torch.uint8)
        return self.desk[:size].view(self.dtype).view(rows, columns)

    def blocks(self, *names: str) -> Iterator[Tensor]:
        """The rows of the named tensors, float32, a few at a time."""
        for name in names:
            total, columns = self.shapes.pop(name)
            step = self.rows_at_a_time(columns)
            for start in range(0, total, step):
                block = torch.empty(min(step, total - start), columns, device=self.device)
                self.checkpoint.read_into(name, block, start=start, total=total)
                yield block

    def rows_at_a_time(self, columns: int) -> int:
        return max(1, QUANTISED_ENTRIES[torch.device(self.device).type] // columns)

    def read(self, *names: str, place: Tensor | None = None) -> Tensor:
        """One tensor of the named ones, stacked along dimension 0; in that place, or one of its own."""
        parts = [self.shapes.pop(name) for name in names]
        rows = [part[0] for part in parts]
        if place is None:
            with self.room():
                place = torch.empty(sum(rows), *parts[0][1:], dtype=self.wide, device=self.device)
        for name, part in zip(names, place.split(rows), strict=True):
            self.checkpoint.read_into(name, part)
        return place

    @contextmanager
    def room(self) -> Iterator[None]:
        """Where memory is asked for."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            size = weight_bytes(self.spec, self.dtype)
            raise ModelError(f"{self.checkpoint.directory}: its weights, {size} bytes in all, cannot be held on {self.device}: "
                             f"{_first_line(error)}") from error  # fmt: skip


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short ({_first_line(error)}); expected a complete safetensors file") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file. Raises ModelError where there is none."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; expected a Hugging Face checkpoint directory with it") from None
    except RecursionError:
        raise ModelError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
