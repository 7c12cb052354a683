"""`bdkd compare` on real runs: what it takes, what it writes, what it refuses, and its page in a real browser."""

import hashlib
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from browser import browser, needs_browser
from PIL import Image
from rich.console import Console
from runs import BDKD, command, environment, execute
from s3_server import Storage

from bdkd_dist.errors import UserError
from bdkd_dist.launch.compare import compare

pytestmark = pytest.mark.slow
FILES = ["accuracy_ece.png", "methods.parquet", "reliability.png", "report.html", "runs.parquet"]
TINY = ["models.teacher=resnet8", "data.train_limit=130", "train.epochs=1", "data.loader=resident"]
TRAINED = {"bdkd-0": ("bdkd", 0), "dml-0": ("dml", 0), "bdkd-1": ("bdkd", 1), "dml-1": ("dml", 1)}


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two objectives, two seeds each, a little training."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (objective, seed) in TRAINED.items():
        chosen = [f"objective.name={objective}", f"train.seed={seed}"]
        execute(command(cache, folder, *TINY, *chosen, name=name))
    return folder


def named(folder: Path) -> list[str]:
    return [str(folder / name) for name in TRAINED]


def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def compared(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the command made, and what it printed."""
    folder = tmp_path_factory.mktemp("here")
    done = subprocess.run(
        [str(BDKD), "compare", *named(runs)], capture_output=True, text=True, cwd=folder, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "comparison", done.stdout


def test_the_command_writes_a_page_pictures_and_tables_and_says_where(compared: tuple[Path, str]) -> None:
    out, said = compared
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert said.rstrip().splitlines()[-1].split() == ["report", "comparison/report.html"]
    assert "A  objective bdkd" in said
    assert "B  objective dml" in said
    assert max(map(len, said.splitlines())) <= 100
    for name in ("accuracy_ece.png", "reliability.png"):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 20


def test_figures_are_those_of_the_runs_results(compared: tuple[Path, str], runs: Path) -> None:
    out, said = compared
    rows = pq.read_table(out / "runs.parquet").to_pylist()
    assert len(rows) == 8
    for row in rows:
        results = json.loads((Path(row["run"]) / "results.json").read_text())["test"][row["network"]]
        assert Path(row["run"]).name in TRAINED
        assert (row["method"], row["seed"]) == ("AB"[row["run"].endswith(("dml-0", "dml-1"))], int(row["run"][-1]))
        for kind in ("raw", "temperature_scaled", "vector_scaled"):
            assert all(row[f"{kind}_{metric}"] == value for metric, value in results[kind].items())
    top1 = np.array([row["raw_top1"] for row in rows if row["method"] == "A" and row["network"] == "student"])
    assert f"{100 * top1.mean():.2f} ± {100 * np.std(top1, ddof=1):.2f}" in said


def test_differences_are_those_of_the_predictions(compared: tuple[Path, str], runs: Path) -> None:
    rows = pq.read_table(compared[0] / "methods.parquet").to_pylist()
    (row,) = [row for row in rows if row["method"] == "B" and row["network"] == "student"]
    correct, nll = {}, {}
    for name in TRAINED:
        table = pq.read_table(runs / name / "predictions/test.parquet").to_pydict()
        correct[name] = np.array([t[0] for t in table["student_top5"]]) == np.array(table["label"])
        nll[name] = np.array(table["student_nll"])
    for metric, of in (("top1", correct), ("nll", nll)):
        per_image = (of["dml-0"] * 1.0 + of["dml-1"] - of["bdkd-0"] - of["bdkd-1"]) / 2
        assert row[f"difference_{metric}_value"] == pytest.approx(per_image.mean(), abs=1e-12)
        draws = np.random.default_rng(0).integers(len(per_image), size=(2000, len(per_image)))
        low, high = np.quantile(per_image[draws].mean(1), [0.025, 0.975])
        assert row[f"difference_{metric}_low"] == pytest.approx(low, abs=1e-12)
        assert row[f"difference_{metric}_high"] == pytest.approx(high, abs=1e-12)


def test_results_say_on_which_images(runs: Path, cache: Path) -> None:
    said = [json.loads((runs / name / "results.json").read_text())["data"] for name in TRAINED]
    prepared = {}
    for path in cache.glob("digits-*/manifest.json"):  # other tests prepare digits of other sizes
        splits = json.loads(path.read_text())["splits"]
        sums = {name: [part["sha256"] for part in parts] for name, parts in sorted(splits.items())}
        prepared[hashlib.sha256(json.dumps(sums).encode()).hexdigest()] = path
    path = prepared[said[0]["fingerprint"]]
    assert len({one["fingerprint"] for one in said}) == 1
    files = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.parent.glob("test-*.beton"))]
    assert [one["test_fingerprint"] for one in said] == 4 * [hashlib.sha256(json.dumps(files).encode()).hexdigest()]


def test_runs_tested_on_other_files_are_said(runs: Path, tmp_path: Path) -> None:
    places = [shutil.copytree(runs / name, tmp_path / name) for name in ("bdkd-0", "dml-0")]
    results = json.loads((places[1] / "results.json").read_text())
    results["data"]["test_fingerprint"] = "0" * 64
    (places[1] / "results.json").write_text(json.dumps(results))
    console = Console(file=io.StringIO(), width=300)
    page = compare([str(place) for place in places], tmp_path / "out", console)
    line = f"{places[1]} was tested on other files than {places[0]}: on other images, or on the same ones stored in"
    assert line in console.file.getvalue()  # type: ignore[attr-defined]
    assert line in page.read_text()


def test_seeds_taught_by_their_own_teachers_are_one_method_while_these_are_there(runs: Path, tmp_path: Path) -> None:
    places = []
    for seed in (0, 1):
        shutil.copytree(runs / f"dml-{seed}", tmp_path / f"by-{seed}")
        places.append(shutil.copytree(runs / f"bdkd-{seed}", tmp_path / f"taught-{seed}"))
        recipe = yaml.safe_load((places[-1] / "recipe.yaml").read_text())
        recipe["models"]["teacher_checkpoint"] = str(tmp_path / f"by-{seed}")
        (places[-1] / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def methods() -> list[str]:
        compare([str(place) for place in places], tmp_path / "out", quiet())
        table = pq.read_table(tmp_path / "out/runs.parquet", filters=[("network", "==", "student")])
        return table["method"].to_pylist()

    assert methods() == ["A", "A"]
    results = json.loads((tmp_path / "by-1/results.json").read_text())
    results["data"]["fingerprint"] = "0" * 64
    (tmp_path / "by-1/results.json").write_text(json.dumps(results))
    assert methods() == ["A", "B"], "a teacher of other images"
    (tmp_path / "by-1/results.json").unlink()
    assert methods() == ["A", "A"], "a teacher of unknown images"
    (tmp_path / "by-1").rename(tmp_path / "moved")
    assert methods() == ["A", "B"]


def test_a_trial_that_was_not_tested_and_unequal_seeds_are_said(search: Path, runs: Path, tmp_path: Path) -> None:
    (search / "trials/0002-dml-1/trial.json").write_text("{}")
    with pytest.raises(UserError, match=r"0002-dml-1 is a trial that was not tested; a search with --test all"):
        compare([str(search / "trials/0002-dml-1")], tmp_path / "out", quiet())
    (search / "trials/0002-dml-1/trial.json").unlink()
    compare([str(runs / name) for name in ("bdkd-0", "bdkd-1", "dml-0")], tmp_path / "out", quiet())
    assert "B was trained with other seeds than A" in (tmp_path / "out/report.html").read_text()
    compare(named(runs), tmp_path / "out", quiet())
    assert "other seeds" not in (tmp_path / "out/report.html").read_text()


def test_a_comparison_is_made_anew_and_anything_else_is_kept(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(named(runs), out, quiet())
    (out / "notes.txt").write_text("mine")
    compare(named(runs)[:2], out, quiet())
    assert pq.read_table(out / "runs.parquet").num_rows == 4
    assert (out / "notes.txt").read_text() == "mine"
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "report.html").write_text("mine")
    with pytest.raises(UserError, match=r"thesis exists and holds no comparison; choose another folder"):
        compare(named(runs), other, quiet())
    assert {path.name: path.read_text() for path in other.iterdir()} == {"report.html": "mine"}
    with pytest.raises(UserError, match="is a file"):
        compare(named(runs), other / "report.html", quiet())


@pytest.fixture(scope="module")
def search(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of three trials, the third of them stopped before its test."""
    folder = tmp_path_factory.mktemp("search")
    for number, name in enumerate(["bdkd-0", "dml-0", "dml-1"]):
        shutil.copytree(runs / name, folder / f"trials/{number:04}-{name}")
    (folder / "trials/0002-dml-1/results.json").unlink()
    (folder / "search.yaml").write_text("{}")
    return folder


def test_of_a_search_all_tested_trials_are_compared(search: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    compare([str(search)], tmp_path / "out", Console(file=said, width=200))
    assert "1 of 3 trials were not tested, and are left out" in said.getvalue()
    rows = pq.read_table(tmp_path / "out/methods.parquet").to_pylist()
    assert [(row["label"], row["network"], row["runs"]) for row in rows] == [
        ("objective bdkd", "student", 1),
        ("objective bdkd", "teacher", 1),
        ("objective dml", "student", 1),
        ("objective dml", "teacher", 1),
    ]


def test_runs_and_searches_at_uris_give_the_same_files(
    runs: Path, search: Path, storage: Storage, tmp_path: Path
) -> None:
    for path in sorted(file for name in TRAINED for file in (runs / name).rglob("*")):
        if path.is_file() and path.suffix in (".yaml", ".json", ".parquet"):
            storage.write(f"runs/{path.relative_to(runs).as_posix()}", path.read_bytes())
    there = [storage.uri(f"runs/{name}") for name in TRAINED]
    compare(named(runs), tmp_path / "here", quiet())
    compare([(runs / "bdkd-0").as_uri(), *there[1:]], tmp_path / "there", quiet())
    for name in ("accuracy_ece.png", "reliability.png"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    tables = [pq.read_table(tmp_path / side / "runs.parquet").drop_columns(["run"]) for side in ("here", "there")]
    assert tables[0].equals(tables[1])
    page = (tmp_path / "there/report.html").read_text()
    assert "s3://lab/runs/dml-0" in page
    assert "endpoint_override" not in page
    for path in sorted((search / "trials").rglob("*")):
        if path.is_file() and path.suffix in (".yaml", ".json", ".parquet"):
            storage.write(f"found/trials/{path.relative_to(search / 'trials').as_posix()}", path.read_bytes())
    compare([storage.uri("found")], tmp_path / "found", quiet())
    assert pq.read_table(tmp_path / "found/methods.parquet").num_rows == 4


def unfinished(folder: Path) -> str:
    (folder / "bdkd-0/results.json").unlink()
    return r"bdkd-0 is not finished \(it holds no results.json\)"


def without_predictions(folder: Path) -> str:
    shutil.rmtree(folder / "bdkd-0/predictions")
    return r"bdkd-0 holds no predictions/test.parquet; bdkd evaluate .*bdkd-0 writes it"


def without_recipe(folder: Path) -> str:
    (folder / "bdkd-0/recipe.yaml").unlink()
    return "bdkd-0 is not a run folder"


def damaged(folder: Path) -> str:
    (folder / "bdkd-0/results.json").write_bytes(b"{")
    return "bdkd-0/results.json cannot be read"


def misspelt(folder: Path) -> str:
    (folder / "bdkd-0").rename(folder / "bdkd-9")
    return r"there is no run .*bdkd-0; did you mean 'bdkd-9'\?"


def of_other_data(folder: Path) -> str:
    recipe = folder / "dml-0/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("dataset: digits", "dataset: cifar10"))
    return "dml-0 and .*bdkd-0 are of different data: data.dataset is cifar10 there, digits here"


def no_search(folder: Path) -> str:
    (folder / "bdkd-0/recipe.yaml").unlink()
    (folder / "bdkd-0/trials/0000-x").mkdir(parents=True)
    return "bdkd-0: none of its 1 trials is tested yet"


def not_begun(folder: Path) -> str:
    (folder / "bdkd-0/recipe.yaml").rename(folder / "bdkd-0/search.yaml")
    return "bdkd-0: none of its 0 trials is tested yet"


SPOILT = [
    *(unfinished, without_predictions, without_recipe, damaged, misspelt, of_other_data),
    *(no_search, not_begun),
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_cannot_be_compared_is_one_line_and_nothing_is_written(
    spoil: Callable[[Path], str], runs: Path, tmp_path: Path
) -> None:
    for name in ("bdkd-0", "dml-0"):
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    message = spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        compare([str(tmp_path / "bdkd-0"), str(tmp_path / "dml-0")], tmp_path / "out", quiet())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_is_given_once_however_it_is_written(runs: Path, search: Path, tmp_path: Path) -> None:
    one = runs / "bdkd-0"
    (tmp_path / "link").symlink_to(one)
    for again in (f"{one}/", str(runs / "dml-0/../bdkd-0"), one.as_uri(), str(tmp_path / "link")):
        with pytest.raises(UserError, match="is given twice"):
            compare([str(one), again], tmp_path / "out", quiet())
    with pytest.raises(UserError, match="is given twice"):
        compare([str(search / "trials/0001-dml-0"), str(search)], tmp_path / "out", quiet())


def test_a_mistake_ends_the_command_with_status_2_and_one_line(runs: Path, tmp_path: Path) -> None:
    done = execute([str(BDKD), "compare", str(runs / "bdkd-7"), "--out", str(tmp_path / "out")], status=2)
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "did you mean 'bdkd-" in done.stderr
    done = execute([str(BDKD), "compare", str(runs / "bdkd-0"), "--out", "s3://lab/out"], status=2)
    assert "--out s3:/lab/out: give a folder of this machine" in done.stderr


@needs_browser
@pytest.mark.parametrize("width_px", [390, 1280])
def test_the_page_holds_together_in_a_browser(compared: tuple[Path, str], width_px: int) -> None:
    with browser() as tab:
        tab.show(compared[0] / "report.html", width_px)
        assert tab.errors == []
        assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}
        assert tab.run("document.documentElement.scrollWidth") <= width_px
        dom = tab.dom()
        for heading in ("On the test images", "Differences from A", "Reliability diagrams", "By class", "Runs"):
            assert heading in dom
        tab.click("table button")
        tab.click("table button")
        assert tab.run("document.querySelector('tbody td').textContent") == "B  objective dml"
        assert tab.errors == []
