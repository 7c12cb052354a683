"""What each network said about each sample, as one Parquet file."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bdkd_dist.engine.observer import SamplePredictions
from bdkd_dist.files import atomic_write


def write_predictions(
    path: Path,
    indices: torch.Tensor,
    labels: torch.Tensor,
    networks: Mapping[str, SamplePredictions],
    class_names: Sequence[str],
) -> None:
    """Write the predictions, sorted by sample index, whole or not at all.

    Columns: ``index``, ``label`` and for each network ``<network>_top5`` (class numbers, most probable first),
    ``<network>_top5_probability``, ``<network>_confidence`` (the first of them) and ``<network>_nll`` (nats). The names
    of the classes are JSON in the schema's metadata under ``class_names``.

    Args:
        path: The file.
        indices: (N,) int64 sample indices, each once, in any order.
        labels: (N,) int64.
        networks: By name, in the order of ``indices``.
        class_names: Of the K classes.
    """
    order = indices.argsort()
    assert bool((indices[order].diff() > 0).all()), "a sample was counted twice"
    columns = {"index": _flat(indices[order]), "label": _flat(labels[order])}
    for name, said in networks.items():
        probabilities = said.top_probabilities[order]
        columns[f"{name}_top5"] = _lists(said.top_classes[order].to(torch.int32))
        columns[f"{name}_top5_probability"] = _lists(probabilities)
        columns[f"{name}_confidence"] = _flat(probabilities[:, 0])
        columns[f"{name}_nll"] = _flat(said.nll[order])
    table = pa.table(columns).replace_schema_metadata({"class_names": json.dumps(list(class_names))})
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    atomic_write(path, content.getvalue())


def _flat(values: torch.Tensor) -> pa.Array:
    return pa.array(values.numpy())


def _lists(rows: torch.Tensor) -> pa.Array:
    """Return (N, k) values as N lists."""
    offsets = np.arange(0, rows.numel() + 1, rows.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), _flat(rows.reshape(-1)))
