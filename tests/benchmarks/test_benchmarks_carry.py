"""A study that is carried to another machine holds what going on needs, and nothing that was altered on the way."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from bdkd_dist import config
from bdkd_dist.engine.checkpoint import load
from bdkd_dist.launch.run_folder import RunFolder

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
carry = importlib.import_module("carry")
study = importlib.import_module("cifar100_study")


def write_run(folder: Path, done: bool) -> dict[str, object]:
    """Write a run folder with two checkpoints, and return the newer one's state."""
    for place in ("checkpoints", "predictions", "tensorboard"):
        (folder / place).mkdir(parents=True)
    state: dict[str, object] = {}
    for step in (10, 20):
        networks = {name: {"weight": torch.randn(1000, 7)} for name in ("teacher", "student")}
        state = {"networks": networks, "optimizer": {"momentum": torch.randn(3001)}, "step": step}
        torch.save(state, folder / f"checkpoints/step-{step:08d}.pt")
    (folder / "recipe.yaml").write_text(f"run: {{name: {folder.name}}}\n")
    (folder / "predictions/test.parquet").write_bytes(b"PAR1")
    (folder / "tensorboard/events").write_bytes(b"events")
    if done:
        (folder / "results.json").write_text("{}")
    return state


def test_a_study_goes_on_from_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "PART_BYTES", 2**16)
    out, parts, back = tmp_path / "out", tmp_path / "parts", tmp_path / "back"
    states = {name: write_run(out / "pair" / name, done) for name, done in study_runs().items()}
    (out / "data").mkdir()
    (out / "data/train.parquet").write_bytes(bytes(2**20))
    (out / "pair/weighting").mkdir()
    for name in ("best.yaml", "search.yaml"):
        (out / "pair/weighting" / name).write_text("objective: {name: bdkd}\n")
    parts.mkdir()
    (parts / "part-99").write_bytes(b"of an earlier call")
    written = carry.pack(out, parts, study.teacher_wanted)
    assert sorted(parts.iterdir()) == written
    assert len(written) > 1
    assert max(path.stat().st_size for path in written) == 2**16
    carry.unpack(parts, back)

    found = {path.relative_to(back / "pair").as_posix() for path in (back / "pair").rglob("*") if path.is_file()}
    finished = {"recipe.yaml", "results.json", "predictions/test.parquet"}
    newest = "checkpoints/step-00000020.pt"
    assert found == {
        "weighting/best.yaml",
        *(f"ce-0/{name}" for name in finished),
        *(f"ce-1/{name}" for name in finished | {newest}),  # kd has not learnt from it yet
        *(f"kd-0/{name}" for name in finished),
        *(f"bdkd_tuned-0/{name}" for name in ("recipe.yaml", "predictions/test.parquet", "tensorboard/events", newest)),
    }
    assert_same(load(back / "pair/bdkd_tuned-0" / newest), states["bdkd_tuned-0"])
    teacher = states["ce-1"]["networks"]["teacher"]  # type: ignore[index]
    assert_same(load(back / "pair/ce-1" / newest), {"networks": {"teacher": teacher}})


def study_runs() -> dict[str, bool]:
    """Runs by name, and whether they are finished."""
    return {"ce-0": True, "ce-1": True, "kd-0": True, "bdkd_tuned-0": False}


def assert_same(got: object, want: object) -> None:
    if isinstance(want, dict):
        assert isinstance(got, dict)
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert_same(got[key], value)
    elif isinstance(want, torch.Tensor):
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("damage", ["altered", "cut", "missing"])
def test_a_damaged_part_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(carry, "PART_BYTES", 2**14)
    write_run(tmp_path / "out/pair/dml-0", done=False)
    first, second, *_ = carry.pack(tmp_path / "out", tmp_path / "parts", study.teacher_wanted)
    if damage == "altered":
        content = bytearray(first.read_bytes())
        content[9000] ^= 1
        first.write_bytes(content)
    elif damage == "cut":
        second.write_bytes(second.read_bytes()[:100])
    else:
        second.unlink()
    with pytest.raises(SystemExit, match="a part of the study is missing or altered"):
        carry.unpack(tmp_path / "parts", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def finish(out: Path, *names: str) -> None:
    """Write finished runs, as small as they are still told apart."""
    for name in names:
        run = out / "pair" / name
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("{}")
        (run / "results.json").write_text(f'{{"run": "{name}"}}')


def runs_of(out: Path) -> set[str]:
    return {path.parent.name for path in out.glob("pair/*/results.json")}


def pack(out: Path, parts: Path) -> list[Path]:
    written: list[Path] = carry.pack(out, parts, lambda run: False)
    return written


def test_what_is_carried_counts_where_the_folder_is_an_earlier_calls(tmp_path: Path) -> None:
    one, other, parts = tmp_path / "one", tmp_path / "other", tmp_path / "parts"
    carry.unpack(parts, one)  # the first call: there is nothing yet
    assert not one.exists()
    finish(one, "ce-0")
    pack(one, parts)
    (other / "data").mkdir(parents=True)  # of a call without --carry
    (tmp_path / "other.unpacking/pair/dml-0").mkdir(parents=True)  # of an extraction that was cut off
    carry.unpack(parts, other)
    assert runs_of(other) == {"ce-0"}
    assert not (tmp_path / "other.unpacking").exists()
    finish(other, "kd-0")
    pack(other, parts)
    carry.unpack(parts, one)  # and back
    assert runs_of(one) == {"ce-0", "kd-0"}
    finish(one, "bdkd-0")  # and killed before it was packed
    carry.unpack(parts, one)
    assert runs_of(one) == {"ce-0", "kd-0", "bdkd-0"}


@pytest.mark.parametrize("other", ["pair/kd-0/results.json", "pair/ce-0/results.json", "pair/weighting/best.yaml"])
def test_finished_work_that_is_not_carried_is_never_deleted(tmp_path: Path, other: str) -> None:
    finish(tmp_path / "out", "ce-0")
    pack(tmp_path / "out", tmp_path / "parts")
    own = tmp_path / "own" / other
    own.parent.mkdir(parents=True)
    own.write_text("other work")
    with pytest.raises(SystemExit, match=rf"not in .*parts \({Path(other).parent}\); give another --out, or delete"):
        carry.unpack(tmp_path / "parts", tmp_path / "own")
    assert own.read_text() == "other work"
    assert sorted(tmp_path.iterdir()) == [tmp_path / name for name in ("out", "own", "parts")]


@pytest.mark.parametrize("stopped_by", [OSError, KeyboardInterrupt])
def test_the_former_parts_stay_until_the_next_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_by: type[BaseException]
) -> None:
    monkeypatch.setattr(carry, "PART_BYTES", 64)
    out, parts = tmp_path / "out", tmp_path / "parts"
    finish(out, "ce-0")
    former = pack(out, parts)
    finish(out, "kd-0")

    write_bytes = Path.write_bytes

    def on_a_full_disk(path: Path, content: bytes) -> int:
        if "-02-of-" in path.name:
            raise stopped_by
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", on_a_full_disk)
        with pytest.raises(stopped_by):
            pack(out, parts)
    carry.unpack(parts, tmp_path / "back")
    assert runs_of(tmp_path / "back") == {"ce-0"}
    assert set(former) <= set(parts.iterdir())
    assert set(pack(out, parts)) == set(parts.iterdir())


def test_of_two_whole_sets_the_newer_is_taken(tmp_path: Path) -> None:
    out, parts = tmp_path / "out", tmp_path / "parts"
    finish(out, "ce-0")
    (former,) = pack(out, parts)
    content = former.read_bytes()
    finish(out, "kd-0")
    pack(out, parts)
    former.write_bytes(content)  # as if the process had been killed before it removed that
    carry.unpack(parts, tmp_path / "back")
    assert runs_of(tmp_path / "back") == {"ce-0", "kd-0"}


def test_a_run_that_goes_on_is_packed_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, parts, back = tmp_path / "out", tmp_path / "parts", tmp_path / "back"
    write_run(out / "pair/dml-0", done=False)
    (out / "pair/dml-0/.ab.partial").write_text("being written")
    folder, read_bytes = out / "pair/dml-0/checkpoints", Path.read_bytes

    def later(path: Path) -> bytes:
        if path.name == "step-00000020.pt":  # two checkpoints later
            for step in (30, 40):
                (folder / f"step-{step:08d}.pt").write_text("newer")
            path.unlink(missing_ok=True)
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", later)
        pack(out, parts)
    carry.unpack(parts, back)
    assert [path.name for path in back.glob("pair/dml-0/checkpoints/*")] == ["step-00000040.pt"]
    assert not list(back.rglob("*.partial"))


def test_a_taught_run_goes_on_wherever_the_study_lies(tmp_path: Path) -> None:
    parts, out, back = tmp_path / "parts", tmp_path / "out", tmp_path / "back"

    def kd(out: Path) -> config.Recipe:
        taught = study.runs(out / "pair", ["digits"], [], dict.fromkeys(study.METHODS, ()))
        run = next(run for run in taught if run.after)
        return config.load(
            run.arguments[0], [*run.arguments[1:], f"run.storage={out / 'pair'}", f"run.name={run.name}"]
        )

    write_run(out / "pair/kd-0", done=False)
    (out / "pair/kd-0/recipe.yaml").write_text(kd(out).to_yaml())
    pack(out, parts)
    carry.unpack(parts, back)
    RunFolder.of(kd(back)).check_owner(kd(back))
    assert kd(back).models.teacher_checkpoint == str(back / "pair/ce-0")
