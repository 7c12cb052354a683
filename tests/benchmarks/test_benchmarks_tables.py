"""The tables in README.md and docs/ are those of benchmarks/results/."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
tables = importlib.import_module("tables")


def test_a_page_takes_what_its_marks_name(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    (results / "a.txt").write_text(
        "date: 2026-01-01\ncommand: a\n\n**A**, two seeds:\n\n| x |\n|---|\n| 1 |\n\nOf b.\n"
    )
    (results / "b.txt").write_text("date: 2026-01-01\n| y |\n|---|\n| 2 |\n")
    page = (
        "# Page\n<!-- benchmarks/results/a.txt -->\nold\n<!-- end -->\nbetween\n"
        "<!-- benchmarks/results/b.txt -->\n<!-- end -->\nafter\n"
    )
    assert tables.filled(page, tmp_path) == (
        "# Page\n<!-- benchmarks/results/a.txt -->\n**A**, two seeds:\n\n| x |\n|---|\n| 1 |\n\nOf b.\n<!-- end -->\n"
        "between\n<!-- benchmarks/results/b.txt -->\n| y |\n|---|\n| 2 |\n<!-- end -->\nafter\n"
    )


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_every_page_is_up_to_date(page: Path) -> None:
    assert tables.filled(page.read_text()) == page.read_text(), "run benchmarks/tables.py"
