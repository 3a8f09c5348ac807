"""What a PRM reads a score with: one hidden state in, a probability out. float32, and no vocabulary is ever multiplied through.

Always computed in tiles, or on a GPU by a kernel row by row: a score does not depend on which other scores are read with it. Hidden
states come normed, and of the tokens read alone, as the decoder computes its last layer for no others: to norm them here would save
one pass over so few rows, and every head would need a decoder's weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from .decoder import Decoder, in_tiles
from .weights import Checkpoint


class PairHead:
    """Softmax of two vocabulary entries, the first one's share: sigmoid(h . (w_plus - w_minus)), one dot product."""

    def __init__(self, plus_row: Tensor, minus_row: Tensor) -> None:
        """plus_row, minus_row: [d], rows of the lm_head or of the tied embedding."""
        self._difference = plus_row.float() - minus_row.float()

    @classmethod
    def of(cls, decoder: Decoder, *, plus_id: int, minus_id: int) -> "PairHead":
        """Raises ModelError where the model has no such tokens."""
        row, known = decoder.weights.head_row, decoder.spec.vocab_size
        assert row is not None, f"{decoder.spec.architecture} has no vocabulary head"
        if max(plus_id, minus_id) >= known:
            raise ModelError(f"a score is read from tokens {plus_id} and {minus_id}, and the model knows {known}: its "
                             "tokenizer is another's")  # fmt: skip
        return cls(row(plus_id), row(minus_id))

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [R, d] -> float32 [R]."""
        return _by_rows(self._difference, 0.0, hidden)


class TwoClassHead:
    """Linear, ReLU, Linear to (bad, good), softmax, the good one's share: Qwen2.5-Math-PRM's `score` module."""

    def __init__(self, weight_0: Tensor, bias_0: Tensor, weight_2: Tensor, bias_2: Tensor) -> None:
        """weight_0 [d, d], bias_0 [d], weight_2 [2, d], bias_2 [2]."""
        self._weight, self._bias = weight_0.float(), bias_0.float()
        # The softmax of two is the sigmoid of their difference: the two rows fold into one.
        self._difference, self._offset = weight_2[1].float() - weight_2[0].float(), float(bias_2[1].float() - bias_2[0].float())

    @classmethod
    def load(cls, checkpoint: Checkpoint, hidden_size: int, *, hidden: str = "score.0", out: str = "score.2",
             device: torch.device | str = "cpu") -> "TwoClassHead":  # fmt: skip
        """Read the layers named `hidden` and `out`. Raises ModelError where they are missing or misshapen."""
        d = hidden_size
        return cls(*_read_linear(checkpoint, hidden, d, d, device), *_read_linear(checkpoint, out, 2, d, device))

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [R, d] -> float32 [R]."""
        (scores,) = in_tiles(self._read, self._weight, hidden)
        return scores

    def _read(self, weight: Tensor, hidden: Tensor) -> tuple[Tensor]:
        inner = F.linear(hidden.float(), weight, self._bias)
        if inner.is_cuda:
            return (_on_gpu(self._difference, self._offset, inner, relu=True),)
        return (_share(self._difference, self._offset, inner.relu()),)


class ValueHead:
    """One linear unit and a sigmoid: TRL's value head, as Skywork's PRMs have it."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """weight [1, d], bias [1]."""
        self._weight, self._bias = weight[0].float(), float(bias[0])

    @classmethod
    def load(cls, checkpoint: Checkpoint, hidden_size: int, *, linear: str = "v_head.summary",
             device: torch.device | str = "cpu") -> "ValueHead":  # fmt: skip
        """Read the layer named `linear`. Raises ModelError where it is missing or misshapen."""
        return cls(*_read_linear(checkpoint, linear, 1, hidden_size, device))

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [R, d] -> float32 [R]."""
        return _by_rows(self._weight, self._bias, hidden)


def _by_rows(direction: Tensor, offset: float, hidden: Tensor) -> Tensor:
    """sigmoid(h . direction + offset), float32 [R], for each row h of hidden [R, d]; direction float32 [d]."""
    if hidden.is_cuda:
        return _on_gpu(direction, offset, hidden)
    (scores,) = in_tiles(lambda weight, h: (_share(weight, offset, h),), direction, hidden)
    return scores


def _share(direction: Tensor, offset: float, hidden: Tensor) -> Tensor:
    return torch.sigmoid((hidden.float() * direction).sum(-1) + offset)


def _on_gpu(direction: Tensor, offset: float, hidden: Tensor, *, relu: bool = False) -> Tensor:
    """The same in one launch; with `relu` what is below 0 counts as 0."""
    from tts_kernels.prm_score import prm_score

    return prm_score(hidden, None, direction, offset=offset, relu=relu)


def _read_linear(checkpoint: Checkpoint, name: str, rows: int, columns: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """weight [rows, columns] and bias [rows] of a layer, float32."""
    weight = torch.empty(rows, columns, dtype=torch.float32, device=device)
    bias = torch.empty(rows, dtype=torch.float32, device=device)
    checkpoint.read_into(f"{name}.weight", weight)
    checkpoint.read_into(f"{name}.bias", bias)
    return weight, bias
