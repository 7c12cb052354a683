"""Each mistake a user can make ends in one line and exit status 2, and leaves what was there."""

from pathlib import Path

import pytest
from runs import BDKD, command, execute
from small_disk import small_disk

pytestmark = pytest.mark.slow


def refused(arguments: list[str]) -> str:
    """Return the one line, checking that it is one, that nothing else was said, and the exit status."""
    done = execute(arguments, status=2)
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.epoch=2"], ["train.epoch", "did you mean 'train.epochs'?"]),
        (["data.num_classes=7"], ["data.num_classes=7", "10 classes"]),
        (["train.batch_size=4000"], ["train.batch_size=4000", "311 training images"]),
        (["data.train_limit=100000"], ["data.train_limit=100000"]),
        (["models.student=resnet9"], ["resnet9", "did you mean 'resnet"]),
        (["models.teacher=inception_v3"], ["models.teacher=inception_v3", "data.image_px=32"]),
        (["launch.device=cuda"], ["launch.device=cuda", "GPU"]),
        (["data.dataset=files"], ["data.root", "Parquet", "train/<class>"]),
        (["data.dataset=files", "data.root=/nowhere/at/all"], ["data.root=/nowhere/at/all", "does not exist"]),
        (["run.storage=/proc/runs"], ["run.storage=/proc/runs"]),
        (["data.dataset=files", "data.root=s3://key:hidden@bucket/x"], ["s3://bucket/x holds a secret key", "AWS_"]),
    ],
)
def test_a_wrong_value_is_one_line(cache: Path, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    line = refused(command(cache, tmp_path, *overrides))
    for word in words:
        assert word in line


def test_a_run_folder_of_another_recipe_is_kept(cache: Path, tmp_path: Path) -> None:
    execute(command(cache, tmp_path, "train.epochs=1", "data.loader=torch"))
    before = (tmp_path / "run/results.json").read_bytes()
    line = refused(command(cache, tmp_path, "train.epochs=1", "objective.name=dml"))
    assert "belongs to another recipe" in line
    assert "objective.name" in line
    assert (tmp_path / "run/results.json").read_bytes() == before


def test_a_refused_start_does_not_take_the_folder(cache: Path, tmp_path: Path) -> None:
    refused(command(cache, tmp_path, "data.num_classes=7"))
    refused(command(cache, tmp_path, "train.batch_size=400"))
    execute(command(cache, tmp_path, "train.epochs=1", "data.loader=torch"))


def test_a_folder_with_other_files_is_not_taken(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("mine")
    assert "holds no run" in refused(command(cache, tmp_path))
    assert (tmp_path / "run/thesis.txt").read_text() == "mine"


def test_no_room_on_the_disk_is_said_before_training(cache: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_mib=8) as disk:
        assert "MiB free" in refused(command(cache, disk))


def test_evaluate_of_no_run(tmp_path: Path) -> None:
    assert "is not a run folder" in refused([str(BDKD), "evaluate", str(tmp_path / "nowhere")])
    assert "is not a run folder" in refused([str(BDKD), "evaluate", str(tmp_path)])


def test_a_loss_that_is_not_finite_names_step_losses_and_checkpoint(cache: Path, tmp_path: Path) -> None:
    done = execute(command(cache, tmp_path, "optimizer.lr=1e18", "data.loader=torch"), status=1)
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    for word in ("not finite at step", "student", "teacher", "checkpoint"):
        assert word in line
