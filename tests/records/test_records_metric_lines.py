import dataclasses
import json
from pathlib import Path

import pytest
from records_samples import eval_log, step_log

from bdkd_dist.engine.observer import NetworkDiagnosis
from bdkd_dist.records.metric_lines import MetricLines


def record(run: Path, first: int, last: int, speed: float = 1.0) -> None:
    lines = MetricLines(run)
    lines.start(first - 1, 40)
    for step in range(first, last + 1):
        lines.stepped(dataclasses.replace(step_log(step), images_per_s=speed, remaining_s=speed))
        if step % 10 == 0:
            lines.evaluated(eval_log(step))
    lines.close()


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_the_logs_exactly(tmp_path: Path) -> None:
    record(tmp_path, 1, 10)
    *steps, evaluation = lines(tmp_path)
    assert steps == [{"step": n, "epoch": 0, "train": step_log(n).scalars} for n in range(1, 11)]
    networks = {name: d.metrics for name, d in eval_log(10).networks.items()}
    assert evaluation == {"step": 10, "epoch": 1, "validation": networks}


def test_a_resumed_run_has_the_bytes_of_an_unbroken_one_whatever_its_speed(tmp_path: Path) -> None:
    record(tmp_path / "unbroken", 1, 40)
    record(tmp_path / "resumed", 1, 30, speed=2.0)
    with (tmp_path / "resumed/metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 31, "epoch": 3, "tra')
    record(tmp_path / "resumed", 21, 34, speed=3.0)
    record(tmp_path / "resumed", 31, 40, speed=4.0)
    assert (tmp_path / "resumed/metrics.jsonl").read_bytes() == (tmp_path / "unbroken/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("tail", [b'{"step": 9, "epoch": 0, "train": {}}', b'{"step": 9, "ep', b"\0\0\0\0\n", b"7\n"])
def test_a_last_line_that_is_not_whole_is_dropped(tmp_path: Path, tail: bytes) -> None:
    record(tmp_path, 1, 8)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(before + tail)
    observer = MetricLines(tmp_path)
    observer.start(9, 40)
    observer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_repeated_final_evaluation_has_one_line(tmp_path: Path) -> None:
    record(tmp_path, 1, 40)
    for _ in range(2):
        observer = MetricLines(tmp_path)
        observer.start(40, 40)
        observer.evaluated(eval_log(40))
        observer.close()
    evaluations = [line for line in lines(tmp_path) if line["step"] == 40 and "train" not in line]
    assert [sorted(line) for line in evaluations] == [["epoch", "step", "validation"]]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    observer = MetricLines(tmp_path)
    observer.start(0, 40)
    log = eval_log(10)
    student = NetworkDiagnosis({"ece": float("nan"), "nll": float("inf")}, log.networks["student"].reliability)
    observer.evaluated(dataclasses.replace(log, networks={"student": student}))
    observer.close()
    assert lines(tmp_path)[0]["validation"] == {"student": {"ece": None, "nll": None}}


def test_a_line_is_there_for_other_processes_as_soon_as_it_is_written(tmp_path: Path) -> None:
    observer = MetricLines(tmp_path)
    observer.start(0, 40)
    observer.stepped(step_log(1))
    assert len(lines(tmp_path)) == 1
    observer.flush()
    observer.close()
    observer.close()
