"""Corrupted test images and images of other data: figures against NumPy and scikit-learn, and the command line."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_sources import data, encode, noise, write_folder, write_shard
from PIL import Image
from runs import BDKD, command, execute
from sklearn.metrics import roc_auc_score, roc_curve

from bdkd_dist.data.beton import Beton
from bdkd_dist.data.corruptions import CORRUPTIONS, corrupt
from bdkd_dist.data.foreign import prepare_foreign
from bdkd_dist.data.loader import Batch
from bdkd_dist.engine.evaluate import Outputs
from bdkd_dist.errors import UserError
from bdkd_dist.launch.shift import VARIANTS, compare_confidence, measure_shift

# --- confidence on other data


def outputs(logits: dict[str, np.ndarray]) -> Outputs:
    count = len(next(iter(logits.values())))
    return Outputs(
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
        {name: torch.from_numpy(values).float() for name, values in logits.items()},
    )


def logits_of(confidence: np.ndarray) -> np.ndarray:
    """Two classes, the second with this probability."""
    return np.stack([np.zeros_like(confidence), np.log(confidence / (1 - confidence))], axis=1)


@pytest.mark.parametrize("levels", [7, 100_000])  # many ties, hardly any
@pytest.mark.parametrize("count", [19, 20, 400])
def test_auroc_and_fpr_are_scikit_learns(levels: int, count: int) -> None:
    rng = np.random.default_rng(count)
    own = 0.5 + 0.49 * np.floor(levels * rng.beta(3, 1, count) + 1) / (levels + 1)
    other = 0.5 + 0.49 * np.floor(levels * rng.beta(1, 1, 300) + 1) / (levels + 1)
    inside, outside = logits_of(own), logits_of(other)
    figures = compare_confidence(outputs({"student": inside}), outputs({"student": outside}))["student"]
    label, score = np.r_[np.ones(count), np.zeros(300)], np.float32(np.r_[own, other])
    assert figures["auroc"] == pytest.approx(roc_auc_score(label, score), abs=1e-9)
    fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
    assert figures["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    assert figures["confidence_inside"] == pytest.approx(own.mean(), abs=1e-6)
    assert figures["confidence_outside"] == pytest.approx(other.mean(), abs=1e-6)


def test_confidence_that_says_nothing_has_an_auroc_of_a_half_and_one_that_parts_them_of_one() -> None:
    constant, sure = logits_of(np.full(50, 0.8)), logits_of(np.linspace(0.9, 0.99, 50))
    inside, outside = (
        outputs({"teacher": constant, "student": sure}),
        outputs({"teacher": constant, "student": constant}),
    )
    figures = compare_confidence(inside, outside)
    assert (figures["teacher"]["auroc"], figures["teacher"]["fpr95"]) == (0.5, 1.0)
    assert (figures["student"]["auroc"], figures["student"]["fpr95"]) == (1.0, 0.0)


# --- which images of another data set


def labels_of(where: Path | str, cache: Path) -> tuple[list[str], list[int]]:
    prepared = prepare_foreign(str(where), data(prepared=str(cache)))
    (split,) = prepared.splits
    return [split], Beton(*prepared.paths(split)).labels.tolist()


@pytest.mark.parametrize(
    ("splits", "taken"),
    [({"train", "val", "test"}, "test"), ({"train", "val"}, "validation"), ({"train"}, "train")],
)
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_the_test_split_is_taken_where_there_is_one(kind: str, splits: set[str], taken: str, tmp_path: Path) -> None:
    counts = {"train": 5, "val": 2, "test": 3}
    number = {"test": 3, "validation": 2, "train": 5}[taken]
    if kind == "folder":  # of one class: the run has two
        write_folder(tmp_path / "other", {split: {"only": counts[split]} for split in splits})
    else:
        for split in splits:
            images: list[bytes | None] = [encode(noise(16, 16, n)) for n in range(counts[split])]
            write_shard(tmp_path / "other" / f"{split}-0.parquet", images, [0] * counts[split])
    assert labels_of(tmp_path / "other", tmp_path / "cache") == ([taken], [0] * number)


def test_unlabelled_test_shards_will_do(tmp_path: Path) -> None:
    images: list[bytes | None] = [encode(noise(16, 16, n)) for n in range(4)]
    write_shard(tmp_path / "other/train-0.parquet", images, [0, 1, 2, 3])
    write_shard(tmp_path / "other/test-0.parquet", images[:3], [-1, -1, -1])
    assert labels_of(tmp_path / "other", tmp_path / "cache") == (["test"], [-1, -1, -1])


def test_it_is_prepared_once_and_apart_from_the_same_data_as_a_runs_own(tmp_path: Path) -> None:
    from bdkd_dist.data.prepare import prepare

    write_folder(tmp_path / "other", {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    told: list[str] = []
    settings = data(prepared=str(tmp_path / "cache"), root=str(tmp_path / "other"))
    first = prepare_foreign(str(tmp_path / "other"), settings, lambda split, done, total: told.append(split))
    assert told == ["test"]
    prepare_foreign(str(tmp_path / "other"), settings, lambda split, done, total: told.append(split))
    assert told == ["test"]
    assert prepare(settings).splits.keys() == {"train", "test"}
    assert prepare_foreign(str(tmp_path / "other"), settings) == first


def test_digits_come_by_their_name_at_the_runs_size(tmp_path: Path) -> None:
    prepared = prepare_foreign("digits", data(prepared=str(tmp_path), image_px=24))
    assert list(prepared.splits) == ["test"]
    assert Beton(*prepared.paths("test")).pixels(0).shape == (24, 24, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, ["does not exist", "train/<class>"]),
        (lambda root: root.mkdir(), ["holds none of these", "train-*.parquet", "train/<class>"]),
        (lambda root: (root / "train").mkdir(parents=True), ["holds no class folders"]),
        (lambda root: (root / "train/a").mkdir(parents=True), ["holds no images"]),
        (lambda root: write_shard(root / "test-0.parquet", [encode(noise(9, 9))], [0]), [": has no train-*.parquet"]),
        (lambda root: write_shard(root / "train-0.parquet", [], []), ["holds no images"]),
        (lambda root: write_shard(root / "train-0.parquet", [b"no image"], [0]), ["train image 0", "decoded"]),
    ],
)
def test_a_source_without_images_is_named_in_one_line(make: Any, words: list[str], tmp_path: Path) -> None:
    root = tmp_path / "other"
    make(root)
    with pytest.raises(UserError) as caught:
        prepare_foreign(str(root), data(prepared=str(tmp_path / "cache")))
    assert str(caught.value).startswith(f"--ood {root}: ")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# --- under corruptions


def ece(logits: np.ndarray, labels: np.ndarray) -> float:
    """Guo's, 15 bins (lo, hi], written out."""
    odds = np.exp(logits - logits.max(1, keepdims=True))
    confidence = odds.max(1) / odds.sum(1)
    right = logits.argmax(1) == labels
    bins = np.ceil(confidence * 15)
    return sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    )


def test_every_variant_is_measured_on_all_its_images_decoded_once() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (50, 16, 16, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 4, 50))
    weights = {name: rng.normal(size=(768, 4)) / 500 for name in ("teacher", "student_1", "student_2")}

    def classify(pixels: torch.Tensor) -> dict[str, np.ndarray]:
        flat = pixels.reshape(len(pixels), -1).double().numpy() - 128
        return {name: np.float32(flat @ w) for name, w in weights.items()}

    class Evaluator(SimpleNamespace):
        num_classes = 4

        def outputs(self, batches: Iterable[Batch]) -> Outputs:
            (batch,) = batches
            tensors = {name: torch.from_numpy(values) for name, values in classify(batch.images).items()}
            return Outputs(batch.indices, batch.labels, tensors)

    steps: list[int] = []
    temperatures = {"teacher": 1.0, "student_1": 0.4, "student_2": 2.5}
    parts = [torch.arange(23, -1, -1), torch.arange(24, 48), torch.arange(48, 50)]
    batches = (Batch(images[part], labels[part], part) for part in parts)  # can be asked for once
    measured = measure_shift(Evaluator(), batches, temperatures, lambda: steps.append(1))  # type: ignore[arg-type]
    assert len(steps) == len(parts) * len(VARIANTS) == 3 * 31
    assert list(measured) == list(temperatures)
    for name, T in temperatures.items():
        assert measured[name]["temperature"] == T
        assert list(measured[name]["corruptions"]) == list(CORRUPTIONS)
        figures = {("clean", 0): measured[name]["clean"]}
        for corruption, severities in measured[name]["corruptions"].items():
            figures |= {(corruption, severity): found for severity, found in enumerate(severities, start=1)}
        for (corruption, severity), found in figures.items():
            changed = corrupt(images, torch.arange(50), corruption, severity) if severity else images
            logits = classify(changed)[name].astype(float)
            assert found["raw"]["count"] == 50
            assert found["raw"]["top1"] == np.mean(logits.argmax(1) == labels.numpy())
            assert found["temperature_scaled"]["top1"] == found["raw"]["top1"]
            assert found["raw"]["ece"] == pytest.approx(ece(logits, labels.numpy()), abs=1e-9)
            assert found["temperature_scaled"]["ece"] == pytest.approx(ece(logits / T, labels.numpy()), abs=1e-6)


# --- the command line


@pytest.mark.slow
class TestCommandLine:
    @pytest.fixture(scope="class")
    def run(self, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A small finished run."""
        storage = tmp_path_factory.mktemp("shift")
        execute(command(cache, storage, "data.loader=torch", "data.threads=1"))
        return storage / "run"

    def test_both_flags_print_tables_and_write_files(self, run: Path, tmp_path: Path) -> None:
        write_folder(tmp_path / "pictures", {"train": {"a": 2, "b": 2, "c": 2}, "test": {"a": 20, "b": 20, "c": 7}})
        before = json.loads((run / "results.json").read_text())
        done = execute([str(BDKD), "evaluate", str(run), "--shift", "--ood", str(tmp_path / "pictures")])
        assert json.loads((run / "results.json").read_text()) == before
        for words in ("T-scaled", "mean by severity", "gaussian_noise", "pixelate", "AUROC", "FPR at 95 % TPR"):
            assert words in done.stdout
        assert "359 test images against 47 of pictures (test)" in done.stdout

        shift = json.loads((run / "shift.json").read_text())
        assert list(shift["networks"]) == ["teacher", "student"]
        assert shift["amounts"]["jpeg"] == [80, 65, 58, 50, 40]
        for name, network in shift["networks"].items():
            own = before["test"][name]
            assert network["temperature"] == own["temperature"]
            for kind in ("raw", "temperature_scaled"):
                for metric in ("top1", "ece", "nll"):
                    assert network["clean"][kind][metric] == pytest.approx(own[kind][metric], abs=1e-6)
            row = next(line for line in done.stdout.splitlines() if "gaussian_noise" in line and name in line)
            mean = np.mean([figures["raw"]["top1"] for figures in network["corruptions"]["gaussian_noise"]])
            assert f"{100 * mean:.2f}" in row
        assert Image.open(run / "figures/shift.png").size == (1760, 768)
        compared = json.loads((run / "ood-pictures.json").read_text())
        assert (compared["images_inside"], compared["images_outside"]) == (359, 47)
        assert 0 <= compared["networks"]["student"]["auroc"] <= 1

    def test_an_earlier_checkpoint_does_not_tell_the_runs_own_images_apart_and_its_figures_lie_apart(
        self, run: Path
    ) -> None:
        first = min(run.glob("checkpoints/step-*.pt"))
        before = (run / "results.json").read_bytes()
        done = execute([str(BDKD), "evaluate", str(first), "--ood", "digits"])
        assert "359 test images against 359 of digits (test)" in done.stdout
        assert "by severity" not in done.stdout
        compared = json.loads((run / "evaluations" / first.stem / "ood-digits.json").read_text())
        assert compared["networks"]["teacher"]["auroc"] == pytest.approx(0.5, abs=1e-9)
        assert (run / "results.json").read_bytes() == before

    def test_a_missing_source_is_one_line_and_nothing_is_measured(self, run: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.suffix != ".lock"}
        done = execute([str(BDKD), "evaluate", str(run), "--shift", "--ood", "/nowhere/at/all"], status=2)
        (line,) = done.stderr.strip().splitlines()
        assert "--ood /nowhere/at/all: does not exist" in line
        assert before == {path: path.stat().st_mtime_ns for path in before}
