"""The command `bdkd prepare`: on this machine and on a Ray cluster, cut off by Ctrl-C and by killed workers."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_sources import data, encode, noise, write_shard
from rich.console import Console
from runs import BDKD, break_off, environment, execute

from bdkd_dist.data.beton import Beton
from bdkd_dist.data.converting import Converted, Rules, Task, finished
from bdkd_dist.data.prepared import Part, read_manifest, verify
from bdkd_dist.data.sources import find_source
from bdkd_dist.errors import UserError
from bdkd_dist.launch import prepare as launched

SHARDS, IMAGES = 4, 40


def picture(seed: int, side_px: int = 72) -> bytes:
    return encode(noise(side_px, side_px, seed), "JPEG")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four training shards of 40 images and a test shard."""
    folder = tmp_path / "in"
    for shard in range(SHARDS):
        images: list[bytes | None] = [picture(100 * shard + n) for n in range(IMAGES)]
        write_shard(folder / f"train-{shard:05d}.parquet", images, [n % 2 for n in range(IMAGES)], ["cat", "dog"])
    write_shard(
        folder / "test-00000.parquet", [picture(n) for n in range(9)], [n % 2 for n in range(9)], ["cat", "dog"]
    )
    return folder


def run(source: Path | str, out: Path, rules: Rules | None = None, **options: object) -> tuple[launched.Outcome, str]:
    """Prepare as the command does; return what it returned and what was shown."""
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    outcome = launched.prepare(str(source), out, rules or Rules(), console, **options)  # type: ignore[arg-type]
    return outcome, shown.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".verified"))


WHOLE = ["manifest.json", "test-00000.beton", *(f"train-{n:05d}.beton" for n in range(SHARDS))]


# --- on this machine


def test_the_last_lines_account_for_every_image(shards: Path, tmp_path: Path) -> None:
    write_shard(shards / "train-00001.parquet", [picture(0), b"?"], [0, 1], ["cat", "dog"])
    outcome, shown = run(shards, tmp_path / "out", Rules(undecodable="leave-out"))
    counts, report, train = outcome.lines()
    assert "test 9 = 9 stored + 0 left out; train 122 = 121 stored + 1 left out" in counts
    assert counts.startswith(f"{tmp_path}/out prepared in ")
    assert report == f"images that could not be decoded: {tmp_path}/out/left_out.parquet"
    assert train == f"train from it: data.root={tmp_path}/out data.num_classes=2"
    assert "preparing train: 122 images" in shown
    (row,) = pq.read_table(tmp_path / "out" / "left_out.parquet").to_pylist()
    assert (row["split"], row["piece"], row["position"]) == ("train", "train-00001.parquet", 41)
    again, _ = run(shards, tmp_path / "out", Rules(undecodable="leave-out"))
    assert next(again.lines()).startswith(f"{tmp_path}/out is already prepared and whole: ")


def test_what_is_there_already_is_verified(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "out")
    os.truncate(tmp_path / "out" / "train-00002.beton", 100)
    with pytest.raises(UserError, match=r"train-00002\.beton is truncated .*; delete the folder"):
        run(shards, tmp_path / "out")


def test_headers_checked_only_is_said(shards: Path, tmp_path: Path) -> None:
    outcome, _ = run(shards, tmp_path / "out", Rules(check="headers"))
    assert "of JPEGs kept as they are only the headers were checked" in list(outcome.lines())


def test_a_link_to_a_folder_is_followed(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    done = execute([str(BDKD), "prepare", str(shards), str(tmp_path / "link")])
    assert f"{tmp_path / 'disk'} prepared in" in done.stdout
    verify(read_manifest(tmp_path / "link"))


@pytest.mark.parametrize("name", ["null", "[x]", "{a: 1}", "a=b"])
def test_a_source_may_have_any_name(shards: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    outcome, _ = run(name, tmp_path / "out")
    verify(outcome.prepared)
    with pytest.raises(UserError, match="SOURCE is empty: give a folder, a URI, or one of digits, cifar10"):
        run("", tmp_path / "out")


def test_digits_need_no_files(tmp_path: Path) -> None:
    outcome, _ = run("digits", tmp_path / "out", overrides=["data.image_px=16"])
    beton = Beton(*outcome.prepared.paths("train"))
    assert set(beton.widths) == {16}
    assert len(beton) + len(Beton(*outcome.prepared.paths("test"))) == 1797


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all", "OUT"], ["/nowhere/at/all does not exist"]),
        (["SOURCE", "OUT", "--check", "header"], ["unknown --check 'header'; did you mean 'headers'?"]),
        (["SOURCE", "OUT", "--undecodable", "leave"], ["unknown --undecodable 'leave'", "leave-out"]),
        (["SOURCE", "OUT", "--quality", "200"], ["data.jpeg_quality=200"]),
        (["SOURCE", "OUT", "data.thread=2"], ["'data.thread'; did you mean 'data.threads'?"]),
        (["SOURCE", "OUT", "data.threads"], ["'data.threads' is not key=value"]),
        (["SOURCE", "SOURCE"], ["exists and is no prepared data set"]),
        (["SOURCE", "/proc/out"], ["/proc/out: "]),
        (
            ["SOURCE", "OUT", "--address", "127.0.0.1:1"],
            ["--address 127.0.0.1:1: no Ray cluster that fits answers", "auto"],
        ),
        (["SOURCE", "OUT", "--address", "here"], ["--address here: no Ray cluster that fits answers", "HOST:PORT"]),
    ],
)
@pytest.mark.slow  # another interpreter
def test_a_mistake_is_one_line(shards: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    places = {"SOURCE": str(shards), "OUT": str(tmp_path / "out")}
    done = execute([str(BDKD), "prepare", *(places.get(one, one) for one in arguments)], status=2)
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert all(word in line for word in words), line


@pytest.mark.slow  # another interpreter
def test_ctrl_c_keeps_what_is_whole_and_the_same_command_goes_on(tmp_path: Path) -> None:
    pixels = np.repeat(np.repeat(noise(60, 80), 10, axis=0), 10, axis=1)  # to be shrunk: takes a while
    large = encode(pixels, "JPEG")
    for shard in range(8):
        write_shard(tmp_path / "in" / f"train-{shard:05d}.parquet", [large] * 60, [n % 2 for n in range(60)])
    command = [str(BDKD), "prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--max-side", "400"]
    building = tmp_path / "out.building"
    status, output = break_off(command, lambda: any(building.glob("*.json")), signal.SIGINT)
    assert status == 130, output
    assert "what is whole is kept, the same command goes on" in output
    assert not (tmp_path / "out").exists()
    assert not list(building.glob("*.partial"))
    kept = {path.name.removesuffix(".json") for path in building.glob("*.json")}
    before = {name: (building / name).stat().st_ino for name in kept}
    assert 0 < len(kept) < 8
    done = execute(command)
    assert "train 480 = 480 stored + 0 left out" in done.stdout
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in kept} == before
    verify(read_manifest(tmp_path / "out"))


# --- what is shown


def test_plain_lines_come_seldom_and_say_speed_and_time_left(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(launched.time, "monotonic", lambda: now_s)
    shown = io.StringIO()
    source = find_source(data(root=str(shards)))
    mean_mb = source.splits["train"].encoded_bytes / len(source.splits["train"]) / 1e6
    with launched.preparing(Console(file=shown, width=200), source) as show:
        show("train", 20, 160)
        for now_s, done in ((101.0, 40), (110.0, 80), (112.0, 90), (120.0, 120)):  # noqa: B007
            show("train", done, 160)
    speeds = [f"6 images/s, {6 * mean_mb:,.0f} MB/s", f"5 images/s, {5 * mean_mb:,.0f} MB/s"]
    assert shown.getvalue().splitlines() == [
        "preparing train: 160 images",
        f"preparing train: 80 of 160, {speeds[0]}, 13 s left",
        f"preparing train: 120 of 160, {speeds[1]}, 8 s left",
    ]


def test_a_terminal_shows_a_bar(shards: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=120, force_terminal=True, _environ={"TERM": "xterm"})
    with launched.preparing(console, find_source(data(root=str(shards)))) as show:
        show("train", 20, 160)
        time.sleep(0.3)
        show("train", 60, 160)
        time.sleep(0.3)
        show("train", 160, 160)
    for word in ("preparing train", "160/160", "images/s", "MB/s"):
        assert word in shown.getvalue()


# --- on Ray


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_the_same_files_come_out(shards: Path, tmp_path: Path) -> None:
    write_shard(shards / "train-00001.parquet", [picture(0), b"?"], [0, 1], ["cat", "dog"])
    rules = Rules(undecodable="leave-out")
    alone, _ = run(shards, tmp_path / "alone", rules)
    on_ray, shown = run(shards, tmp_path / "ray", rules, address="local")
    assert on_ray.prepared.content == alone.prepared.content
    assert on_ray.prepared.left_out == {"train": 1}
    assert names(tmp_path / "ray") == sorted([*WHOLE, "left_out.parquet"])
    assert "preparing train: 122 images" in shown
    verify(on_ray.prepared)
    broken = run(shards, tmp_path / "out", Rules(undecodable="leave-out"))[0]
    assert broken.prepared.content == alone.prepared.content


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_mistakes_are_one_line_and_whole_pieces_kept(shards: Path, tmp_path: Path) -> None:
    write_shard(shards / "train-00003.parquet", [picture(0), b"?"], [0, 1], ["cat", "dog"])
    with pytest.raises(UserError) as raised:
        run(shards, tmp_path / "out", address="local")
    assert str(raised.value).startswith("train image 121 (train-00003.parquet row 1) cannot be decoded: ")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


SLOW = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    import numpy as np
    from rich.console import Console
    from bdkd_dist.data.converting import Rules
    from bdkd_dist.data.prepare import prepare_into
    from bdkd_dist.data.sources import Piece, Sample, Source, SourceSplit
    from bdkd_dist.launch.ray_prepare import on_ray

    class Slowly:
        def __init__(self, seed, folder):
            self.seed, self.folder = seed, folder

        def __call__(self):
            import os
            from PIL import Image
            import io
            (Path(self.folder) / f"began-{self.seed}-{os.getpid()}").touch()
            for n in range(512):
                if n >= 400:  # some batches are written, others wait
                    time.sleep(0.03)
                pixels = np.random.default_rng(1000 * self.seed + n).integers(0, 256, (200, 200, 3), dtype=np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG")
                yield Sample(stream.getvalue(), n % 2, f"made {n}")

    pieces = tuple(Piece(f"piece {s}", np.arange(512) % 2, Slowly(s, sys.argv[2]), 512 * 40_000) for s in range(3))
    source = Source("made", ("a", "b"), {"train": SourceSplit(pieces)}, "f" * 64)
    prepare_into(source, Path(sys.argv[1]), Rules(), on_ray("local"))
""")


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_killed_midway_is_replaced_and_the_files_are_whole(tmp_path: Path) -> None:
    began = tmp_path / "began"
    began.mkdir()
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "out"), str(began)], env=environment())
    building, deadline = tmp_path / "out.building", time.monotonic() + 120
    half = None
    while half is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        half = next((path for path in building.glob(".train-*.partial") if path.stat().st_size > 0), None)
        time.sleep(0.02)
    number = int(half.name.split("-")[1].split(".")[0])

    def workers() -> list[int]:
        """Those that began this piece; the driver looks at some images before, to estimate what it will need."""
        begun = [int(path.name.split("-")[2]) for path in began.glob(f"began-{number}-*")]
        return [process_id for process_id in begun if process_id != process.pid]

    (victim,) = workers()
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    assert len(workers()) == 2
    prepared = read_manifest(tmp_path / "out")
    assert names(tmp_path / "out") == ["manifest.json", *(f"train-{n:05d}.beton" for n in range(3))]
    verify(prepared)
    beton = Beton(*prepared.paths("train"))
    expected = [picture(1000 * seed + n, 200) for seed in range(3) for n in range(512)]
    assert [beton.encoded(index).tobytes() for index in range(len(beton))] == expected


@pytest.mark.ray
def test_a_file_that_another_node_wrote_elsewhere_is_named(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bdkd_dist.launch import ray_prepare

    monkeypatch.setattr(ray_prepare, "VISIBLE_WITHIN_S", 0.3)
    piece = find_source(data(root=str(shards))).splits["train"].pieces[0]
    task = Task("train", 0, piece, tmp_path / "out.building" / "train-00000.beton", "f" * 64, Rules())
    wrote = Converted(Part("train-00000.beton", IMAGES, 123, "0" * 64))
    line = f"{tmp_path}/out: train-00000.beton, which node far wrote, is not here; with --address the folder must lie"
    with pytest.raises(UserError, match=line):
        ray_prepare._see(task, wrote, "far")
    task.path.parent.mkdir()
    task.path.write_bytes(bytes(122))
    with pytest.raises(UserError, match=line):
        ray_prepare._see(task, wrote, "far")
    task.path.write_bytes(bytes(123))
    ray_prepare._see(task, wrote, "far")


@pytest.mark.ray
def test_a_node_that_does_not_see_the_folder_says_so(shards: Path, tmp_path: Path) -> None:
    from bdkd_dist.launch import ray_prepare

    piece = find_source(data(root=str(shards))).splits["train"].pieces[0]
    task = Task("train", 0, piece, tmp_path / "out.building" / "train-00000.beton", "f" * 64, Rules())
    kind, line, node = ray_prepare._convert(task)
    assert kind == "mistaken"
    assert line.startswith(f"{tmp_path}/out: the folder is not there on node {node}; ")
    assert finished(task) is None
    task.path.parent.mkdir()
    kind, converted, _ = ray_prepare._convert(task)
    assert (kind, converted.part.samples) == ("converted", IMAGES)
    assert finished(task) == converted


def test_only_asked_for_is_ray_imported(shards: Path, tmp_path: Path) -> None:
    code = "import sys, bdkd_dist.launch.prepare, bdkd_dist.cli; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
