"""Test-time search with transformers alone, as a careful user of it writes the published loop.

Each round every branch that is to be expanded is read whole, from its text's ids, in one left-padded batch; the cache is then
repeated for its continuations, and all of them are decoded together until the last step of the round has closed, as `generate`
does: a row that is done is padded. The PRM then reads the whole path of every candidate, a few at a time, and computes its output
for every position of it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tts_engine.branch import Branch
from tts_engine.models.weights import Checkpoint
from tts_engine.prm.spec import PRMSpec, TokenPair, TwoClassHead

from .lockstep import Rows, Spent, path_ids

FEW = 4  # candidates that the PRM reads in one batch
Sampler = Callable[[Rows, Tensor], np.ndarray]  # the live rows' logits [R, V] -> their tokens


def language_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model with a checkpoint's weights, real or random ones."""
    config = AutoConfig.from_pretrained(checkpoint.directory)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            checkpoint.read_into(name, tensor)
    return model


def multinomial(rows: Rows, logits: Tensor) -> np.ndarray:
    """As `generate` samples."""
    return torch.multinomial((logits.float() / rows.temperature).softmax(-1), 1)[:, 0].numpy()


class TransformersPolicy:
    """Decodes with a DynamicCache; `sampler` may be `Rows.sample` where the tokens are to be ours."""

    def __init__(self, model: PreTrainedModel, sampler: Sampler = multinomial) -> None:
        self.model, self.sampler = model, sampler

    @torch.inference_mode()
    def write(self, rows: Rows, spent: Spent) -> None:
        parents = list(dict.fromkeys(rows.parents))
        ids, mask = _padded([path_ids(parent) for parent in parents], left=True)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, cache, spent)
        of_row = torch.tensor([parents.index(parent) for parent in rows.parents])
        cache.batch_select_indices(of_row)
        mask, logits = mask[of_row], logits[of_row]
        token = torch.zeros(len(of_row), 1, dtype=torch.int64)
        while True:
            tokens = self.sampler(rows, logits[torch.from_numpy(rows.live)])
            token[rows.live, 0] = torch.from_numpy(tokens)
            rows.take(tokens)
            if not len(rows.live):
                break
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            logits = self._forward(token, mask, cache, spent)
        spent.policy_kv_bytes = max(spent.policy_kv_bytes, cache_bytes(cache))

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache, spent: Spent) -> Tensor:
        """The logits [B, V] behind each row's newest token."""
        spent.policy_tokens += ids.numel()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        return out.logits[:, -1]


class TransformersPRM:
    """Reads whole paths, a few at a time, without a cache."""

    def __init__(self, model: PreTrainedModel, spec: PRMSpec, checkpoint: Checkpoint, few: int = FEW) -> None:
        self.model, self.spec, self.few = model, spec, few
        self.probabilities = probabilities(model, spec, checkpoint)

    @torch.inference_mode()
    def read(self, branches: Sequence[Branch], spent: Spent) -> list[list[float]]:
        scores = []
        for first in range(0, len(branches), self.few):
            some = branches[first : first + self.few]
            paths = [self.spec.render(branch.path[0].text, [step.text for step in branch.steps]) for branch in some]
            ids, mask = _padded([path for path, _ in paths], left=False)
            good = self.probabilities(ids, mask)
            scores += [row[at].tolist() for row, (_, at) in zip(good, paths, strict=True)]
            spent.prm_tokens += ids.numel()
        return scores


def probabilities(model: PreTrainedModel, spec: PRMSpec, checkpoint: Checkpoint) -> Callable[..., Tensor]:
    """(ids [B, T], mask, ...) -> the probability float32 [B, T] of "good" at every position, through all of the PRM's output."""
    read = spec.readout
    if isinstance(read, TokenPair):
        pair = [read.plus, read.minus]
        return lambda ids, mask, **how: (
            model(input_ids=ids, attention_mask=mask, **({"use_cache": False} | how)).logits[..., pair].float().softmax(-1)[..., 0]
        )
    assert isinstance(read, TwoClassHead), f"no loop for {spec.family}"
    width = model.config.hidden_size
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)).to(model.dtype)
    for layer, name in ((head[0], read.hidden), (head[2], read.out)):
        checkpoint.read_into(f"{name}.weight", layer.weight.data)
        checkpoint.read_into(f"{name}.bias", layer.bias.data)
    return lambda ids, mask, **how: (
        head(model.model(input_ids=ids, attention_mask=mask, **({"use_cache": False} | how)).last_hidden_state)
        .float()
        .softmax(-1)[..., 1]
    )


def cache_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _padded(paths: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B, T] and their mask [B, T], 0 where a path is padded."""
    width = max(map(len, paths))
    ids, mask = (torch.zeros(len(paths), width, dtype=torch.int64) for _ in range(2))
    for row, path in enumerate(paths):
        own = slice(width - len(path), width) if left else slice(len(path))
        ids[row, own], mask[row, own] = torch.tensor(path), 1
    return ids, mask
