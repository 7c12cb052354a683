"""A study that is carried to another machine holds what going on needs, and nothing that was altered on the way."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from bdkd_dist.engine.checkpoint import load

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
    parts.mkdir()
    (parts / "part-99").write_bytes(b"of an earlier call")
    written = carry.pack(out, parts, study.teacher_wanted)
    assert sorted(parts.iterdir()) == written
    assert len(written) > 1
    assert max(path.stat().st_size for path in written) == 2**16
    carry.unpack(parts, back)

    found = {path.relative_to(back / "pair").as_posix() for path in back.rglob("*") if path.is_file()}
    finished = {"recipe.yaml", "results.json", "predictions/test.parquet"}
    newest = "checkpoints/step-00000020.pt"
    assert found == {
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
