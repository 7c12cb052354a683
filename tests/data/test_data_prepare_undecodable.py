"""Images that cannot be decoded end a preparation, or are left out and accounted for."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_sources import encode, noise
from prepare_samples import Cut, picture, prepare_made, read, source_of, write_shards

from bdkd_dist.config import Data
from bdkd_dist.data.beton import Beton
from bdkd_dist.data.converting import Rules, convert_all
from bdkd_dist.data.prepare import prepare_into
from bdkd_dist.data.prepared import read_manifest
from bdkd_dist.data.sources import Sample, SourceSplit
from bdkd_dist.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Data:
    return write_shards(tmp_path)


CUT_SHORT = picture(0)[:1500]
LEAVE = Rules(undecodable="leave-out")


@pytest.mark.parametrize("rules", [LEAVE, replace(LEAVE, check="headers")])
def test_images_left_out_are_named_and_all_are_accounted_for(tmp_path: Path, rules: Rules) -> None:
    train = [[picture(n) for n in range(40)], [b"no image", CUT_SHORT], [picture(n) for n in range(100, 110)]]
    train[0][35] = CUT_SHORT
    train[2][3] = encode(noise(72, 72))[:900]
    source = source_of({"train": train, "test": [[picture(1), b""], []]})
    prepared = prepare_made(source, tmp_path / "out", rules)
    rows = pq.read_table(tmp_path / "out" / "left_out.parquet").to_pylist()
    assert [(row["split"], row["piece"], row["position"], row["origin"], row["label"]) for row in rows] == [
        ("train", "piece 0", 35, "train-0 row 35", 1),
        ("train", "piece 1", 40, "train-1 row 0", 0),
        ("train", "piece 1", 41, "train-1 row 1", 1),
        ("train", "piece 2", 45, "train-2 row 3", 1),
        ("test", "piece 0", 1, "test-0 row 1", 1),
    ]
    assert all(row["reason"] for row in rows)
    assert prepared.left_out == {"train": 4, "test": 1}
    assert read_manifest(tmp_path / "out") == prepared
    for split, of_split in source.splits.items():
        assert len(of_split) == sum(part.samples for part in prepared.splits[split]) + prepared.left_out[split]
    assert [part.file for part in prepared.splits["train"]] == ["train-00000.beton", "train-00002.beton"]
    beton = Beton(*prepared.paths("train"))
    stored = [image for images in train for image in images if image.endswith(b"\xff\xd9")]
    assert [beton.encoded(index).tobytes() for index in range(len(beton))] == stored
    assert beton.labels.tolist() == [n % 2 for n in range(40) if n != 35] + [n % 2 for n in range(10) if n != 3]


def test_by_default_the_first_ends_it_and_names_split_piece_position_and_origin(tmp_path: Path) -> None:
    source = source_of({"train": [[picture(0)] * 20, [picture(1)] * 20 + [CUT_SHORT]]})
    line = r"train image 40 \(train-1 row 20, piece piece 1\) cannot be decoded: "
    with pytest.raises(UserError, match=line):
        prepare_made(source, tmp_path / "out", Rules())
    assert not (tmp_path / "out").exists()


def test_after_a_stop_leaving_out_goes_on_with_the_whole_pieces(tmp_path: Path) -> None:
    reads: list[int] = []

    def counted(number: int, images: list[bytes]) -> Iterator[Sample]:
        reads.append(number)
        yield from read(images, f"train-{number}")

    contents = [[picture(0)] * 2, [picture(1)] * 20 + [CUT_SHORT]]
    source = source_of({"train": contents})
    pieces = tuple(
        replace(piece, iterate=partial(counted, number, contents[number]))
        for number, piece in enumerate(source.splits["train"].pieces)
    )
    source = replace(source, splits={"train": SourceSplit(pieces)})
    one_by_one = lambda tasks, tell: [convert_all([task], 1, tell)[0] for task in tasks]  # noqa: E731
    with pytest.raises(UserError, match="cannot be decoded"):
        prepare_into(source, tmp_path / "out", Rules(), one_by_one)
    assert (tmp_path / "out.building" / "train-00000.beton.json").exists()
    reads.clear()
    prepared = prepare_into(source, tmp_path / "out", LEAVE, one_by_one)
    assert set(reads) == {1}
    assert prepared.left_out == {"train": 1}


def test_pieces_with_images_left_out_are_done_again_where_one_must_stop(tmp_path: Path) -> None:
    source = source_of({"train": [[picture(0), CUT_SHORT], [picture(1)] * 2]})

    def stop_at_second(tasks, tell):  # type: ignore[no-untyped-def]
        convert_all(tasks[:1], 1, tell)
        raise Cut

    with pytest.raises(Cut):
        prepare_into(source, tmp_path / "out", LEAVE, stop_at_second)
    assert (tmp_path / "out.building" / "train-00000.beton.json").exists()
    with pytest.raises(UserError, match="train image 1"):
        prepare_made(source, tmp_path / "out", Rules())


def test_a_split_of_which_no_image_can_be_decoded_is_named(tmp_path: Path) -> None:
    source = source_of({"train": [[picture(0)]], "test": [[b"?"], [b"!"]]})
    with pytest.raises(UserError, match=r"no test image can be decoded: test image 0 \(test-0 row 0"):
        prepare_made(source, tmp_path / "out", LEAVE)
