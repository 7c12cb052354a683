import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdkd_dist.data import kernels
from bdkd_dist.data.kernels import Pixels, reduction_of, render, resize_area


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cover(length: int, count: int) -> np.ndarray:
    """(count, length) float64: the share of each source pixel in each output pixel, by overlap of intervals."""
    edges = np.arange(count + 1) * length / count
    source = np.arange(length)
    overlap = np.minimum(edges[1:, None], source + 1) - np.maximum(edges[:-1, None], source)
    return overlap.clip(min=0) * count / length


@pytest.mark.parametrize(
    "box", [(0, 0, 90, 120), (7, 5, 64, 64), (3, 2, 80, 50), (10, 10, 20, 30), (1, 1, 1, 1), (4, 0, 41, 120)]
)
@pytest.mark.parametrize("mirror", [False, True])
def test_resizing_takes_the_mean_over_the_covered_area(box: tuple[int, int, int, int], mirror: bool) -> None:
    source, out = noise(90, 120), np.empty((40, 40, 3), np.uint8)
    top, left, height, width = box
    resize_area(source, top, left, height, width, mirror, out)
    inside = source[top : top + height, left : left + width].astype(float)
    want = np.einsum("ip,jq,pqc->ijc", cover(height, 40), cover(width, 40), inside)
    want = want[:, ::-1] if mirror else want
    assert np.abs(out - want).max() < 0.501  # whole numbers, from sums in float32


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_reduced_image_is_resized_by_shares_of_its_pixels(reduction: int) -> None:
    generator = np.random.default_rng(reduction)
    source, out = noise(30, 40), np.empty((9, 9, 3), np.uint8)
    for _ in range(20):
        top, left = generator.integers(0, 10 * reduction, 2)
        height, width = generator.integers(9 * reduction, 20 * reduction, 2)
        resize_area(source, top, left, height, width, False, out, reduction)
        enlarged = source.repeat(reduction, axis=0).repeat(reduction, axis=1)
        inside = enlarged[top : top + height, left : left + width].astype(float)
        want = np.einsum("ip,jq,pqc->ijc", cover(height, 9), cover(width, 9), inside)
        assert np.abs(out - want).max() < 0.501


def test_the_reduction_leaves_at_least_the_outputs_pixels() -> None:
    assert reduction_of(223, 999, 224) == reduction_of(447, 999, 224) == reduction_of(999, 447, 224) == 1
    assert reduction_of(448, 448, 224) == reduction_of(895, 5000, 224) == 2
    assert reduction_of(896, 896, 224) == 4
    assert reduction_of(1792, 1792, 224) == reduction_of(9999, 9999, 224) == 8


@pytest.mark.parametrize(
    ("placement", "reduction"),
    [
        ([20, 16, 32, 32, 0, 0, 1], 1),
        ([10, 16, 48, 40, 0, 0, 0], 1),
        ([10, 16, 48, 40, 2, 1, 1], 1),
        ([21, 15, 64, 80, 1, -2, 1], 2),
        ([33, 41, 129, 150, 0, 0, 0], 4),
    ],
)
def test_a_part_of_an_image_renders_as_the_whole(placement: list[int], reduction: int) -> None:
    source, whole, part = noise(60, 70), np.empty((32, 32, 3), np.uint8), np.empty((32, 32, 3), np.uint8)
    render(source, np.array(placement, np.int32), whole, reduction)
    render(np.ascontiguousarray(source[7:, 3:]), np.array(placement, np.int32), part, reduction, 7, 3)
    assert np.array_equal(whole, part)


def test_resizing_a_uniform_image_keeps_its_colour() -> None:
    source, out = np.full((97, 53, 3), [0, 128, 255], np.uint8), np.empty((31, 31, 3), np.uint8)
    resize_area(source, 0, 0, 97, 53, False, out)
    assert np.array_equal(out, np.full((31, 31, 3), [0, 128, 255]))


def test_shrinking_is_opencvs_inter_area() -> None:
    cv2 = pytest.importorskip("cv2")
    for height, width in ((300, 400), (224, 500), (251, 229), (448, 448)):
        source, out = noise(height, width), np.empty((224, 224, 3), np.uint8)
        resize_area(source, 0, 0, height, width, False, out)
        want = cv2.resize(source, (224, 224), interpolation=cv2.INTER_AREA)
        assert np.abs(out.astype(int) - want).max() <= 1  # halves round to even there, up here
        assert np.mean(out == want) > 0.99


@pytest.mark.parametrize("mirror", [0, 1])
@pytest.mark.parametrize(("down", "right"), [(0, 0), (4, -4), (-3, 1), (2, 0)])
def test_a_window_moves_over_a_border_of_zeros(down: int, right: int, mirror: int) -> None:
    source, out = noise(50, 60), np.empty((32, 32, 3), np.uint8)
    render(source, np.array([9, 11, 32, 32, down, right, mirror], np.int32), out)
    padded = np.pad(source[9:41, 11:43], ((4, 4), (4, 4), (0, 0)))
    want = padded[4 + down : 36 + down, 4 + right : 36 + right]
    assert np.array_equal(out, want[:, ::-1] if mirror else want)


def test_a_resized_image_moves_over_a_border_of_zeros() -> None:
    source, out, resized = noise(50, 60), np.empty((32, 32, 3), np.uint8), np.empty((32, 32, 3), np.uint8)
    render(source, np.array([1, 2, 48, 48, 3, -2, 1], np.int32), out)
    resize_area(source, 1, 2, 48, 48, False, resized)
    padded = np.pad(resized, ((4, 4), (4, 4), (0, 0)))
    assert np.array_equal(out, padded[7:39, 2:34][:, ::-1])


def test_functions_compile_where_no_folder_is_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    original = kernels.njit

    def njit(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return original(**options)

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels._compiled(lambda x: x + 1)(2) == 3


SAVE = """
import sys, time
from numba.core import caching
from bdkd_dist.data import kernels

load = caching.IndexDataCacheFile._load_index

def slowly(self):
    index = load(self)
    time.sleep(2)  # meanwhile another process looks which names are free
    return index

caching.IndexDataCacheFile._load_index = slowly

sys.path.insert(0, sys.argv[1])
import doubling
print(doubling.doubled({"int": 3, "float": 1.5}[sys.argv[2]]))
"""
DOUBLING = """
from bdkd_dist.data.kernels import _compiled

@_compiled
def doubled(x):
    return 2 * x
"""


@pytest.mark.slow
def test_two_processes_that_compile_for_different_types_at_once_keep_both(tmp_path: Path) -> None:
    (tmp_path / "doubling.py").write_text(DOUBLING)
    for _ in range(2):  # compiled, then as the cache has it
        commands = [[sys.executable, "-c", SAVE, str(tmp_path), kind] for kind in ("int", "float")]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        assert [process.communicate(timeout=120)[0].strip() for process in running] == ["6", "3.0"]
        assert len(list((tmp_path / "__pycache__").glob("*.nbc"))) == 2


RENDER_IN_THREADS = """
import threading, time
import numpy as np
from bdkd_dist.data.kernels import render

generator = np.random.default_rng(0)
images = [generator.integers(0, 256, (*generator.integers(230, 500, 2), 3), dtype=np.uint8) for _ in range(6)]

def rendered(image):
    out = np.empty((224, 224, 3), np.uint8)
    render(image, np.array([0, 0, *image.shape[:2], 0, 0, 0], np.int32), out, 1, 0, 0)
    return out

wanted = [rendered(image) for image in images]
wrong, end = [], time.monotonic() + 3

def work():
    while time.monotonic() < end:
        wrong.extend(not np.array_equal(rendered(image), want) for image, want in zip(images, wanted))

threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(sum(wrong), len(wrong) > 50)
"""


@pytest.mark.slow
def test_threads_that_share_the_allocator_do_not_disturb_each_other() -> None:
    # One arena for all threads: memory that a kernel frees too early is at once another's.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", RENDER_IN_THREADS], env=environment, capture_output=True, text=True)
    assert done.stdout == "0 True\n", done.stderr
