import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fake_sources import encode, noise, smooth
from PIL import Image, ImageOps
from realdata import CLOTHING, needs_clothing
from torchvision.io import ImageReadMode, decode_image

from bdkd_dist.data import jpeg
from bdkd_dist.data.jpeg_header import has_end, plain_size
from bdkd_dist.data.storing import UNDECODABLE, Check, Stored, store

JPEG_NOISE = 6  # mean difference that JPEG at quality 90 leaves in a smooth picture, at most
needs_native = pytest.mark.skipif(not jpeg.available(), reason="the native decoder is not built")


def keep(image: bytes | np.ndarray, max_side_px: int = 512) -> Stored:
    return store(image, max_side_px, jpeg_quality=90)


def decoded(stored: Stored) -> np.ndarray:
    if isinstance(stored.content, bytes):
        image = Image.open(io.BytesIO(stored.content))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        pixels = np.asarray(image)
    else:
        pixels = stored.content
    assert pixels.shape == (stored.height, stored.width, 3)
    return pixels.astype(float)


def quantisation_and_sampling(stored: Stored) -> tuple[object, tuple[int, int]]:
    image = Image.open(io.BytesIO(stored.content))  # type: ignore[arg-type]
    return image.quantization, image.layer[0][1:3]  # type: ignore[attr-defined]


# --- how one image is stored


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_small_lossless_images_keep_their_pixels(kind: str) -> None:
    pixels = noise(64, 64) if kind != "GIF" else np.repeat(noise(64, 64)[..., :1] // 16 * 16, 3, axis=-1)
    stored = keep(encode(pixels, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert isinstance(stored.content, np.ndarray)
    np.testing.assert_array_equal(stored.content, pixels)


def test_arrays_are_stored_like_lossless_files() -> None:
    np.testing.assert_array_equal(keep(noise(32, 100)).content, noise(32, 100))
    assert isinstance(keep(smooth(65, 64)).content, bytes)


def test_small_jpegs_are_stored_as_pixels() -> None:
    jpeg = encode(smooth(64, 64), "JPEG")
    np.testing.assert_array_equal(keep(jpeg).content, np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"quality": 30}, {"subsampling": "4:4:4"}, {"keep_rgb": True}]
)
def test_jpegs_within_the_limit_keep_their_bytes(options: dict[str, object]) -> None:
    jpeg = encode(smooth(200, 512), "JPEG", **options)
    assert keep(jpeg) == Stored(jpeg, 200, 512)


def test_grey_jpegs_keep_their_bytes() -> None:
    jpeg = encode(Image.fromarray(smooth(200, 300)).convert("L"), "JPEG")
    assert keep(jpeg) == Stored(jpeg, 200, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side_px", [48, 120])
def test_images_turned_by_their_exif_are_stored_upright(orientation: int, side_px: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = encode(smooth(side_px, side_px - 8), "JPEG", quality=95, exif=exif)
    stored = keep(jpeg)
    turn = [  # what each value means, by the EXIF standard: where row 0 and column 0 of the file lie
        lambda x: x,
        lambda x: x[:, ::-1],
        lambda x: x[::-1, ::-1],
        lambda x: x[::-1],
        lambda x: x.transpose(1, 0, 2),
        lambda x: np.rot90(x, -1),
        lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        lambda x: np.rot90(x, 1),
    ][orientation - 1]
    upright = turn(smooth(side_px, side_px - 8)).astype(float)
    assert np.abs(decoded(stored) - upright).mean() < JPEG_NOISE
    passed = isinstance(stored.content, bytes) and stored.content == jpeg
    assert passed == (orientation == 1 and side_px > 64)


def test_cmyk_jpegs_become_rgb() -> None:
    cmyk = encode(Image.fromarray(smooth(100, 120)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decoded(keep(cmyk)) - smooth(100, 120)).mean() < JPEG_NOISE


def test_large_jpegs_shrink_to_the_limit() -> None:
    stored = keep(encode(smooth(900, 1200), "JPEG"), max_side_px=300)
    assert (stored.height, stored.width) == (225, 300)
    assert np.abs(decoded(stored) - smooth(225, 300)).mean() < JPEG_NOISE
    assert keep(encode(smooth(3000, 40), "JPEG"), max_side_px=300)[1:] == (300, 4)
    assert isinstance(keep(encode(smooth(900, 1200), "JPEG"), max_side_px=64).content, np.ndarray)


def test_lossless_photographs_become_jpegs_with_whole_chroma() -> None:
    quality_90 = Image.open(io.BytesIO(encode(smooth(80, 100), "JPEG", quality=90)))
    stored = keep(encode(smooth(80, 100), "PNG"))
    assert np.abs(decoded(stored) - smooth(80, 100)).mean() < JPEG_NOISE
    assert quantisation_and_sampling(stored) == (quality_90.quantization, (1, 1))
    assert quantisation_and_sampling(keep(encode(smooth(80, 600), "JPEG")))[1] == (2, 2)


def test_transparency_is_dropped() -> None:
    alpha = np.dstack([noise(20, 20), np.arange(400, dtype=np.uint16).reshape(20, 20).astype(np.uint8)])
    np.testing.assert_array_equal(keep(encode(alpha)).content, noise(20, 20))
    grey_alpha = np.dstack([noise(20, 20)[..., 0], np.zeros((20, 20), np.uint8)])
    np.testing.assert_array_equal(keep(encode(grey_alpha)).content, np.repeat(noise(20, 20)[..., :1], 3, axis=-1))


@pytest.mark.filterwarnings("error")
def test_palette_images_show_their_colours() -> None:
    palette = noise(1, 16).reshape(-1)
    picture = Image.fromarray(noise(20, 20)[..., 0] % 16).convert("P")
    picture.putdata((noise(20, 20)[..., 0] % 16).reshape(-1).tolist())
    picture.putpalette(palette.tolist())
    expected = palette.reshape(16, 3)[noise(20, 20)[..., 0] % 16]
    np.testing.assert_array_equal(keep(encode(picture)).content, expected)
    np.testing.assert_array_equal(keep(encode(picture, transparency=bytes(range(16)))).content, expected)


def test_16_bit_images_keep_their_upper_8_bits() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (20, 20), dtype=np.uint16)
    expected = np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(keep(encode(Image.fromarray(values))).content, expected)
    np.testing.assert_array_equal(keep(encode(Image.fromarray(values), "TIFF")).content, expected)


def test_black_and_white_images_become_rgb() -> None:
    bits = noise(20, 20)[..., 0] > 127
    expected = np.repeat(np.where(bits, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(keep(encode(Image.fromarray(bits))).content, expected)


def turned(orientation: int, kind: str = "JPEG", side_px: int = 120, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(smooth(side_px, side_px - 8), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_stand_as_torchvision_shows_them(orientation: int, kind: str) -> None:
    encoded = turned(orientation, kind, **({"quality": 95} if kind == "JPEG" else {}))
    shown = decode_image(
        torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB, apply_exif_orientation=True
    )
    assert np.abs(decoded(keep(encoded)) - shown.permute(1, 2, 0).numpy()).mean() < JPEG_NOISE


@pytest.mark.parametrize("orientation", [1, 6])  # torchvision does not turn WebP
def test_webp_is_turned_by_its_exif(orientation: int) -> None:
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(turned(orientation, "WEBP"))))
    assert np.abs(decoded(keep(turned(orientation, "WEBP"))) - np.asarray(shown)).mean() < JPEG_NOISE


def test_xmp_turns_an_image_as_pillow_has_it() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    encoded = encode(smooth(200, 300), "JPEG", xmp=xmp)
    assert Image.open(io.BytesIO(encoded)).getexif()[0x0112] == 6
    assert keep(encoded)[1:] == (300, 200)


def test_an_adobe_cmyk_jpeg_shows_its_colours() -> None:
    cmyk = encode(Image.fromarray(smooth(100, 120)).convert("CMYK"), "JPEG", quality=95)
    shown = np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB"))
    assert np.abs(decoded(keep(cmyk)) - shown).mean() < JPEG_NOISE


def test_pictures_in_one_file_keep_the_first(tmp_path: Path) -> None:
    first, second = (Image.fromarray(p) for p in (smooth(100, 120), noise(100, 120)))
    first.save(tmp_path / "pair.mpo", save_all=True, append_images=[second], quality=95)
    assert np.abs(decoded(keep((tmp_path / "pair.mpo").read_bytes())) - smooth(100, 120)).mean() < JPEG_NOISE


# --- what a JPEG's head says


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"c" * 300}, {"dpi": (72, 72)}])
@pytest.mark.parametrize("grey", [False, True])
def test_a_plain_jpeg_says_its_size(options: dict[str, object], grey: bool) -> None:
    picture = Image.fromarray(smooth(90, 200))
    assert plain_size(encode(picture.convert("L") if grey else picture, "JPEG", **options)) == (90, 200)


def test_fill_bytes_between_segments_are_passed() -> None:
    encoded = encode(smooth(90, 200), "JPEG")
    assert plain_size(encoded[:2] + b"\xff\xff" + encoded[2:]) == (90, 200)


def test_other_jpegs_are_left_to_pillow() -> None:
    assert plain_size(turned(1)) is None
    assert plain_size(encode(Image.fromarray(smooth(90, 200)).convert("CMYK"), "JPEG")) is None
    assert plain_size(encode(smooth(90, 200))) is None
    assert plain_size(b"") is None
    encoded = bytearray(encode(smooth(90, 200), "JPEG"))
    frame = encoded.index(b"\xff\xc0")
    twelve = encoded.copy()
    twelve[frame + 4] = 12
    assert plain_size(bytes(twelve)) is None
    lossless = encoded.copy()
    lossless[frame + 1] = 0xC3
    assert plain_size(bytes(lossless)) is None


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_in_its_head_says_no_size(progressive: bool) -> None:
    encoded = encode(smooth(90, 200), "JPEG", progressive=progressive)
    scan = encoded.index(b"\xff\xda")
    assert all(plain_size(encoded[:cut]) is None for cut in range(scan))


@needs_clothing
def test_photographs_say_the_size_that_pillow_sees() -> None:
    rows = pq.read_table(CLOTHING / "test-00000-of-00001.parquet").column("image").to_pylist()
    sizes = [(plain_size(row["bytes"]), Image.open(io.BytesIO(row["bytes"])).size[::-1]) for row in rows]
    assert all(ours in (None, theirs) for ours, theirs in sizes)
    assert sum(ours is not None for ours, _ in sizes) > 300


# --- damage

CHECKS: list[Check] = ["full", "headers"]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": Image.Exif()}])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_jpeg_cut_short_is_refused(check: Check, options: dict[str, object], share: float) -> None:
    encoded = encode(noise(200, 300), "JPEG", **options)
    with pytest.raises(UNDECODABLE):
        store(encoded[: int(share * len(encoded))], 512, 90, check)


@pytest.mark.parametrize("check", CHECKS)
def test_bytes_after_the_end_do_no_harm(check: Check) -> None:
    trailed = encode(smooth(200, 300), "JPEG") + bytes(100)
    assert store(trailed, 512, 90, check) == Stored(trailed, 200, 300)


def test_the_end_of_a_thumbnail_is_not_the_end() -> None:
    thumbnail = encode(smooth(16, 16), "JPEG")
    segment = b"\xff\xed" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    encoded = encode(smooth(200, 300), "JPEG")
    assert has_end(encoded[:2] + segment + encoded[2:] + b"\0")
    assert not has_end(encoded[:2] + segment + encoded[2:-2])


def test_headers_alone_let_damage_in_the_pixels_pass_and_a_full_check_does_not() -> None:
    encoded = bytearray(encode(noise(200, 300), "JPEG"))
    middle = len(encoded) // 2
    encoded[middle : middle + 40] = b"\xff\xd3" * 20  # restart marks that nobody announced
    damaged = bytes(encoded)
    assert store(damaged, 512, 90, "headers").content == damaged
    if jpeg.available():
        assert store(damaged, 512, 90, "full").content != damaged


@needs_native
def test_a_jpeg_of_which_libjpeg_warns_is_stored_as_pillow_shows_it() -> None:
    encoded = encode(smooth(200, 300), "JPEG", quality=95)
    scan = encoded.index(b"\xff\xda")
    stray = encoded[:scan] + b"\x00\x01\x02" + encoded[scan:]  # bytes between segments: skipped with a warning
    assert not jpeg.check(stray)
    stored = keep(stray)
    assert isinstance(stored.content, bytes)
    assert jpeg.check(stored.content)
    assert np.abs(decoded(stored) - np.asarray(Image.open(io.BytesIO(stray)))).mean() < JPEG_NOISE


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_without_the_native_decoder_the_same_is_stored(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(smooth(200, 300), "JPEG", **options)
    with_native = keep(encoded)
    monkeypatch.setattr(jpeg, "available", lambda: False)
    assert keep(encoded) == with_native
    with pytest.raises(UNDECODABLE):
        keep(encoded[: len(encoded) // 2])
