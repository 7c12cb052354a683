import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_sources import PNGS, data, images, refuse, write_tar

from bdkd_dist.data.prepare import prepare
from bdkd_dist.data.sources import Source, open_source
from bdkd_dist.errors import UserError

LABELS = [0, 1, 1, 0, 1, 0]
WORDS = ["cat", "dog"]
MIXED = {f"{WORDS[label]}/{n}.png": PNGS[n] for n, label in enumerate(LABELS)}


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_class_folders(root: Path) -> None:
    """Two shards of training images, in which classes are mixed."""
    names = list(MIXED)
    write_tar(root / "train-0.tar", {f"./train/{name}": MIXED[name] for name in names[:4]})
    write_tar(root / "train-1.tar", {name: MIXED[name] for name in names[4:]})
    write_tar(root / "val.tar", {"val/dog/a.JPEG": PNGS[0], "val/cat/b.JPEG": PNGS[1]})


def write_web(root: Path) -> None:
    def members(numbers: range) -> dict[str, bytes]:
        pairs = [(f"{n:04}.png", PNGS[n]) for n in numbers], [(f"{n:04}.cls", str(LABELS[n]).encode()) for n in numbers]
        return dict(pair for both in zip(*pairs, strict=True) for pair in both)

    write_tar(root / "train-000.tar", members(range(4)))
    write_tar(root / "train-001.tar", members(range(4, 6)))
    write_tar(
        root / "val" / "000.tar", {"x.cls": b"1\n", "x.png": PNGS[0], "y.json": b"{}", "y.png": PNGS[1], "y.cls": b"0"}
    )


def write_tar_per_class(root: Path) -> None:
    for label, word in enumerate(WORDS):
        write_tar(root / "train" / f"{word}.tar", {f"{n}.png": PNGS[n] for n in range(6) if LABELS[n] == label})
    write_tar(root / "val" / "dog.tar", {"a.png": PNGS[0]})
    write_tar(root / "val" / "cat.tar", {"b.png": PNGS[1]})


def write_tar_of_tars(root: Path) -> None:
    inner = [tar_bytes({f"{n}.png": PNGS[n] for n in range(6) if LABELS[n] == label}) for label in (0, 1)]
    write_tar(root / "ILSVRC2012_img_train.tar", {f"{word}.tar": tar for word, tar in zip(WORDS, inner, strict=True)})
    write_tar(root / "val.tar", {"dog/a.png": PNGS[0], "cat/b.png": PNGS[1]})


LAYOUTS = {
    "class folders": write_class_folders,
    "WebDataset": write_web,
    "tar per class": write_tar_per_class,
    "tar of tars": write_tar_of_tars,
}


def labelled(source: Source, split: str) -> list[tuple[object, int]]:
    return [(sample.image, sample.label) for sample in source.splits[split].iterate()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_told_by_looking(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path)
    source = open_source(data(root=str(tmp_path)))
    assert source.class_names == (("0", "1") if layout == "WebDataset" else ("cat", "dog"))
    expected = list(zip(PNGS, LABELS, strict=True))
    assert sorted(labelled(source, "train")) == sorted(expected)
    assert sorted(labelled(source, "test")) == sorted([(PNGS[0], 1), (PNGS[1], 0)])
    if layout in ("class folders", "WebDataset"):
        assert labelled(source, "train") == expected
    for split in source.splits.values():
        assert split.labels.tolist() == [sample.label for sample in split.iterate()]
        assert split.encoded_bytes == sum(len(sample.image) for sample in split.iterate())
    origins = [sample.origin for sample in source.splits["train"].iterate()]
    assert len(set(origins)) == 6
    assert all(origin.partition(".tar member ")[1] for origin in origins)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_images_are_those_that_tarfile_unpacks(tmp_path: Path, format: int) -> None:
    with tarfile.open(tmp_path / "train.tar", "w", format=format) as tar:
        for n in range(1, 30):
            info = tarfile.TarInfo(f"{'deep/' * 40}{WORDS[n % 2]}/{'long' * 50}ä{n}.jpg")
            info.size = 700 * n
            tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    write_tar(tmp_path / "test.tar", {"cat/x.png": PNGS[0]})
    with tarfile.open(tmp_path / "train.tar") as tar:
        unpacked = [(tar.extractfile(m).read(), m.name, int("/dog/" in m.name)) for m in tar.getmembers()]
    samples = list(open_source(data(root=str(tmp_path))).splits["train"].iterate())
    assert [(s.image, s.origin, s.label) for s in samples] == [(c, f"train.tar member {n}", k) for c, n, k in unpacked]


def test_hidden_members_and_other_files_are_no_images(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    write_tar(tmp_path / "train-2.tar", {"cat/._0.png": b"x", "cat/notes.txt": b"x", "cat/.hidden.jpg": b"x"})
    write_tar(tmp_path / "._train-3.tar", {"bird/0.png": b"x"})
    assert labelled(open_source(data(root=str(tmp_path))), "train") == list(zip(PNGS, LABELS, strict=True))


def write_whole_classes(root: Path) -> None:
    """40 images of each of 4 classes, one class behind the other."""
    numbered = {f"{k}/{n}.png": bytes([k, n]) for k in range(4) for n in range(40)}
    write_tar(root / "train.tar", numbered)
    write_tar(root / "test.tar", numbered)


def test_classes_that_follow_one_another_are_mixed_in_training_alone(tmp_path: Path) -> None:
    write_whole_classes(tmp_path)
    sources = [open_source(data(root=str(tmp_path), num_classes=4)) for _ in range(2)]
    in_order = [bytes([k, n]) for k in range(4) for n in range(40)]
    assert images(sources[0], "test") == in_order
    train = images(sources[0], "train")
    assert train != sorted(train) == in_order
    assert images(sources[1], "train") == train
    labels = sources[0].splits["train"].labels
    assert labels.tolist() == [content[0] for content in train]
    for start in range(0, 160, 40):  # hypergeometric: 10 of each class, standard deviation 2.4
        assert np.bincount(labels[start : start + 40], minlength=4).min() >= 2


@pytest.mark.parametrize("layout", ["WebDataset", "tar per class"])
def test_pieces_are_tars_or_parts_of_them_and_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    LAYOUTS[layout](tmp_path)
    whole = open_source(data(root=str(tmp_path))).splits["train"]
    assert [len(piece) for piece in whole.pieces] == ([4, 2] if layout == "WebDataset" else [6])
    monkeypatch.setattr("bdkd_dist.data.sources.tars.PIECE_BYTES", 3 * len(PNGS[0]))
    monkeypatch.setattr("bdkd_dist.data.sources.tars.SMALL_PIECE_FILES", 4)
    split = open_source(data(root=str(tmp_path))).splits["train"]
    assert [len(piece) for piece in split.pieces] == ([3, 1, 2] if layout == "WebDataset" else [4, 2])
    assert list(split.iterate()) == list(whole.iterate())
    assert len({piece.name for piece in split.pieces}) == len(split.pieces)
    for piece in split.pieces:
        assert list(pickle.loads(pickle.dumps(piece.iterate))()) == list(piece.iterate())
        assert [sample.label for sample in piece.iterate()] == piece.labels.tolist()


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_finding_images_reads_headers_only(tmp_path: Path) -> None:
    for split in ("train", "test"):
        with (tmp_path / f"{split}.tar").open("wb") as file:
            for n in range(8):
                info = tarfile.TarInfo(f"{WORDS[n % 2]}/{n}.png")
                info.size = 2**26
                file.write(info.tobuf())
                file.seek(info.size, os.SEEK_CUR)  # a hole
            file.write(bytes(1024))
    before = read_bytes()
    source = open_source(data(root=str(tmp_path)))
    assert source.splits["train"].encoded_bytes == 2**29
    assert read_bytes() - before < 2**20
    before = read_bytes()
    next(source.splits["test"].iterate())
    assert read_bytes() - before < 2**27


# --- classes


def test_class_names_of_a_web_dataset_lie_beside(tmp_path: Path) -> None:
    write_web(tmp_path)
    (tmp_path / "classnames.txt").write_text("tabby cat\nhot dog\n")
    assert open_source(data(root=str(tmp_path))).class_names == ("tabby cat", "hot dog")
    (tmp_path / "classnames.txt").write_text("tabby cat\n")
    refuse(r"num_classes=2: .* has 1 classes", root=str(tmp_path))


@pytest.mark.parametrize("wrong", [b"-1", b"2"])
def test_numbers_out_of_range_are_named(tmp_path: Path, wrong: bytes) -> None:
    write_web(tmp_path)
    write_tar(tmp_path / "val" / "000.tar", {"x.png": PNGS[0], "x.cls": b"0", "y.png": PNGS[1], "y.cls": wrong})
    refuse(rf"test image 1 has label {int(wrong)} \(allowed: 0 to 1\)", root=str(tmp_path))


def test_a_test_tar_without_classes_is_unlabelled(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    write_tar(tmp_path / "test.tar", {"test/0.png": PNGS[0], "test/1.png": PNGS[1]})
    assert open_source(data(root=str(tmp_path))).splits["test"].labels.tolist() == [1, 0]


def test_the_fingerprint_follows_the_tars(tmp_path: Path) -> None:
    write_web(tmp_path)

    def fingerprint() -> str:
        return open_source(data(root=str(tmp_path))).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    named = fingerprint()
    tar = tmp_path / "val" / "000.tar"
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 1))
    assert len({first, named, fingerprint()}) == 3


@pytest.mark.parametrize("write", [write_class_folders, write_web, write_tar_per_class])
def test_tars_that_were_prepared_are_not_read_again(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "in")
    settings = data(root=str(tmp_path / "in"), prepared=str(tmp_path / "cache"))
    first = prepare(settings)
    tar = next(path for path in (tmp_path / "in").rglob("*.tar") if "train" in str(path.relative_to(tmp_path)))
    stat = tar.stat()
    tar.write_bytes(b"x" * stat.st_size)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had happened
    assert prepare(settings) == first
    for changed in (settings.model_copy(update={"num_classes": 3}), settings.model_copy(update={"max_side_px": 99})):
        with pytest.raises(UserError, match=f"{tar} is cut short or no tar"):
            prepare(changed)
    os.utime(tar)
    with pytest.raises(UserError, match=f"{tar} is cut short or no tar"):
        prepare(settings)


# --- mistakes


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"0.png": PNGS[0]}, r"train-9\.tar: 0\.png has no class: it lies in no class folder"),
        ({"train/0.png": PNGS[0]}, r"train-9\.tar: train/0\.png has no class"),
        ({"a/0.png": PNGS[0], "a/0.cls": b"1"}, r"labels are in \.cls members of some tars and in folders of others"),
    ],
)
def test_an_image_without_a_class_is_named(tmp_path: Path, members: dict[str, bytes], complaint: str) -> None:
    write_class_folders(tmp_path)
    write_tar(tmp_path / "train-9.tar", members)
    refuse(complaint, root=str(tmp_path))


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"a.png": PNGS[0], "b.png": PNGS[1], "b.cls": b"0"}, r"train-9\.tar: a\.png has no class"),
        ({"a.png": PNGS[0], "a.cls": b"cat"}, r"train-9\.tar: the \.cls of a\.png holds 'cat' \(allowed: an integer\)"),
        ({"a.png": PNGS[0], "a.jpg": PNGS[1], "a.cls": b"0"}, r"train-9\.tar has two images of one key"),
        ({"a.png": PNGS[0], "a.cls": b"\xff"}, r"train-9\.tar cannot be read"),
    ],
)
def test_mistakes_in_a_web_dataset_are_named(tmp_path: Path, members: dict[str, bytes], complaint: str) -> None:
    write_web(tmp_path)
    write_tar(tmp_path / "train-9.tar", members)
    refuse(complaint, root=str(tmp_path))


def test_a_class_that_training_does_not_have_is_named(tmp_path: Path) -> None:
    write_tar_per_class(tmp_path)
    write_tar(tmp_path / "val" / "bird.tar", {"0.png": PNGS[0]})
    refuse(r"val/bird\.tar: 0\.png is of class 'bird', which the training images do not have", root=str(tmp_path))
    (tmp_path / "train").rename(tmp_path / "other")
    refuse(r"has no train\*\.tar", root=str(tmp_path))


def test_links_to_images_are_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    with tarfile.open(tmp_path / "train-1.tar", "a") as tar:
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "cat/0.png"
        tar.addfile(link)
    refuse(r"train-1\.tar .*cat/link\.png is a link", root=str(tmp_path))


@pytest.mark.parametrize("left", ["nothing", "half a header", "a header", "part of an image", "whole images", "text"])
def test_a_tar_cut_short_is_named(tmp_path: Path, left: str) -> None:
    write_tar(tmp_path / "train.tar", {f"{WORDS[n % 2]}/{n}.png": bytes([n]) * 512 for n in range(4)})
    write_tar(tmp_path / "test.tar", {"cat/0.png": PNGS[0]})
    content = (tmp_path / "train.tar").read_bytes()
    blocks = {"nothing": 0, "half a header": 2.5, "a header": 3, "part of an image": 3.5, "whole images": 4}
    cut = b"text" * 1000 if left == "text" else content[: int(512 * blocks[left])]
    (tmp_path / "train.tar").write_bytes(cut)
    refuse(r"train\.tar is cut short or no tar: ", root=str(tmp_path))


@pytest.mark.parametrize("fault", ["gone", "other", "shorter"])
def test_a_tar_that_changes_midway_is_named(tmp_path: Path, fault: str) -> None:
    write_class_folders(tmp_path)
    source = open_source(data(root=str(tmp_path)))
    tar = tmp_path / "train-1.tar"
    if fault == "gone":
        tar.unlink()
    elif fault == "other":
        tar.write_bytes(bytes(99_999))
    else:
        tar.write_bytes(tar.read_bytes()[:-512])
    stream = source.splits["train"].iterate()
    assert [next(stream).image for _ in range(4)] == PNGS[:4]
    with pytest.raises(UserError, match=r"train-1\.tar cannot be read: ") as told:
        next(stream)
    assert "\n" not in str(told.value)
