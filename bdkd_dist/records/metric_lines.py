"""The run's numbers as JSON lines: only what the recipe determines, so equal runs have equal files byte for byte."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdkd_dist.engine.observer import EvalLog, StepLog
from bdkd_dist.files import json_text, with_nan
from bdkd_dist.records.growing_file import GrowingFile


class MetricLines:
    """Writes ``<run>/metrics.jsonl``.

    A line is ``{"step", "epoch", "train": {tag: value}}`` or ``{"step", "epoch", "validation": {network: metrics}}``.
    Floats are written so that they read back exactly; nan and infinities, which JSON lacks, as null.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path):
        self.path = run / "metrics.jsonl"
        self._file: GrowingFile | None = None
        self._recorded: set[bytes] = set()

    def start(self, step: int, total_steps: int) -> None:
        """See :meth:`Observer.start`; drops the lines after ``step`` and one that a killed process left unfinished."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._recorded = _forget_after(self.path, step)
        self._file = GrowingFile(self.path)

    def stepped(self, log: StepLog) -> None:
        """See :meth:`Observer.stepped`."""
        self._write({"step": log.step, "epoch": log.epoch, "train": log.scalars})

    def evaluated(self, log: EvalLog) -> None:
        """See :meth:`Observer.evaluated`."""
        networks = {name: diagnosis.metrics for name, diagnosis in log.networks.items()}
        self._write({"step": log.step, "epoch": log.epoch, "validation": networks})

    def flush(self) -> None:
        """See :meth:`Observer.flush`."""
        assert self._file is not None, "start() comes first"
        self._file.flush()

    def close(self) -> None:
        """See :meth:`Observer.close`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, values: dict[str, Any]) -> None:
        assert self._file is not None, "start() comes first"
        line = json_text(values)
        if line not in self._recorded:  # a run stopped in its final evaluation repeats that
            self._file.write(line)


def validations(path: Path, last_epoch: int) -> list[dict[str, Any]]:
    """Return the evaluations on the validation split that a run has recorded up to an epoch, oldest first.

    Returns:
        ``{"epoch", "step", "metrics"}`` each, metrics by ``network/metric``; none where there is no such file.
    """
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {"epoch": line["epoch"], "step": line["step"], "metrics": flat(with_nan(line["validation"]))}
        for line in lines
        if "validation" in line and line["epoch"] <= last_epoch
    ]


def flat(networks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return metrics by ``network/metric``, without the number of samples."""
    return {
        f"{network}/{name}": value
        for network, metrics in networks.items()
        for name, value in metrics.items()
        if name != "count"
    }


def _forget_after(path: Path, step: int) -> set[bytes]:
    """Cut the file before the first line that is unfinished or later than ``step``; return the lines of ``step``."""
    end, recorded = 0, set()
    with path.open("r+b") as file:
        for line in file:
            at = _step(line)
            if at is None or at > step:
                break
            end += len(line)
            if at == step:
                recorded.add(line)
        file.truncate(end)
    return recorded


def _step(line: bytes) -> int | None:
    """Return a line's step, or None where the line is not whole."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
