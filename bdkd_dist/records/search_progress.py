"""What a person sees while a search goes on: a live table on a terminal, plain lines in a log file."""

import time
from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.printing import print_line
from bdkd_dist.records.progress import duration
from bdkd_dist.records.search_tables import (
    chosen,
    epochs,
    figures,
    heads,
    network,
    ranked,
    varied,
)
from bdkd_dist.records.trials import Trial
from bdkd_dist.records.wording import label, metric_text, short_names, value_text

PLAIN_EVERY_S = 30.0
"""Plain lines about the whole search come at most this often; the end of a trial always has one."""
BEST = 8
"""Trials in the live table."""
GROUND = 2
"""Ended trials before which the time left is not guessed."""
STATUSES = ("running", "finished", "stopped", "failed")


class SearchProgress:
    """Shows how many trials there are of each kind, the best of them, the front so far and the time left.

    Args:
        console: Where to.
        goal: What trials are ranked by.
        num_trials: How many there will be.
    """

    def __init__(self, console: Console, goal: Goal, num_trials: int):
        self.console, self.goal, self.num_trials = console, goal, num_trials
        self._began_s = time.monotonic()
        self._work_before_s: float | None = None
        self._next_line_s = 0.0
        self._ended: dict[int, str] = {}
        self._trials: list[Trial] = []
        self._running, self._waiting = 0, ""
        self._live: Live | None = None

    def update(self, trials: Sequence[Trial], running: int, waiting: str = "") -> None:
        """Take note of how the search stands.

        Args:
            trials: All that have begun.
            running: How many are training at this moment.
            waiting: What the search waits for, in one line.
        """
        if self._work_before_s is None:
            self._work_before_s = sum(trial.wall_s for trial in trials)
        self._trials, self._running, self._waiting = list(trials), running, waiting
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            self._lines()
        elif self._live is None:
            self._live = Live(console=self.console, get_renderable=self._shown)
            self._live.start(refresh=True)
        else:
            self._live.refresh()

    def close(self) -> None:
        """Leave the table as it last stood and the terminal as it was before."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def remaining_s(self) -> float | None:
        """Guess the time left from the ended trials' mean length and the pace since this search began or went on.

        None before there is ground: no trials have ended since.
        """
        ended = [trial.wall_s for trial in self._trials if trial.status in ("finished", "stopped")]
        work_s = sum(trial.wall_s for trial in self._trials) - (self._work_before_s or 0.0)
        if len(ended) < GROUND or work_s <= 0:
            return None
        mean_s = sum(ended) / len(ended)
        under_way = sum(max(0.0, mean_s - trial.wall_s) for trial in self._trials if trial.status == "running")
        left_s = mean_s * max(0, self.num_trials - len(self._trials)) + under_way
        return left_s * (time.monotonic() - self._began_s) / work_s

    def _shown(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self._summary())]
        if self._waiting:
            parts.append(Text(self._waiting, style="yellow"))
        if any(trial.reports for trial in self._trials):
            parts.append(self._table())
        if front := self._front():
            parts.append(Text(front, overflow="ellipsis"))
        return Group(*parts)

    def _summary(self) -> str:
        counts = Counter(trial.status for trial in self._trials) | Counter(running=0)
        counts["running"] = self._running
        parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status] or status == "running"]
        plural = "s" * (self.num_trials != 1)
        passed = duration(time.monotonic() - self._began_s)
        text = f"{len(self._trials)} of {self.num_trials} trial{plural}: {', '.join(parts)}  {passed}"
        left_s = self.remaining_s()
        return f"{text}, {duration(left_s)} left" if left_s else text

    def _table(self) -> Table:
        shown, best = heads(self.goal), chosen(self._trials, self.goal)
        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1, 0, 0))
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("tried", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("epoch", justify="right", no_wrap=True)
        for head in shown.values():
            table.add_column(head.removeprefix(f"{network(self.goal)} "), justify="right", no_wrap=True)
        table.add_column("status", no_wrap=True)
        for trial in [trial for trial in ranked(self._trials, self.goal) if trial.reports][:BEST]:
            table.add_row(
                str(trial.number),
                self._tried(trial),
                str(epochs(trial)),
                *(metric_text(trial.metrics.get(name), name) for name in shown),
                trial.status,
                style="bold" if trial in best else "",
            )
        return table

    def _tried(self, trial: Trial) -> str:
        names = short_names(varied(self._trials))
        return "  ".join(f"{names[key]} {value_text(value)}" for key, value in trial.values.items())

    def _front(self) -> str:
        if not self.goal.is_pareto:
            return ""
        front = [
            f"trial {trial.number} "
            + " / ".join(metric_text(trial.metrics.get(name), name, unit=" %") for name in self.goal.names)
            for trial in chosen(self._trials, self.goal)
        ]
        names = " / ".join(label(name, unit="") for name in self.goal.names)
        # Lines break between trials, not within one.
        return "   ".join(part.replace(" ", "\u00a0") for part in [f"front so far, {names}:", *front]) if front else ""

    def _lines(self) -> None:
        for trial in self._trials:
            if trial.status == "running":
                self._ended.pop(trial.number, None)
            elif self._ended.get(trial.number) != trial.status:
                self._ended[trial.number] = trial.status
                print_line(self.console, self._ended_line(trial))
        if time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + PLAIN_EVERY_S
            parts = [self._summary()]
            if best := chosen(self._trials, self.goal):
                parts.append(f"best so far trial {best[0].number}: {figures(best[0].metrics, self.goal)}")
            print_line(self.console, "  ".join([*parts, *filter(None, [self._waiting])]))

    def _ended_line(self, trial: Trial) -> str:
        parts = [f"trial {trial.name} {trial.status}"]
        if trial.reports:
            parts += [f"epoch {epochs(trial)}", figures(trial.metrics, self.goal)]
        return "  ".join([*parts, *filter(None, [trial.reason])])
