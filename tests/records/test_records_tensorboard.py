import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from records_samples import RECIPE, eval_log, points, raw_events, step_log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bdkd_dist.records import tensorboard
from bdkd_dist.records.tensorboard import TensorBoardObserver, event_files, forget_after

METRICS = ("top1", "top5", "ece", "adaece", "classwise_ece", "mce", "gap", "nll", "brier", "entropy")
STEP_TAGS = ("train/student/loss", "train/teacher/loss", "lr/student", "speed/images_per_s")
EVAL_TAGS = (
    *(f"val/{n}/{m}" for n in ("teacher", "student") for m in (*METRICS, "reliability")),
    "val/student/entropy_against_teacher",
)


def record(run: Path, first: int, last: int, resume_at: int | None = None) -> None:
    """A process that begins or goes on at ``resume_at`` and records the steps first..last, evaluating every tenth."""
    observer = TensorBoardObserver(run, RECIPE)
    observer.start(first - 1 if resume_at is None else resume_at, 40)
    for step in range(first, last + 1):
        observer.stepped(step_log(step))
        if step % 10 == 0:
            observer.evaluated(eval_log(step))
    observer.close()


def expected(last: int) -> Counter[tuple[str, int]]:
    wanted = [("recipe/text_summary", 0)]
    wanted += [(tag, step) for step in range(1, last + 1) for tag in STEP_TAGS]
    wanted += [(tag, step) for step in range(10, last + 1, 10) for tag in EVAL_TAGS]
    return Counter(wanted)


def accumulated(run: Path) -> EventAccumulator:
    unlimited = {"scalars": 0, "images": 0, "tensors": 0}
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance=unlimited)
    accumulator.Reload()
    return accumulator


def test_scalars_figures_and_recipe_read_back(tmp_path: Path) -> None:
    record(tmp_path, 1, 20)
    assert Counter(points(tmp_path / "tensorboard")) == expected(20)
    read = accumulated(tmp_path)
    losses = read.Scalars("train/student/loss")
    assert [s.step for s in losses] == list(range(1, 21))
    assert [s.value for s in losses] == pytest.approx([1 / step for step in range(1, 21)], rel=1e-6)
    assert [s.value for s in read.Scalars("val/student/ece")] == pytest.approx([0.0125, 0.0125])
    assert [s.value for s in read.Scalars("speed/images_per_s")] == pytest.approx([1234.4] * 20)
    image = read.Images("val/student/reliability")[1]
    assert image.step == 20
    pixels = Image.open(io.BytesIO(image.encoded_image_string))
    assert pixels.size == (330, 470)
    assert len(pixels.getcolors(100_000) or []) > 50, "a blank picture"
    (text,) = read.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val == [f"```yaml\n{RECIPE}```".encode()]


def test_a_resumed_run_has_each_point_once(tmp_path: Path) -> None:
    record(tmp_path, 1, 30)
    record(tmp_path, 21, 40)
    assert Counter(points(tmp_path / "tensorboard")) == expected(40)
    read = accumulated(tmp_path)
    for tag in STEP_TAGS:
        assert [s.step for s in read.Scalars(tag)] == list(range(1, 41))
    assert [s.step for s in read.Images("val/teacher/reliability")] == [10, 20, 30, 40]


@pytest.mark.slow
def test_resuming_again_and_again_and_further_back_has_each_point_once(tmp_path: Path) -> None:
    for first, last in ((1, 30), (21, 35), (31, 33), (6, 12), (6, 12), (13, 40), (41, 40)):
        record(tmp_path, first, last)
    assert Counter(points(tmp_path / "tensorboard")) == expected(40)
    assert [s.step for s in accumulated(tmp_path).Scalars("train/student/loss")] == list(range(1, 41))


def test_beginning_anew_keeps_nothing_but_the_recipe(tmp_path: Path) -> None:
    record(tmp_path, 1, 15)
    record(tmp_path, 1, 3)
    assert Counter(points(tmp_path / "tensorboard")) == expected(3)


def test_a_repeated_final_evaluation_is_recorded_once(tmp_path: Path) -> None:
    record(tmp_path, 1, 40)
    for _ in range(2):
        observer = TensorBoardObserver(tmp_path, RECIPE)
        observer.start(40, 40)
        observer.evaluated(eval_log(40))
        observer.close()
    assert Counter(points(tmp_path / "tensorboard")) == expected(40)


@pytest.mark.parametrize("cut_bytes", [1, 5, 13, 40])
def test_a_record_cut_off_by_a_kill_is_dropped_quietly(tmp_path: Path, cut_bytes: int) -> None:
    record(tmp_path, 1, 5)
    (path,) = event_files(tmp_path / "tensorboard")
    os.truncate(path, path.stat().st_size - cut_bytes)
    record(tmp_path, 6, 9, resume_at=5)
    lost = Counter({("speed/images_per_s", 5): 1})
    assert Counter(points(tmp_path / "tensorboard")) == expected(9) - lost


def test_a_kill_while_files_are_shortened_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tensorboard"
    record(tmp_path, 1, 20)
    record(tmp_path, 21, 25)
    record(tmp_path, 26, 30)
    # Three files, the last two of which change when the run goes back to step 22: stop before the second change.
    real, calls = tensorboard.atomic_write, []

    def killed(path: Path, content: bytes) -> None:
        calls.append(path)
        real(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorboard, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        forget_after(folder, 22)
    monkeypatch.undo()
    assert len(calls) == 1
    between = Counter(points(folder))
    assert max(between.values()) == 1
    assert all(between[point] == 1 for point in expected(22))
    forget_after(folder, 22)
    assert Counter(points(folder)) == expected(22)


def test_files_of_a_slow_clock_or_the_same_second_sort_before_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for first, last, clock in ((1, 10, now), (11, 20, now), (21, 30, now - 3600), (31, 40, now + 5)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        record(tmp_path, first, last)
    steps = [event.step for event in raw_events(tmp_path / "tensorboard") if event.HasField("summary")]
    assert steps == sorted(steps)
    assert [s.step for s in accumulated(tmp_path).Scalars("lr/student")] == list(range(1, 41))
    assert Counter(points(tmp_path / "tensorboard")) == expected(40)


def test_flush_waits_until_everything_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    observer = TensorBoardObserver(tmp_path, RECIPE)
    observer.start(0, 40)
    for step in range(1, 41):
        observer.stepped(step_log(step))
    synced.clear()
    observer.flush()
    (path,) = event_files(tmp_path / "tensorboard")
    assert Counter(points(tmp_path / "tensorboard")) == Counter(
        [("recipe/text_summary", 0)] + [(tag, step) for step in range(1, 41) for tag in STEP_TAGS]
    )
    assert synced == [str(path)]
    observer.close()
    observer.close()


WRITER = """
import sys
from pathlib import Path
from records_samples import RECIPE, eval_log, step_log
from bdkd_dist.records.tensorboard import TensorBoardObserver

observer = TensorBoardObserver(Path(sys.argv[1]), RECIPE)
observer.start(0, 10**6)
for step in range(1, 10**6):
    observer.stepped(step_log(step))
    if step % 10 == 0:
        observer.evaluated(eval_log(step))
    if step == 20:
        observer.flush()
        print("flushed", flush=True)
"""


@pytest.mark.slow
def test_after_a_sigkill_everything_flushed_is_there_and_nothing_twice(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    for pause_s in (0.0, 0.13, 0.37):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout is not None
        with child.stdout:
            assert child.stdout.readline() == "flushed\n"
            time.sleep(pause_s)
            os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        record(tmp_path, 21, 40)
        assert Counter(points(tmp_path / "tensorboard")) == expected(40)
        assert [s.step for s in accumulated(tmp_path).Scalars("train/student/loss")] == list(range(1, 41))
