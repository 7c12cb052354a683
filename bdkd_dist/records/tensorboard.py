"""TensorBoard event files that a resumed run continues: no reader sees a point twice.

``SummaryWriter(purge_step=…)`` only marks the restart, and readers that know nothing of the mark draw the repeated
steps twice. Here they are taken out of the files. The mark is written all the same, for a TensorBoard that is
running and holds the dropped points in memory.

Neither is ``SummaryWriter`` what writes them: the thread that it writes in ends for good at the disk's first refusal,
with what was recorded meanwhile.
"""

import os
import socket
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bdkd_dist.engine.observer import EvalLog, StepLog
from bdkd_dist.files import atomic_write, sync
from bdkd_dist.records.entropy_figure import entropy_figure
from bdkd_dist.records.figures import reliability_figure
from bdkd_dist.records.growing_file import GrowingFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary

EVENT_FILE = "events.out.tfevents."
RECORD_FRAME_BYTES = 16
"""Length and two checksums around each record (TFRecord)."""


class TensorBoardObserver:
    """Writes curves, reliability diagrams and the recipe to ``<run>/tensorboard``.

    Tags: those of :attr:`StepLog.scalars`, ``speed/images_per_s``, ``val/<network>/<metric>``,
    ``val/<network>/reliability`` and ``val/<student>/entropy_against_teacher``, and the text ``recipe``.

    Args:
        run: The run folder.
        recipe: The resolved recipe as YAML.
    """

    def __init__(self, run: Path, recipe: str):
        self.folder = run / "tensorboard"
        self.recipe = recipe
        self._file: GrowingFile | None = None
        self._recorded: set[tuple[str, int]] = set()

    def start(self, step: int, total_steps: int) -> None:
        """See :meth:`Observer.start`; drops the events after ``step`` from the files of an interrupted run."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard.summary import text

        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._recorded = forget_after(self.folder, step)
        _sort_before_now(self.folder)
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self._file = GrowingFile(self.folder / f"{EVENT_FILE}{name}")
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        if ("recipe/text_summary", 0) not in self._recorded:
            self._add(step=0, summary=text("recipe", f"```yaml\n{self.recipe}```"))
        self.flush()
        sync(self.folder)

    def stepped(self, log: StepLog) -> None:
        """See :meth:`Observer.stepped`."""
        for tag, value in log.scalars.items():
            self._add_scalar(tag, value, log.step)
        self._add_scalar("speed/images_per_s", log.images_per_s, log.step)

    def evaluated(self, log: EvalLog) -> None:
        """See :meth:`Observer.evaluated`.

        What was recorded at the very step that the run goes on from is not recorded again: a run that was stopped
        in its final evaluation repeats that.
        """
        for network, diagnosis in log.networks.items():
            for metric, value in diagnosis.metrics.items():
                tag = f"val/{network}/{metric}"
                if metric != "count" and (tag, log.step) not in self._recorded:
                    self._add_scalar(tag, value, log.step)
            tag = f"val/{network}/reliability"
            if (tag, log.step) not in self._recorded:
                self._add_figure(tag, reliability_figure({network: diagnosis}), log.step)
        for network, entropies in log.entropies.items():
            tag = f"val/{network}/entropy_against_teacher"
            if network != "teacher" and (tag, log.step) not in self._recorded:
                self._add_figure(tag, entropy_figure(entropies, log.entropies["teacher"], network), log.step)

    def flush(self) -> None:
        """See :meth:`Observer.flush`."""
        assert self._file is not None, "start() comes first"
        self._file.flush()

    def close(self) -> None:
        """See :meth:`Observer.close`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._add(step=step, summary=scalar(tag, value))

    def _add_figure(self, tag: str, figure: "Figure", step: int) -> None:
        from torch.utils.tensorboard.summary import image

        self._add(step=step, summary=image(tag, _pixels(figure), dataformats="HWC"))

    def _add(self, **fields: "int | str | Summary | SessionLog") -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None, "start() comes first"
        RecordWriter(self._file).write(Event(wall_time=time.time(), **fields).SerializeToString())


def event_files(folder: Path) -> list[Path]:
    """Return the folder's event files in the order in which TensorBoard reads them."""
    return sorted(folder.glob(f"{EVENT_FILE}*"))


def forget_after(folder: Path, step: int) -> set[tuple[str, int]]:
    """Drop all events later than ``step``, and a last record that a killed process left unfinished.

    Each file is replaced by its own shorter version, so a kill in between loses and doubles nothing: the next call
    goes on where this one was cut.

    Returns:
        The (tag, step) of the kept events of step 0 and of ``step``.
    """
    recorded: set[tuple[str, int]] = set()
    for path in event_files(folder):
        recorded |= _forget_in_file(path, step)
    return recorded


def _forget_in_file(path: Path, step: int) -> set[tuple[str, int]]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    content, at = path.read_bytes(), 0
    kept: list[bytes] = []
    recorded: set[tuple[str, int]] = set()
    has_points = False
    for record in RawEventFileLoader(str(path)).Load():  # ends quietly before a record that was cut off
        framed = content[at : at + len(record) + RECORD_FRAME_BYTES]
        at += len(framed)
        event = Event.FromString(record)
        if event.step > step:
            continue
        kept.append(framed)
        has_points |= event.HasField("summary")
        if event.step in (0, step):
            recorded |= {(value.tag, event.step) for value in event.summary.value}
    if not has_points:
        path.unlink()
    elif sum(map(len, kept)) != len(content):
        atomic_write(path, b"".join(kept))
    return recorded


def _sort_before_now(folder: Path) -> None:
    """Rename earlier files where a file made now would not sort after them.

    Readers go by name, which is second, host, process: a run that goes on within the second, or on a host whose clock
    is behind, would come first and its curves run backwards.
    """
    paths = event_files(folder)
    if paths and paths[-1].name >= f"{EVENT_FILE}{int(time.time()):010d}":
        for number, path in enumerate(paths):
            path.rename(folder / f"{EVENT_FILE}{number:010d}.earlier")


def _pixels(figure: "Figure") -> np.ndarray:
    """Return a figure as (H, W, 3) uint8, without pyplot and its global list of figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
