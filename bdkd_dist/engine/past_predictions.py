"""What each network said of each training sample when it last saw it, for objectives that learn from it."""

import torch
from torch import Tensor

from bdkd_dist import distributed
from bdkd_dist.errors import UserError

MAX_BYTES = 4 * 2**30


class PastPredictions:
    """Probabilities by network and sample, on the device; zeros where a sample has not been seen.

    A rank writes the samples that it trains on, each once an epoch; :meth:`exchange` brings the ranks together. Rows
    are read and written in place and without a look at any value, so that a step may be compiled or recorded.

    Args:
        networks: How many.
        samples: How many rows, one a sample index.
        num_classes: K.
        device: Where the steps run.

    Raises:
        UserError: It would be larger than :data:`MAX_BYTES`.
    """

    def __init__(self, networks: int, samples: int, num_classes: int, device: torch.device):
        if (size := 4 * networks * samples * num_classes) > MAX_BYTES:
            raise UserError(
                f"objective ps_kd would keep {networks} × {samples:,} × {num_classes:,} past predictions, "
                f"{size / 2**30:.1f} GiB (allowed: {MAX_BYTES / 2**30:.0f} GiB); choose another objective.name"
            )
        self.probabilities = torch.zeros(networks, samples, num_classes, device=device)
        self._written = torch.zeros(samples, dtype=torch.bool, device=device)

    def of(self, indices: Tensor) -> Tensor:
        """Return the (M, B, K) probabilities of (B,) sample indices."""
        return self.probabilities[:, indices]

    def remember(self, indices: Tensor, logits: Tensor) -> None:
        """Keep the softmax of (M, B, K) logits for (B,) sample indices."""
        self.probabilities[:, indices] = logits.detach().float().softmax(2)
        self._written[indices] = True

    def exchange(self) -> None:
        """Give every rank what the others have written since the last time; all ranks call it between two steps."""
        if distributed.world_size() == 1:
            return
        mine = torch.where(self._written[:, None], self.probabilities, 0.0)
        written = distributed.sum_(self._written.float()) > 0
        self.probabilities.copy_(torch.where(written[:, None], distributed.sum_(mine), self.probabilities))
        self._written.zero_()

    def load(self, probabilities: Tensor) -> None:
        """Take over what a checkpoint holds, in place."""
        self.probabilities.copy_(probabilities)
        self._written.zero_()
