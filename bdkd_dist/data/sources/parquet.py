"""Parquet shards with a column of encoded images and one of labels."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bdkd_dist.config import Data
from bdkd_dist.data.sources.base import (
    PIECE_BYTES,
    Labels,
    Piece,
    Sample,
    Source,
    SourceSplit,
    cut,
    fingerprint,
    source_name,
)
from bdkd_dist.data.sources.storage import File, Place, in_parallel
from bdkd_dist.errors import UserError
from bdkd_dist.uris import shown

BATCH_ROWS = 32


def fingerprint_of_shards(shards: dict[str, list[File]], data: Data) -> str:
    """Return the source's fingerprint, for which nothing is read."""
    return fingerprint("parquet", data, [file for split in sorted(shards) for file in shards[split]])


def parquet_shards(place: Place, shards: dict[str, list[File]], data: Data) -> Source:
    """Read footers and labels of all shards, in parallel; the images of a shard stream page by page.

    Args:
        place: The root.
        shards: Those of each split.
        data: The source's settings.

    Raises:
        UserError: No shard of training images, a damaged one, or one without the columns.
    """
    if "train" not in shards:
        raise UserError(f"data.root={shown(str(data.root))} has no train-*.parquet")
    first = shards["train"][0]
    with place.open(first) as opened:
        schema = _schema(opened)
    where = place.where(first.path)
    image, label = _image_column(schema, where), _label_column(schema, where)
    every = [(split, file) for split in sorted(shards) for file in shards[split]]
    summaries = in_parallel(lambda pair: _summary(place, pair[1], image, label), every)
    pieces: dict[str, list[Piece]] = {split: [] for split in sorted(shards)}
    for (split, file), summary in zip(every, summaries, strict=True):
        pieces[split] += _pieces(place, file, image, summary)
    splits = {split: SourceSplit(tuple(these)) for split, these in pieces.items()}
    names = _class_names(schema, label) or [str(k) for k in range(int(splits["train"].labels.max(initial=-1)) + 1)]
    return Source(source_name(place, data), tuple(names), splits, fingerprint_of_shards(shards, data))


class _Summary(NamedTuple):
    """What is read of a shard beforehand."""

    labels: Labels
    group_rows: list[int]
    group_bytes: list[int]
    """Of the image column, uncompressed."""


def _schema(opened: Any) -> Any:
    import pyarrow.parquet as pq

    return pq.read_schema(opened)


def _summary(place: Place, file: File, image: str, label: str) -> _Summary:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with place.open(file) as opened, pq.ParquetFile(opened, pre_buffer=False) as shard:
        if absent := {image, label} - set(shard.schema_arrow.names):
            raise UserError(f"{place.where(file.path)} has no column '{absent.pop()}'")
        column = shard.read(columns=[label], use_threads=False).column(label)
        groups = [shard.metadata.row_group(g) for g in range(shard.metadata.num_row_groups)]
    if column.null_count or not pa.types.is_integer(column.type):
        raise UserError(f"{place.where(file.path)}: label column '{label}' has rows without an integer")
    chunks = [[group.column(c) for c in range(group.num_columns)] for group in groups]
    names = (image, f"{image}.bytes")
    group_bytes = [sum(c.total_uncompressed_size for c in of if c.path_in_schema in names) for of in chunks]
    return _Summary(column.to_numpy().astype(np.int64), [group.num_rows for group in groups], group_bytes)


def _pieces(place: Place, file: File, image: str, summary: _Summary) -> Iterator[Piece]:
    """Yield a shard, or, where it is large, stretches of its row groups."""
    starts = np.cumsum([0, *summary.group_rows])
    stretches = list(cut(summary.group_bytes, PIECE_BYTES))
    for some in stretches:
        first, last = int(starts[some.start]), int(starts[some.stop])
        labels = summary.labels[first:last]
        name = file.path if len(stretches) == 1 else f"{file.path} rows {first} to {last - 1}"
        read = partial(_samples, place, file, image, labels, tuple(range(some.start, some.stop)), first)
        yield Piece(name, labels, read, sum(summary.group_bytes[some]))


def _samples(
    place: Place, file: File, image: str, labels: Labels, groups: tuple[int, ...], first_row: int
) -> Iterator[Sample]:
    contents = _contents(place, file, image, groups)
    for row, (content, label) in enumerate(zip(contents, labels.tolist(), strict=True), start=first_row):
        yield Sample(content or b"", label, f"{file.path} row {row}")  # nothing is an image that is damaged


def _contents(place: Place, file: File, image: str, groups: tuple[int, ...]) -> Iterator[bytes | None]:
    """Stream the encoded images of some row groups page by page."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with (
        place.open(file) as opened,
        pq.ParquetFile(opened, buffer_size=place.buffer_bytes, pre_buffer=False) as shard,
    ):
        for batch in shard.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=[image], use_threads=False):
            column = batch.column(0)
            if pa.types.is_struct(column.type):
                column = pc.struct_field(column, "bytes")
            yield from column.to_pylist()


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(schema: Any, where: str) -> str:
    import pyarrow as pa

    def holds_file(kind: Any) -> bool:
        return pa.types.is_struct(kind) and any(f.name == "bytes" and _is_binary(f.type) for f in kind)

    found = [f.name for f in schema if holds_file(f.type)] or [f.name for f in schema if _is_binary(f.type)]
    if len(found) != 1:
        many = f"{len(found)} image columns ({', '.join(found)})" if found else "no image column"
        raise UserError(f"{where} has {many}: one struct<bytes: binary, path: string> or one binary column is read")
    return found[0]


def _label_column(schema: Any, where: str) -> str:
    import pyarrow as pa

    integers = [field.name for field in schema if pa.types.is_integer(field.type)]
    known = [name for name in ("label", "fine_label") if name in integers]
    if known or len(integers) == 1:
        return (known or integers)[0]
    raise UserError(
        f"{where} has no label column: an integer column 'label' is read (columns: {', '.join(schema.names)})"
    )


def _class_names(schema: Any, label: str) -> list[str] | None:
    metadata = schema.metadata or {}
    try:
        if names := metadata.get(b"class_names"):
            return list(json.loads(names))
        hub = json.loads(metadata.get(b"huggingface", b"{}"))
        return hub.get("info", {}).get("features", {}).get(label, {}).get("names")
    except (ValueError, AttributeError, TypeError):
        return None  # not the metadata this reads
