"""Other libraries at the same decoding: branches on one prompt, each with its own tokens (extra `peers`).

An adapter takes a checkpoint with random weights, a directory for what it makes of it, the prompt's ids, the number of branches and
of new tokens, and whether weights are to be of 8 bits instead of 16; it returns what does the decoding. Where its library is not
installed, or cannot run here, it raises Missing, and the table says so.
"""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import torch

from tts_engine.models.tokenizer import load_tokenizer
from tts_engine.models.weights import Checkpoint
from tts_engine.sampling import Sampling, sample

Decode = Callable[[], object]


class Missing(Exception):
    """Why a peer is not in the race."""


def llama_cpp(checkpoint: Checkpoint, directory: Path, prompt: Sequence[int], branches: int, new: int, small: bool) -> Decode:
    """llama.cpp with its own forking: the prompt is read once, its cells are given to every sequence, one token each a call."""
    library = _imported("llama_cpp")
    path = gguf_of(checkpoint, directory, small)
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise Missing("llama.cpp cannot read the file that was written for it")
    settings = library.llama_context_default_params()
    settings.n_ctx = len(prompt) + branches * (new + 1)
    settings.n_batch = settings.n_ubatch = max(len(prompt), branches)
    settings.n_seq_max, settings.kv_unified = branches, True
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = library.llama_init_from_model(model, settings)
    memory, size = library.llama_get_memory(context), checkpoint.spec.vocab_size
    batch = library.llama_batch_init(settings.n_batch, 0, 1)

    def feed(tokens: Sequence[int], places: Sequence[int], sequences: Sequence[int], read: Sequence[bool]) -> torch.Tensor:
        batch.n_tokens = len(tokens)
        for i, (token, place, sequence, is_read) in enumerate(zip(tokens, places, sequences, read, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, is_read
        assert library.llama_decode(context, batch) == 0, "llama_decode failed"
        pointers = (library.llama_get_logits_ith(context, i) for i, is_read in enumerate(read) if is_read)
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(pointer, (size,)) for pointer in pointers]))

    rows, keys = np.arange(branches), np.zeros((branches, 2), np.uint32)
    places = count()

    def draw(logits: torch.Tensor) -> list[int]:
        """With our sampling, for PyTorch's would take as long as the rest."""
        return sample(logits, rows, Sampling(temperature=1.0), keys, rows, np.full(branches, next(places))).tolist()

    last = len(prompt) - 1
    first = feed(prompt, range(len(prompt)), [0] * len(prompt), [i == last for i in range(len(prompt))]).expand(branches, -1)

    def run() -> None:
        for sequence in range(branches):
            library.llama_memory_seq_rm(memory, sequence, len(prompt), -1)
            if sequence:
                library.llama_memory_seq_cp(memory, 0, sequence, 0, len(prompt))
        tokens = draw(first)
        for drawn in range(new - 1):
            tokens = draw(feed(tokens, [len(prompt) + drawn] * branches, range(branches), [True] * branches))

    return run


def openvino(checkpoint: Checkpoint, directory: Path, prompt: Sequence[int], branches: int, new: int, small: bool) -> Decode:
    """OpenVINO GenAI's continuous batching; its prefix cache keeps the prompt, and branches share its blocks."""
    library, runtime = _imported("openvino_genai"), _imported("openvino")
    path, schedule, config = gguf_of(checkpoint, directory, small), library.SchedulerConfig(), library.GenerationConfig()
    schedule.cache_size, schedule.enable_prefix_caching = 1, True  # GB
    config.max_new_tokens = config.min_new_tokens = new
    config.do_sample, config.num_return_sequences, config.ignore_eos = True, branches, True
    config.temperature, config.top_k, config.top_p = 1.0, checkpoint.spec.vocab_size, 1.0
    try:
        pipeline = library.LLMPipeline(str(path), "CPU", scheduler_config=schedule, INFERENCE_NUM_THREADS=torch.get_num_threads())
    except RuntimeError as error:
        raise Missing(f"OpenVINO GenAI: {str(error).splitlines()[0]}") from error
    ids = runtime.Tensor(np.array([prompt], np.int64))
    return lambda: pipeline.generate(ids, config)


def vllm(checkpoint: Checkpoint, directory: Path, prompt: Sequence[int], branches: int, new: int, small: bool) -> Decode:
    """vLLM with weights of its own making; its prefix cache keeps the prompt."""
    library = _imported("vllm")
    if small:
        raise Missing("vLLM makes no random weights of 8 bits")
    try:
        model = library.LLM(str(checkpoint.directory), load_format="dummy", dtype="bfloat16", max_num_seqs=branches,
                            skip_tokenizer_init=True, max_model_len=len(prompt) + new)  # fmt: skip
    except Exception as error:  # it has a dozen ways to say that there is no device for it
        raise Missing(f"vLLM does not run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    sampling = library.SamplingParams(n=branches, temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
    return lambda: model.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)


PEERS = {"llama.cpp": llama_cpp, "OpenVINO GenAI": openvino, "vLLM": vllm}


def gguf_of(checkpoint: Checkpoint, directory: Path, small: bool) -> Path:
    """The checkpoint as a GGUF file with its tokenizer, its matrices of 16-bit floats, or in small blocks of bytes with a scale."""
    gguf = _imported("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0 if small else gguf.GGMLQuantizationType.F16
    path, spec, config = Path(directory) / f"{kind.name}.gguf", checkpoint.spec, checkpoint.config
    if path.exists():
        return path
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if small else gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, gguf, checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, spec.num_layers)
    for name, shape in spec.tensor_shapes.items():
        tensor = torch.empty(shape)
        checkpoint.read_into(name, tensor)
        own = kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quantize(tensor.numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, gguf, checkpoint: Checkpoint) -> None:
    """The made-up tokenizer, filled up to the model's vocabulary: no text is compared, but a model is not read without one."""
    tokenizer, kinds = load_tokenizer(checkpoint.directory), gguf.TokenType
    known = {id: piece for piece, id in tokenizer.get_vocab().items()}
    special = dict.fromkeys(tokenizer.all_special_ids, kinds.CONTROL)
    types = dict.fromkeys(known, kinds.NORMAL) | special
    ids = range(checkpoint.spec.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([known.get(id, f"[PAD{id}]") for id in ids])
    writer.add_token_types([types.get(id, kinds.UNUSED) for id in ids])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)


def _imported(name: str):
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(f"{error.name or name} is not installed") from error
