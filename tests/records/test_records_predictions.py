import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bdkd_dist.engine.observer import SamplePredictions
from bdkd_dist.records.predictions import write_predictions


def some(n: int, k: int, seed: int) -> SamplePredictions:
    g = np.random.default_rng(seed)
    classes = np.stack([g.permutation(20)[:k] for _ in range(n)])
    return SamplePredictions(
        torch.from_numpy(classes), torch.from_numpy(g.random((n, k))), torch.from_numpy(g.random(n))
    )


@pytest.mark.parametrize("k", [5, 3])
def test_predictions_read_back_equal_and_sorted(tmp_path: Path, k: int) -> None:
    indices, labels = torch.tensor([7, 2, 900, 5]), torch.tensor([1, 0, 3, 2])
    networks = {"teacher": some(4, k, 0), "student": some(4, k, 1)}
    write_predictions(tmp_path / "p.parquet", indices, labels, networks, ["cat", "dög", "owl"])
    table = pq.read_table(tmp_path / "p.parquet")
    assert table["index"].to_pylist() == [2, 5, 7, 900]
    assert table["label"].to_pylist() == [0, 2, 1, 3]
    by_index = [1, 3, 0, 2]
    for name, said in networks.items():
        assert table[f"{name}_top5"].to_pylist() == [said.top_classes[i].tolist() for i in by_index]
        assert table[f"{name}_top5_probability"].to_pylist() == [said.top_probabilities[i].tolist() for i in by_index]
        assert table[f"{name}_confidence"].to_pylist() == [said.top_probabilities[i, 0].item() for i in by_index]
        assert table[f"{name}_nll"].to_pylist() == [said.nll[i].item() for i in by_index]
    assert table.num_columns == 2 + 2 * 4
    assert json.loads(table.schema.metadata[b"class_names"]) == ["cat", "dög", "owl"]
    assert pa.types.is_list(table.schema.field("teacher_top5").type)
    assert pq.ParquetFile(tmp_path / "p.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_split_without_samples_is_an_empty_table(tmp_path: Path) -> None:
    none = torch.empty(0, dtype=torch.int64)
    write_predictions(tmp_path / "p.parquet", none, none, {"student": some_none()}, ["a", "b"])
    assert pq.read_table(tmp_path / "p.parquet").num_rows == 0


def some_none() -> SamplePredictions:
    return SamplePredictions(
        torch.empty(0, 2, dtype=torch.int64),
        torch.empty(0, 2, dtype=torch.float64),
        torch.empty(0, dtype=torch.float64),
    )


def test_a_sample_counted_twice_is_a_bug(tmp_path: Path) -> None:
    twice = torch.tensor([3, 3])
    with pytest.raises(AssertionError, match="twice"):
        write_predictions(tmp_path / "p.parquet", twice, twice, {"student": some(2, 5, 0)}, ["a"])
