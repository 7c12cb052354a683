"""Progressive resizing: a compiled step is compiled for any size, not for every size."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainer import Noise, trainer

from bdkd_dist.data.loader import Batch


class Growing(Noise):
    """Images of 64, 72 and then 80 px."""

    def batches(self, epoch: int, index_batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        for batch in super().batches(epoch, index_batches):
            yield batch._replace(images=batch.images.repeat(1, 8 + min(epoch, 2), 8 + min(epoch, 2), 1))


@pytest.mark.slow
def test_a_compiled_step_is_not_compiled_again_at_every_size(tmp_path: Path) -> None:
    torch._dynamo.reset()
    resize = "data.resize={start_px: 64, end_px: 80, to_epoch: 2, multiple_px: 8}"
    made = trainer(tmp_path, "train.epochs=4", "train.compile=true", "train.evaluate_every_epochs=4", resize)
    made.loaders = {"train": Growing(), "validation": Noise()}
    graphs: list[int] = []
    end_epoch = made._end_epoch
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    made._end_epoch = lambda: (graphs.append(stats["unique_graphs"] - before), end_epoch())  # type: ignore[method-assign]
    made.run()
    assert graphs == 4 * [1]
