"""Whether a model is right as often as it is sure."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import DataError


class Calibration:
    """Accumulates the expected calibration error of next-token predictions over batches of any size.

    Each position has a confidence, the highest probability, and is right if that token is the one in the
    text. With B bins of equal width over the confidence, n_b positions in bin b, their mean confidence c_b
    and the share a_b of them that are right,

        ECE = sum_b n_b / n |a_b - c_b|,

    0 to 1; 0 for a model that is right in 80 % of the places where it says 80 %.

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", equation 5, with its 15 bins.

    Example:
        >>> calibration = Calibration()
        >>> calibration.update(logits, labels)  # [N, V], [N]
        >>> calibration.error()
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self._sums = torch.zeros(3, bins, dtype=torch.float64)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add positions.

        Args:
            logits: [N, V], any floating type.
            labels: [N], the tokens of the text.
        """
        confidence, token = logits.float().softmax(-1).max(-1)
        confidence = confidence.double()
        index = (confidence * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, (token == labels).double()])
        sums = torch.zeros(3, self.bins, dtype=torch.float64, device=values.device)
        self._sums += sums.index_add_(1, index, values).cpu()

    def error(self) -> float:
        """The expected calibration error so far.

        Raises:
            DataError: no position was added.
        """
        count, confidence, right = self._sums
        if count.sum() == 0:
            raise DataError("calibration: there are no response positions to look at.")
        return float((right - confidence).abs().sum() / count.sum())
