"""The trials of a search: what each tried, what it reported, how it ended."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from bdkd_dist.files import json_text, with_nan

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Report:
    """An evaluation of a trial on the validation split."""

    epoch: int
    """Epochs completed."""
    metrics: dict[str, float]
    """By ``network/metric``, e.g. ``student/ece``."""
    values: dict[str, Any] = field(default_factory=dict)
    """What the trial's values had been changed to by then, where they change while it trains."""
    wall_s: float = 0.0
    """Spent on the epochs since the report before, evaluation and checkpoint included."""


@dataclass
class Trial:
    """One training of a search. Kept as ``trial.json`` in its run folder."""

    number: int
    """From 0, in the order of the search."""
    name: str
    """Of its run folder below ``trials``."""
    values: dict[str, Any]
    """By the recipe's dotted key: what the search chose for it; where values change while it trains, the newest."""
    status: Status = "running"
    """``finished`` trained to its end, ``stopped`` was given up by the scheduler, ``failed`` says why in ``reason``."""
    reason: str = ""
    reports: list[Report] = field(default_factory=list)
    """In the order of their epochs."""
    unused: dict[str, Any] = field(default_factory=dict)
    """What the search chose for parameters that the trial's objective does not have: it counts them all the same."""
    taken: dict[str, int] | None = None
    """The trial's ``number`` whose state it took over last, and the ``epoch`` of that."""
    device_s: float = 0.0
    """Wall-clock seconds of training times the devices held meanwhile (GPUs, or CPUs where there are none)."""

    @property
    def wall_s(self) -> float:
        """Seconds of training, evaluation and checkpoints."""
        return sum(report.wall_s for report in self.reports)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The newest report's; none yet where there is no report."""
        return self.reports[-1].metrics if self.reports else {}

    def take_over(self, donor: "Trial", epoch: int) -> None:
        """Take another trial's past up to an epoch: that is what the state went through. Its own time stays spent."""
        spent_s = self.wall_s
        past = [replace(report, wall_s=0.0) for report in donor.reports if report.epoch <= epoch]
        self.reports = [*past[:-1], *(replace(report, wall_s=spent_s) for report in past[-1:])]
        self.taken = {"number": donor.number, "epoch": epoch}

    def to_json(self) -> bytes:
        """Return the trial as JSON."""
        return json_text(asdict(self), indent=1)

    @classmethod
    def from_json(cls, content: bytes) -> "Trial":
        """Return the trial that :meth:`to_json` wrote; a metric's null comes back as nan."""
        tree = json.loads(content)
        for report in tree["reports"]:
            report["metrics"] = with_nan(report["metrics"])
        return cls(**tree | {"reports": [Report(**report) for report in tree["reports"]]})
