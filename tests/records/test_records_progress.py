import io
import re

import pytest
from records_samples import eval_log, step_log
from rich.console import Console

from bdkd_dist.records import progress
from bdkd_dist.records.progress import Progress, duration


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=30, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def screen(console: Console) -> str:
    """What was written without the colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written(console))


def test_plain_lines_say_it_all_on_one_line_however_narrow() -> None:
    console = plain()
    shown = Progress(4, console)
    shown.start(0, 40)
    shown.stepped(step_log(20))
    shown.evaluated(eval_log(20))
    shown.close()
    assert written(console).splitlines() == [
        "epoch 2/4  step 20/40  loss student 0.050 teacher 0.025  1,234 images/s  2 min left",
        "epoch 2/4  val  student top-1 97.2 % ECE 1.2 %  teacher top-1 98.0 % ECE 0.8 %",
    ]


def test_plain_step_lines_are_rare_and_evaluations_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = plain()
    shown = Progress(4, console)
    shown.start(0, 40)
    for step in range(1, 41):
        now[0] += 1.0
        shown.stepped(step_log(step))
        if step % 10 == 0:
            shown.evaluated(eval_log(step))
    shown.close()
    lines = written(console).splitlines()
    assert [line.split()[3] for line in lines if "  step " in line] == ["1/40", "11/40", "21/40", "31/40"]
    assert sum("  val  " in line for line in lines) == 4


def test_a_terminal_shows_epoch_speed_losses_validation_and_time_left() -> None:
    console = terminal()
    shown = Progress(4, console)
    shown.start(0, 40)
    shown.stepped(step_log(19))
    shown.evaluated(eval_log(20))
    shown.stepped(step_log(25))
    shown.close()
    last = screen(console).rstrip().splitlines()[-2:]
    assert last[0].startswith("epoch 3/4 ")
    assert last[0].rstrip().endswith("step 25/40  1,234 images/s  2 min left")
    assert last[1].rstrip() == "loss student 0.040 teacher 0.020   val student top-1 97.2 % ECE 1.2 %"


def test_a_terminal_of_80_columns_shows_the_whole_bar_line() -> None:
    console = terminal(80)
    shown = Progress(240, console)
    shown.start(0, 187_440)
    shown.stepped(step_log(18_744, 187_440))
    shown.close()
    lines = screen(console).rstrip().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "step 18,744/187,440  1,234 images/s  2 min left" in lines[-2]


def test_closing_midway_and_twice_gives_the_cursor_back() -> None:
    console = terminal()
    shown = Progress(4, console)
    shown.close()
    shown.start(0, 40)
    shown.stepped(step_log(3))
    assert "\x1b[?25l" in written(console), "the cursor is hidden while the bar lives"
    shown.close()
    shown.close()
    assert written(console).rindex("\x1b[?25h") > written(console).rindex("\x1b[?25l")


def test_restarted_workers_go_on_with_a_new_bar() -> None:
    console = terminal()
    shown = Progress(4, console)
    shown.start(0, 40)
    shown.stepped(step_log(35))
    shown.start(20, 40)
    shown.close()
    assert "epoch 3/4" in screen(console).rstrip().splitlines()[-2]
    assert "step 20/40" in screen(console).rstrip().splitlines()[-2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89.0, "89 s"),
        (91.0, "2 min"),
        (3599.0, "60 min"),
        (5500.0, "1 h 32 min"),
        (93_900.0, "26 h 05 min"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text
