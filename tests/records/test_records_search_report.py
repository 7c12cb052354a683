import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from search_samples import lost, report, searched, trial

from bdkd_dist import config
from bdkd_dist.engine.observer import SamplePredictions
from bdkd_dist.metrics.goals import Goal
from bdkd_dist.records.predictions import write_predictions
from bdkd_dist.records.results import write_results
from bdkd_dist.records.search_report import FILES, SearchSummary, write_report
from bdkd_dist.records.trials import Trial

NLL, PARETO = Goal.parse("nll"), Goal.parse("pareto")
RECIPE = config.load("digits", ["run.name=weighting", "train.epochs=15"])
SUMMARY = SearchSummary(
    name="weighting",
    space="bdkd_weighting",
    space_rows=(("objective.nu_forward", "0.5 to 8, logarithmic"), ("objective.gate", "hard, soft")),
    goal="nll",
    search="tpe",
    scheduler="asha",
    num_trials=24,
    seed=0,
    command="bdkd tune tune_spaces/bdkd_weighting.py digits",
    began="2026-11-24 10:00",
    ended="2026-11-24 11:30",
    device="CPU",
)


@dataclass
class Read(HTMLParser):
    """What a reader finds on a page: headings, paragraphs, tables, and what its figures show."""

    headings: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._within: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2"):
            self.headings.append("")
        elif tag == "p":
            self.texts.append("")
        elif tag == "svg":
            self.shown.append(dict(attrs)["aria-label"] or "")
        self._within.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "td" in self._within or "th" in self._within:
            self.tables[-1][-1][-1] += data
        elif {"h1", "h2"} & set(self._within):
            self.headings[-1] += data
        elif "p" in self._within:
            self.texts[-1] += data

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def table(self, head: str) -> list[dict[str, str]]:
        """The rows of the first table that has such a column."""
        (heads, *rows) = next(table for table in self.tables if head in table[0])
        return [dict(zip(heads, row, strict=True)) for row in rows]


def read(folder: Path) -> Read:
    page = Read()
    page.feed((folder / "report.html").read_text())
    return page


def leave_results(folder: Path, of: Trial) -> None:
    """Lay a tested trial's results and predictions into the search's folder: four images, three of them right."""
    run = folder / "trials" / of.name
    (run / "predictions").mkdir(parents=True)
    raw = {"top1": 0.75, "ece": 0.05, "adaece": 0.04, "nll": 0.9, "brier": 0.3, "count": 4.0}
    network = {
        "raw": raw,
        "temperature_scaled": raw | {"ece": 0.01},
        "temperature": 1.25,
        "vector_scaled": None,
        "intervals": {},
    }
    split = {"student": network, "teacher": network}
    write_results(run / "results.json", {"validation": split, "test": split, "step": 10, "epochs": 15})
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
    says = SamplePredictions(torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1]]), probabilities, torch.ones(4).double())
    labels = torch.tensor([0, 1, 1, 0])
    networks = {"student": says, "teacher": says}
    write_predictions(run / "predictions" / "test.parquet", torch.arange(4), labels, networks, ["a", "b"])


def test_all_files_are_there_and_the_table_is_the_trials(tmp_path: Path) -> None:
    trials = searched()
    made = write_report(tmp_path, SUMMARY, trials, NLL, RECIPE)
    assert [path.name for path in made] == list(FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert pq.read_table(tmp_path / "trials.parquet")["number"].to_pylist() == list(range(24))
    rows = {row["trial"]: row for row in read(tmp_path).table("minutes")}
    assert len(rows) == 24
    for one in trials:
        row = rows[str(one.number)]
        assert row["epochs"] == str(one.reports[-1].epoch if one.reports else 0)
        assert row["lr"] == f"{one.values['optimizer.lr']:.4g}"
        assert row["NLL"] == (f"{one.metrics['student/nll']:.4f}" if one.reports else "–")
    finished = [one for one in trials if one.status == "finished"]
    best = min(finished, key=lambda one: one.metrics["student/nll"])
    assert [number for number, row in rows.items() if row["status"] == "chosen"] == [str(best.number)]
    assert next(iter(rows)) == str(best.number), "the best comes first"
    assert config.load(str(tmp_path / "best.yaml")).optimizer.lr == best.values["optimizer.lr"]


def test_figures_of_a_tested_trial_say_their_split_and_scaling(tmp_path: Path) -> None:
    trials = [trial(0, nu_forward=1.0, nll=0.8), trial(1, nu_forward=2.0)]
    leave_results(tmp_path, trials[0])
    write_report(tmp_path, SUMMARY, trials, NLL, RECIPE)
    page = read(tmp_path)
    rows = [(row["network"], row["split"], row["ECE %"], row["T"]) for row in page.table("split")]
    assert rows == [
        ("student", "validation", "3.00", "1.00"),
        ("student", "test", "5.00", "1.00"),
        ("student", "test, T-scaled", "1.00", "1.25"),
        ("teacher", "validation", "–", "1.00"),
        ("teacher", "test", "5.00", "1.00"),
        ("teacher", "test, T-scaled", "1.00", "1.25"),
    ]
    assert "The test split was looked at once, after that, for 1 trial." in page.text
    assert [row["test top-1 %"] for row in page.table("minutes")] == ["75.00", "–"]
    assert pq.read_table(tmp_path / "trials.parquet")["test/student/temperature_scaled/ece"].to_pylist() == [0.01, None]
    assert "Reliability diagrams" in page.headings


def test_diagrams_are_of_the_tested_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bdkd_dist.records import search_page

    drawn = {}
    original = search_page.reliability_figure
    monkeypatch.setattr(
        search_page, "reliability_figure", lambda networks: drawn.update(networks) or original(networks)
    )
    trials = [trial(3, nu_forward=1.0), trial(1, nu_forward=2.0, nll=1.1)]
    leave_results(tmp_path, trials[0])
    write_report(tmp_path, SUMMARY, trials, NLL, RECIPE)
    assert list(drawn) == ["trial 3, student", "trial 3, teacher"]
    found = drawn["trial 3, student"]
    count, accuracy = np.array(found.reliability.count), np.array(found.reliability.accuracy)
    assert count.tolist() == [0] * 8 + [1] + [0] * 2 + [1, 0, 2, 0]  # 0.6 in (8/15, 9/15], 0.8 in (11/15, 12/15]
    np.testing.assert_allclose(accuracy[count > 0], [1, 1, 0.5])
    assert found.metrics["ece"] == pytest.approx((0.4 + 0.2 + 2 * 0.4) / 4)


def test_a_front_has_a_row_a_trial_and_says_which_is_the_recipe(tmp_path: Path) -> None:
    trials = [
        trial(0, top1=0.60, ece=0.01, nll=1.2, nu_forward=1.0),
        trial(1, top1=0.70, ece=0.02, nll=1.0, nu_forward=2.0),
        trial(2, top1=0.65, ece=0.03, nll=0.9, nu_forward=3.0),
    ]
    write_report(tmp_path, SUMMARY, trials, PARETO, RECIPE)
    page = read(tmp_path)
    assert [(row["trial"], row["network"]) for row in page.table("split")] == [("1", "student"), ("0", "student")]
    assert "The first, trial 1, is in best.yaml" in page.text
    assert "The test split has not been looked at." in page.text


def test_a_constraint_that_nothing_meets_names_the_nearest_and_leaves_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text("of an earlier report")
    trials = [trial(0, ece=0.03, nu_forward=1.0), trial(1, ece=0.02, nu_forward=2.0)]
    goal = Goal.parse("accuracy", ["student/ece<=0.01"])
    made = write_report(tmp_path, SUMMARY, trials, goal, RECIPE)
    assert "best.yaml" not in [path.name for path in (*made, *tmp_path.iterdir())]
    assert "no trial trained to the end meets student/ece<=0.01. The nearest is trial 1" in read(tmp_path).text


def test_few_trials_have_no_importance_and_the_page_says_so(tmp_path: Path) -> None:
    (tmp_path / "importance.png").write_bytes(b"of an earlier report")
    write_report(tmp_path, SUMMARY, [trial(n, nll=1.0 + n, nu_forward=1.0 + n) for n in range(5)], NLL, RECIPE)
    assert not (tmp_path / "importance.png").exists()
    assert "that takes 8 trials" in read(tmp_path).text


def test_failed_trials_stand_there_with_their_reasons(tmp_path: Path) -> None:
    write_report(tmp_path, SUMMARY, [trial(0), lost(1)], NLL, RECIPE)
    page = read(tmp_path)
    assert [row["reason"] for row in page.table("reason")] == ["out of memory"]
    assert "2 trials: 1 trained to the end, 1 failed" in page.text
    assert "Failed trials" in page.headings


def test_the_cost_counts_epochs_hours_and_what_stopping_saved(tmp_path: Path) -> None:
    stopped = trial(1, status="stopped", epoch=5)
    stopped.reports = [report(2, 0.5, 0.1, 2.0, 100.0), report(5, 0.6, 0.1, 1.9, 200.0)]
    stopped.device_s = 600.0
    whole = trial(0, epoch=15)
    whole.device_s = 3000.0
    failed = trial(2, status="failed", epoch=4)
    failed.device_s = 0.0
    write_report(tmp_path, SUMMARY, [whole, stopped, failed], NLL, RECIPE)
    # Ten epochs were left of the stopped one, at 60 s each: 10 of 34 epochs; what a failed one lacks is not saved.
    assert "24 epochs in 3 trials; 5 min of training, added up over trials, 1.00 CPU hours" in read(tmp_path).text
    assert "Early stopping saved 10 epochs, 29 % of what all trials would have trained to the end: about 10 min" in (
        read(tmp_path).text
    )


def test_a_schedule_has_a_table(tmp_path: Path) -> None:
    key = "objective.nu_forward"
    best = trial(2, nu_forward=4.0)
    best.reports = [report(epoch, 0.5, 0.1, 2.0, **{key: nu}) for epoch, nu in ((2, 1.5), (4, 1.5), (6, 3.0))]
    write_report(tmp_path, SUMMARY, [best], NLL, RECIPE)
    rows = read(tmp_path).table("from epoch")
    assert [tuple(row.values()) for row in rows] == [("1", "4", "1.5"), ("5", "6", "3")]


def test_what_was_searched_stands_on_the_page(tmp_path: Path) -> None:
    write_report(tmp_path, SUMMARY, searched(10), NLL, RECIPE)
    page = read(tmp_path)
    assert [tuple(row.values()) for row in page.table("tried")] == list(SUMMARY.space_rows)
    about = {row[""]: row["this search"] for row in page.table("this search")}
    assert about["goal"] == "nll: student/nll (less is better)"
    assert (about["scheduler"], about["command"]) == ("asha", SUMMARY.command)


def test_nothing_finished_is_a_report_all_the_same(tmp_path: Path) -> None:
    made = write_report(tmp_path, SUMMARY, [lost(0), trial(1, status="stopped")], NLL, RECIPE)
    assert "report.html" in [path.name for path in made]
    assert "No trial was trained to the end: nothing is chosen." in read(tmp_path).text


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_report(tmp_path, SUMMARY, searched(), PARETO, RECIPE)
    html = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*""", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))
    assert len(read(tmp_path).shown) == 5  # trade-off, curves, importance, slices, parallel
