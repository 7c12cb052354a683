"""What a person sees while a run goes on: a live bar on a terminal, plain lines in a log file."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from bdkd_dist.engine.observer import EvalLog, Observer, StepLog
from bdkd_dist.records.printing import print_line

PLAIN_EVERY_S = 10.0
"""Plain lines about steps come at most this often; evaluations always have one."""


class Progress(Observer):
    """Shows epoch, speed, losses, the last validation and the time left.

    Args:
        epochs: Of the whole run.
        console: Where to.
    """

    def __init__(self, epochs: int, console: Console):
        self.epochs = epochs
        self.console = console
        self._live: Live | None = None
        self._next_line_s = 0.0
        self._losses = self._evaluation = ""

    def start(self, step: int, total_steps: int) -> None:
        """See :meth:`Observer.start`; may come again when workers were restarted."""
        self.close()
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed:,}/{task.total:,}  {task.fields[speed]}"),
            console=self.console,
            expand=True,
        )
        epoch = min(self.epochs, 1 + step * self.epochs // max(1, total_steps))
        self._task = self._bar.add_task(f"epoch {epoch}/{self.epochs}", total=total_steps, completed=step, speed="")
        self._live = Live(self._shown(), console=self.console)
        self._live.start()

    def stepped(self, log: StepLog) -> None:
        """See :meth:`Observer.stepped`."""
        epoch = f"epoch {log.epoch + 1}/{self.epochs}"
        speed = f"{log.images_per_s:,.0f} images/s  {duration(log.remaining_s)} left"
        self._losses = "loss" + "".join(
            f" {tag.split('/')[1]} {value:.3f}" for tag, value in log.scalars.items() if tag.endswith("/loss")
        )
        if self._live is not None:
            self._bar.update(self._task, completed=log.step, description=epoch, speed=speed)
            self._live.update(self._shown())
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + PLAIN_EVERY_S
            print_line(self.console, f"{epoch}  step {log.step}/{log.total_steps}  {self._losses}  {speed}")

    def evaluated(self, log: EvalLog) -> None:
        """See :meth:`Observer.evaluated`."""
        parts = [
            f"{network} top-1 {diagnosis.metrics['top1']:.1%} ECE {diagnosis.metrics['ece']:.1%}".replace("%", " %")
            for network, diagnosis in sorted(log.networks.items())
        ]
        if self._live is not None:
            self._evaluation = f"val {parts[0]}"  # the student's: it comes first by name
            self._live.update(self._shown())
        else:
            print_line(self.console, "  ".join([f"epoch {log.epoch}/{self.epochs}  val", *parts]))

    def close(self) -> None:
        """See :meth:`Observer.close`; the bar stays as it last stood and the terminal is as before."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _shown(self) -> Group:
        details = "   ".join(filter(None, (self._losses, self._evaluation)))
        return Group(self._bar, Text(details, style="dim", no_wrap=True, overflow="ellipsis"))


def duration(seconds: float) -> str:
    """Return a time as a person says it: ``45 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
