from pathlib import Path

import numpy as np
import pytest
from fake_sources import PNGS, data, encode, noise, write_folder

from bdkd_dist.data.beton import Beton
from bdkd_dist.data.foreign import prepare_foreign
from bdkd_dist.errors import UserError


def test_a_folder_of_images_without_classes_is_another_data_set(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    pixels = [noise(20, 20, seed) for seed in range(3)]
    for n, image in enumerate(pixels):
        (tmp_path / "flat" / f"{n}.png").write_bytes(encode(image))
    prepared = prepare_foreign(str(tmp_path / "flat"), data(prepared=str(tmp_path / "cache")))
    beton = Beton(*prepared.paths("test"))
    assert beton.labels.tolist() == [0, 0, 0]
    for offset, image in zip(beton.offsets, pixels, strict=True):
        np.testing.assert_array_equal(beton.bytes[offset : offset + image.size], image.ravel())


def test_one_with_classes_is_read_by_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 2}})
    (tmp_path / "set" / "preview.png").write_bytes(PNGS[0])
    prepared = prepare_foreign(str(tmp_path / "set"), data(prepared=str(tmp_path / "cache")))
    assert Beton(*prepared.paths("test")).labels.tolist() == [0, 1, 1]


def test_one_that_is_not_there_is_told_without_secrets(tmp_path: Path) -> None:
    settings = data(prepared=str(tmp_path))
    with pytest.raises(UserError, match=r"^--ood /no/where: does not exist: give a folder of Parquet"):
        prepare_foreign("/no/where", settings)
    with pytest.raises(UserError, match=r"^--ood s4://bucket/x: .*unknown file system 's4'") as told:
        prepare_foreign("s4://me:hidden@bucket/x?secret=hidden", settings)
    assert "hidden" not in str(told.value)
