"""The native decoder: the pixels of a full decode, only where asked for, and no damage unseen."""

import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jpeg_boxes import JPEGError, decode_box
from loader_samples import picture
from PIL import Image

from bdkd_dist.data import jpeg
from bdkd_dist.data.kernels import window_of

needs_native = pytest.mark.skipif(not jpeg.available(), reason="the native decoder is not built")
SUBSAMPLINGS = {"4:4:4": 0x111111, "4:2:2": 0x211111, "4:2:0": 0x221111, "4:4:0": 0x121111, "4:1:1": 0x411111}


def encode(pixels: np.ndarray, subsampling: str, progressive: bool, restart: int, quality: int = 80) -> bytes:
    """Encode with OpenCV, which knows all subsamplings; ``grey`` keeps the first channel."""
    cv2 = pytest.importorskip("cv2")
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    options += [cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
    if subsampling == "grey":
        pixels = pixels[..., 0]
    else:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLINGS[subsampling]]
    done, encoded = cv2.imencode(".jpg", pixels, options)
    assert done
    return bytes(encoded)


def sampling(encoded: bytes) -> list[tuple[int, int]]:
    """Return the factors of each component, from the frame header."""
    place = next(place for marker in (b"\xff\xc0", b"\xff\xc2") if (place := encoded.find(marker)) > 0)
    return [divmod(encoded[place + 11 + 3 * c], 16) for c in range(encoded[place + 9])]


def pillow(encoded: bytes, reduction: int = 1) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        image.draft(None, (image.width // reduction, image.height // reduction))
        return np.asarray(image.convert("RGB"))


@needs_native
@given(
    subsampling=st.sampled_from([*SUBSAMPLINGS, "grey"]),
    progressive=st.booleans(),
    restart=st.sampled_from([0, 1, 3]),
    height=st.integers(8, 130),
    width=st.integers(8, 130),
    reduction=st.sampled_from([1, 2, 4, 8]),
    smooth=st.booleans(),
    cut=st.tuples(*[st.floats(0, 1)] * 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_a_box_has_the_pixels_of_the_full_decode(
    subsampling: str,
    progressive: bool,
    restart: int,
    height: int,
    width: int,
    reduction: int,
    smooth: bool,
    cut: tuple[float, ...],
    seed: int,
) -> None:
    pixels = picture(seed)[:height, :width]
    if not smooth:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    height, width = pixels.shape[:2]
    encoded = encode(np.ascontiguousarray(pixels), subsampling, progressive, restart)
    full = pillow(encoded, reduction)
    rows, columns = -(-height // reduction), -(-width // reduction)
    assert full.shape == (rows, columns, 3)
    top, left = int(cut[0] * (rows - 1)), int(cut[1] * (columns - 1))
    box = (top, left, 1 + int(cut[2] * (rows - top - 1)), 1 + int(cut[3] * (columns - left - 1)))
    window = decode_box(encoded, (height, width), box, reduction)
    assert window.top == top
    assert window.left <= left
    got = window.pixels[:, left - window.left :][:, : box[3]]
    assert np.array_equal(got, full[top : top + box[2], left : left + box[3]])
    assert jpeg.check(encoded)


@needs_native
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_the_cases_are_subsampled_as_they_say(subsampling: str) -> None:
    factors = divmod(SUBSAMPLINGS[subsampling] >> 16, 16)
    assert sampling(encode(picture(0), subsampling, False, 0)) == [factors, (1, 1), (1, 1)]


@needs_native
def test_columns_beside_the_box_are_left_out() -> None:
    encoded = encode(np.zeros((64, 640, 3), np.uint8), "4:2:0", False, 0)
    window = decode_box(encoded, (64, 640), (10, 300, 20, 40))
    assert window.pixels.shape[0] == 20
    assert 40 <= window.pixels.shape[1] <= 40 + 16 + 4


@needs_native
def test_rows_below_the_box_are_not_read() -> None:
    encoded = encode(picture(1), "4:2:0", False, 0)
    height, width = picture(1).shape[:2]
    cut = encoded[: len(encoded) // 2]
    upper = decode_box(cut, (height, width), (0, 0, 16, width)).pixels
    assert np.array_equal(upper, pillow(encoded)[:16])
    with pytest.raises(JPEGError, match="damaged"):
        decode_box(cut, (height, width), (0, 0, height, width))
    assert not jpeg.check(cut)


@needs_native
@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_cut_short_anywhere_is_unsound(progressive: bool) -> None:
    encoded = encode(picture(2), "4:2:0", progressive, 0)
    for length in [0, 1, 2, 20, 200, *range(300, len(encoded), 97), len(encoded) - 2]:
        assert not jpeg.check(encoded[:length]), length


@needs_native
@given(content=st.binary(max_size=200), start=st.integers(0, 3000), seed=st.integers(0, 9), progressive=st.booleans())
@example(content=bytes([150]), start=164, seed=0, progressive=False)  # another height
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_pixels_or_an_error(content: bytes, start: int, seed: int, progressive: bool) -> None:
    height, width = picture(seed).shape[:2]
    encoded = encode(picture(seed), "4:2:0", progressive, 0)
    for broken in (content, encoded[:start] + content + encoded[start + len(content) :]):
        refused = ""
        try:
            assert decode_box(broken, (height, width), (0, 0, height, width)).pixels.shape == (height, width, 3)
        except JPEGError as error:
            refused = str(error)
        if refused and jpeg.check(broken):  # sound, but of another size
            assert refused == "the JPEG is not of the declared size"
            assert Image.open(io.BytesIO(broken)).size != (width, height)


@needs_native
def test_a_warning_is_damage() -> None:
    encoded = encode(picture(3), "4:4:4", False, 0)
    stray = encoded[:-2] + bytes(range(64)) + encoded[-2:]  # libjpeg: extraneous bytes before marker
    assert np.array_equal(pillow(stray), pillow(encoded))
    assert not jpeg.check(stray)


@needs_native
@pytest.mark.parametrize("mode", ["CMYK", "RGB"])
def test_colours_that_it_leaves_to_pillow_are_told(mode: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(picture(4)).convert(mode).save(stream, "JPEG")
    assert jpeg.check(stream.getvalue()) == (mode == "RGB")
    if mode == "CMYK":
        with pytest.raises(JPEGError, match="colour space"):
            decode_box(stream.getvalue(), picture(4).shape[:2], (0, 0, 1, 1))  # type: ignore[arg-type]


@needs_native
def test_another_size_than_the_declared_one_is_told() -> None:
    height, width = picture(5).shape[:2]
    encoded = encode(picture(5), "4:2:0", False, 0)
    with pytest.raises(JPEGError, match="size"):
        decode_box(encoded, (height, width - 1), (0, 0, 1, 1))


@needs_native
def test_nothing_is_printed_and_threads_do_not_meet(capfd: pytest.CaptureFixture[str]) -> None:
    sound, cut = encode(picture(6), "4:2:0", False, 0), encode(picture(6), "4:2:0", False, 0)[:900]
    height, width = picture(6).shape[:2]
    want = pillow(sound)
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(200):
            if jpeg.check(cut):
                wrong.append("damage unseen")
            if not np.array_equal(decode_box(sound, (height, width), (0, 0, height, width)).pixels, want):
                wrong.append("pixels")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert capfd.readouterr() == ("", "")


@needs_native
@pytest.mark.slow
def test_failures_keep_no_memory(tmp_path: Path) -> None:
    # In a process of its own, as the peak is all that can be asked for.
    code = """
import resource, sys
from bdkd_dist.data import jpeg
sound = open(sys.argv[1], "rb").read()
def many(content):
    for _ in range(3000):
        jpeg.check(content)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for content in (sound, sound[:900], sound[:20]):
    many(content)
    print(many(content) - many(content))
"""
    path = tmp_path / "sound.jpg"
    path.write_bytes(encode(picture(7), "4:2:0", True, 0))
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert all(abs(int(grown)) < 500 for grown in done.stdout.split())  # KiB; 3000 kept ones would be 100 MB


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_window_covers_its_box_and_no_more(reduction: int) -> None:
    generator = np.random.default_rng(reduction)
    for _ in range(200):
        top, left, height, width = generator.integers([0, 0, 1, 1], 300).tolist()
        first_row, first_column, rows, columns = window_of(top, left, height, width, reduction)
        for start, length, first, count in ((top, height, first_row, rows), (left, width, first_column, columns)):
            touched = {pixel // reduction for pixel in range(start, start + length)}
            assert touched == set(range(first, first + count))


def test_a_library_that_was_not_built_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jpeg, "LIBRARY", tmp_path / jpeg.LIBRARY.name)
    monkeypatch.setattr(jpeg, "library", jpeg.library.__wrapped__)  # what was found before is kept
    assert jpeg.library() is None
    assert not jpeg.available()
