import io
import re

import pytest
from rich.console import Console
from search_samples import lost, report, trial

from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records import search_progress
from bdkd_dist.records.search_progress import SearchProgress
from bdkd_dist.records.trials import Trial

NLL, PARETO = Goal.parse("nll"), Goal.parse("pareto")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(search_progress.time, "monotonic", lambda: now[0])
    return now


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def screen(console: Console) -> list[str]:
    """The lines as they last stood: everything after the last time that the table was begun anew."""
    whole = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(console)).replace("\r", "\n")
    lines = [line.rstrip() for line in whole.splitlines() if line.strip(" ─╶╴")]
    begun = max(number for number, line in enumerate(lines) if " trials: " in line)
    return lines[begun:]


def lasting(number: int, wall_s: float, status: str = "finished", nll: float = 1.0) -> Trial:
    one = trial(number, nll=nll, status=status)  # type: ignore[arg-type]
    one.reports = [report(4, 0.7, 0.03, nll, wall_s)]
    return one


def test_a_log_has_one_line_when_a_trial_ends_however_narrow(clock: list[float]) -> None:
    console = plain()
    shown = SearchProgress(console, NLL, 6)
    running = trial(2, status="running")
    shown.update([trial(0), lost(1), running], 1)
    clock[0] += 1
    shown.update([trial(0), lost(1), running], 1)
    running.status = "stopped"
    shown.update([trial(0), lost(1), running], 0)
    shown.close()
    lines = written(console).splitlines()
    assert lines[0] == "trial 0000-sample finished  epoch 4  student top-1 70.00 % ECE 3.00 % NLL 1.0000"
    assert lines[1] == "trial 0001-sample failed  out of memory"
    assert lines[3].startswith("trial 0002-sample stopped  epoch 4  ")
    assert len(lines) == 4


def test_a_log_says_how_the_search_stands_at_most_every_half_minute(clock: list[float]) -> None:
    console = plain()
    shown = SearchProgress(console, NLL, 6)
    for _ in range(100):
        shown.update([trial(0, nll=0.9), trial(1, nll=0.8), trial(2, status="running")], 1)
        clock[0] += 1.0
    lines = [line for line in written(console).splitlines() if " of 6 trials: " in line]
    assert len(lines) == 4  # after 0, 30, 60 and 90 s
    assert lines[1] == (
        "3 of 6 trials: 1 running, 2 finished  30 s  best so far trial 1: student top-1 70.00 % ECE 3.00 % NLL 0.8000"
    )


def test_what_a_search_waits_for_is_said(clock: list[float]) -> None:
    console = plain()
    SearchProgress(console, NLL, 1).update([trial(0, status="running")], 0, "waiting for 1 GPU")
    assert written(console) == "1 of 1 trial: 0 running  0 s  waiting for 1 GPU\n"


def test_a_trial_that_goes_on_and_ends_again_is_said_again(clock: list[float]) -> None:
    console = plain()
    shown = SearchProgress(console, NLL, 1)
    one = lost(0)
    shown.update([one], 0)
    one.status = "running"
    shown.update([one], 1)
    one.status = "failed"
    shown.update([one], 0)
    assert written(console).count("0000-sample failed") == 2


def test_the_time_left_is_the_work_left_at_the_pace_so_far(clock: list[float]) -> None:
    shown = SearchProgress(plain(), NLL, 10)
    shown.update([], 0)
    clock[0] += 50.0
    assert shown.remaining_s() is None
    shown.update([lasting(0, 90.0), lasting(1, 20.0, "running")], 1)
    assert shown.remaining_s() is None, "one trial is no ground"
    shown.update([lasting(0, 90.0), lasting(1, 30.0, "stopped"), lasting(2, 10.0, "running"), lost(3)], 1)
    # Trials last 60 s in the mean; six have not begun and 50 s are left of one: 410 s of work, of which 130 s took 50.
    assert shown.remaining_s() == pytest.approx(410 * 50 / 130)


def test_work_of_an_earlier_start_is_no_part_of_the_pace(clock: list[float]) -> None:
    before = [lasting(0, 60.0), lasting(1, 60.0)]
    shown = SearchProgress(plain(), NLL, 4)
    shown.update(before, 0)
    clock[0] += 100.0
    assert shown.remaining_s() is None
    shown.update([*before, lasting(2, 50.0, "running")], 1)
    assert shown.remaining_s() == pytest.approx((60 + 10) * 100 / 50)


def test_a_terminal_shows_counts_and_the_best_trials_first() -> None:
    console = terminal()
    shown = SearchProgress(console, NLL, 24)
    trials = [trial(n, nll=2.0 - 0.1 * n, nu_forward=0.1 + n, gate="soft") for n in range(10)]
    shown.update([*trials, trial(10, nll=0.1, status="running"), lost(11)], 1)
    shown.close()
    summary, head, *rows = screen(console)
    assert summary.startswith("12 of 24 trials: 1 running, 10 finished, 1 failed")
    assert head.split() == ["tried", "epoch", "top-1", "%", "ECE", "%", "NLL", "status"]
    assert [row.split()[0] for row in rows] == ["9", "8", "7", "6", "5", "4", "3", "2"]
    assert rows[0].split() == ["9", "nu_forward", "9.1", "gate", "soft", "4", "70.00", "3.00", "1.1000", "finished"]


def test_a_terminal_shows_the_front_so_far() -> None:
    console = terminal()
    shown = SearchProgress(console, PARETO, 24)
    shown.update([trial(0, 0.7, 0.03, 1.0), trial(1, 0.8, 0.05, 1.2), trial(2, 0.6, 0.06, 0.9)], 0)
    shown.close()
    assert screen(console)[-1].replace("\u00a0", " ") == (
        "front so far, student top-1 / student ECE:   trial 0 70.00 % / 3.00 %   trial 1 80.00 % / 5.00 %"
    )


def test_figures_stay_whole_on_80_columns() -> None:
    console = terminal(80)
    shown = SearchProgress(console, NLL, 24)
    values = {"nu_forward": 1.2345, "nu_reverse": 6.789, "temperature": 3.3, "student_weight": 2.5, "gate": "hard"}
    shown.update([trial(0, **values), trial(1, nll=0.9, **values)], 2)
    shown.close()
    lines = screen(console)
    assert all(len(line) <= 80 for line in lines)
    assert lines[2].split()[-5:] == ["4", "70.00", "3.00", "0.9000", "finished"]
    assert "…" in lines[2]


def test_closing_early_and_twice_gives_the_cursor_back() -> None:
    console = terminal()
    shown = SearchProgress(console, NLL, 3)
    shown.close()
    assert written(console) == "", "nothing is touched before there is something to show"
    shown.update([], 0)
    assert "\x1b[?25l" in written(console), "the cursor is hidden while the table lives"
    shown.close()
    shown.close()
    assert written(console).rindex("\x1b[?25h") > written(console).rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_plain_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, _environ={"TERM": "dumb"})
    shown = SearchProgress(console, NLL, 3)
    shown.update([trial(0)], 0)
    shown.close()
    assert "\x1b[?25" not in written(console)
    assert written(console).startswith("trial 0000-sample finished")
