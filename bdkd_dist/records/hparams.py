"""A trial's row in TensorBoard's HParams tab."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdkd_dist.engine.observer import Observer
from bdkd_dist.files import atomic_write
from bdkd_dist.records.tensorboard import EVENT_FILE

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

BEGUN, ENDED = f"{EVENT_FILE}{0:010d}.hparams", ".hparams-end"
"""Files of their own: one sorts before the curves', the other after them."""


class HParams(Observer):
    """Writes what a trial tried into ``<run>/tensorboard``, at its beginning, and how it ended.

    Args:
        run: The run folder.
        values: By name.
        metrics: Tags of the scalars that stand beside them.
    """

    def __init__(self, run: Path, values: Mapping[str, Any], metrics: tuple[str, ...]):
        self.folder, self.metrics = run / "tensorboard", metrics
        self.values = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()}

    def start(self, step: int, total_steps: int) -> None:
        """See :meth:`Observer.start`; what ended before goes on."""
        for ended in self.folder.glob(f"*{ENDED}"):
            ended.unlink()
        self._begin()

    def end(self, failed: bool = False) -> None:
        """Say that the trial has ended, perhaps before it began."""
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        self._begin()
        *_, ended = self._summaries()
        if failed:
            plugin = ended.value[0].metadata.plugin_data
            data = HParamsPluginData.FromString(plugin.content)
            data.session_end_info.status = Status.Value("STATUS_FAILURE")
            plugin.content = data.SerializeToString()
        _write(self.folder / f"{EVENT_FILE}{int(time.time()):010d}{ENDED}", ended)

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / BEGUN).exists():
            experiment, begun, _ = self._summaries()
            _write(self.folder / BEGUN, experiment, begun)

    def _summaries(self) -> "tuple[Summary, Summary, Summary]":
        """Return what describes the experiment, the beginning and the end of this part of it."""
        from torch.utils.tensorboard.summary import hparams

        return hparams(self.values, dict.fromkeys(self.metrics, 0.0))


def _write(path: Path, *summaries: "Summary") -> None:
    """Write an event file of its own, whole or not at all."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    content, now = io.BytesIO(), time.time()
    writer = RecordWriter(content)
    writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for summary in summaries:
        writer.write(Event(wall_time=now, summary=summary).SerializeToString())
    atomic_write(path, content.getvalue())
