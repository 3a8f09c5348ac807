"""From a checkpoint, in a local directory or on the hub, to a Decoder. safetensors only: no pickle, no remote code.

Tensors go from the file straight to their place in the fused matrices, in bounded blocks, so that loading takes little more
memory than the weights themselves. Without weights, a config.json is enough: RandomCheckpoint makes them up.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ModelError
from .decoder import Decoder, DecoderWeights, LayerWeights
from .spec import DecoderSpec

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HUB_WEIGHTS = ["*.safetensors"]
STORED = ("F32", "F16", "BF16")  # what a conversion to the wanted dtype is meaningful for; others need scales
BLOCK_BYTES = 16 << 20


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
    """The decoder of a checkpoint or its directory, in `dtype` on `device`. ModelError, naming the file, for anything amiss."""
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    with torch.inference_mode():
        weights = _read_weights(checkpoint, checkpoint.spec, dtype, device)
    return Decoder(checkpoint.spec, weights, deterministic=deterministic)


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

    def read_into(self, name: str, destination: Tensor) -> None:
        """Fill `destination` with the tensor `name`, converted to its dtype. Raises ModelError: missing, misshapen, damaged."""
        if name not in self._files:
            raise ModelError(f"{self.directory} has no tensor {name!r}; expected one of shape {list(destination.shape)}")
        path, shape = self._files[name], list(destination.shape)
        with _opened(path) as file:
            if name not in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                raise ModelError(f"{path} has no tensor {name!r}, which {INDEX} places there")
            stored = file.get_slice(name)
            if stored.get_shape() != shape:
                raise ModelError(f"{path}: tensor {name!r} has shape {stored.get_shape()}, expected {shape}")
            if stored.get_dtype() not in STORED:
                raise ModelError(f"{path}: tensor {name!r} is stored as {stored.get_dtype()}, expected one of {', '.join(STORED)}")
        rows = max(1, BLOCK_BYTES * len(destination) // destination.nbytes)
        for start in range(0, len(destination), rows):
            # The file is mapped into memory, and what was read of it counts as ours until it is closed: open it anew per block.
            with _opened(path) as file:
                destination[start : start + rows].copy_(file.get_slice(name)[start : start + rows])

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

    A tensor's values hang on its name, shape, dtype and kind of device alone. Norms are 1, biases 0, and a matrix's entries normal
    with variance 1 / columns, so that what goes through it keeps its size.
    """

    def __init__(self, directory: Path) -> None:
        """Raises ModelError if there is no readable config.json."""
        self._open_config(directory)

    @property
    def tensor_names(self) -> None:
        return None

    def read_into(self, name: str, destination: Tensor) -> None:
        if destination.dim() == 1:
            destination.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
        random = torch.Generator(destination.device).manual_seed(seed)
        destination.normal_(std=destination.shape[1] ** -0.5, generator=random)


SOURCES = {"weights": Checkpoint, "random": RandomCheckpoint}  # by EngineConfig.load


def _read_weights(checkpoint: Checkpoint, spec: DecoderSpec, dtype: torch.dtype, device: torch.device | str) -> DecoderWeights:
    shapes = spec.tensor_shapes

    def read(*names: str) -> Tensor:
        """One tensor of the named ones, stacked along dimension 0."""
        parts = [shapes.pop(name) for name in names]
        rows = [part[0] for part in parts]
        try:
            whole = torch.empty(sum(rows), *parts[0][1:], dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            raise ModelError(f"{checkpoint.directory}: its weights, {spec.num_parameters * dtype.itemsize} bytes in all, cannot be "
                             f"held on {device}: {_first_line(error)}") from error  # fmt: skip
        for name, part in zip(names, whole.split(rows), strict=True):
            checkpoint.read_into(name, part)
        return whole

    def layer(i: int) -> LayerWeights:
        at = f"model.layers.{i}."
        attention, mlp = at + "self_attn.", at + "mlp."
        qkv = [f"{attention}{part}_proj" for part in "qkv"]
        return LayerWeights(
            attention_norm=read(at + "input_layernorm.weight"),
            qkv=read(*(f"{name}.weight" for name in qkv)),
            qkv_bias=read(*(f"{name}.bias" for name in qkv)) if spec.qkv_bias else None,
            qk_norm=torch.cat((read(attention + "q_norm.weight").expand(spec.num_heads, -1),
                               read(attention + "k_norm.weight").expand(spec.num_kv_heads, -1))) if spec.qk_norm else None,
            out=read(attention + "o_proj.weight"),
            mlp_norm=read(at + "post_attention_layernorm.weight"),
            gate_up=read(mlp + "gate_proj.weight", mlp + "up_proj.weight"),
            down=read(mlp + "down_proj.weight"),
        )  # fmt: skip

    embedding = read("model.embed_tokens.weight")
    layers = [layer(i) for i in range(spec.num_layers)]
    norm = read("model.norm.weight")
    lm_head = None
    if spec.lm_head:
        lm_head = embedding if spec.tied else read("lm_head.weight")
    assert not shapes, f"nothing reads {', '.join(shapes)}"
    return DecoderWeights(embedding=embedding, layers=layers, norm=norm, lm_head=lm_head)


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
