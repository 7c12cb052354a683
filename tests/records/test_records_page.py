"""The page: whole in itself, safe with any text, the same for the same input, and usable in a real browser."""

import base64
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Tab, browser, needs_browser
from matplotlib.figure import Figure

from bdkd_dist.records.page import Page

NASTY = """<script>alert(1)</script> & "quoted" 'so' --> <!-- τ"""


class Parsed(HTMLParser):
    """Tags with their attributes, and the text inside of each kind of tag."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data


def drawn(label: str = "a label") -> Figure:
    """A figure with everything that makes ids: letters, hatches, marks, clipping, an image."""
    figure = Figure(figsize=(4, 3))
    axes = figure.add_subplot()
    axes.bar([0, 1], [1, 2], hatch="//", label=label)
    axes.scatter([0, 1], [1, 0])
    axes.imshow([[0, 1], [1, 0]], extent=(0, 1, 0, 1))
    axes.legend()
    return figure


def example() -> Page:
    page = Page("A report", "Of this and that.")
    page.heading("Numbers")
    page.text("As they came.")
    rows = [["b10", "10.50 ± 0.20"], ["b9", "−3.00"], ["c", "–"], ["a", "1,234"], ["d", "9e-5"]]
    page.table(("name", "value"), rows, "Five of them.")
    for number in (1, 2):
        page.figure(drawn(), f"Figure {number}.", "bars and marks")
    return page


def test_text_is_escaped_wherever_it_stands() -> None:
    page = Page(NASTY, NASTY)
    page.heading(NASTY)
    page.text(NASTY)
    page.table([NASTY, "b"], [[NASTY, "1"]], NASTY)
    page.figure(drawn(NASTY), NASTY, NASTY)
    parsed = Parsed(page.html())
    for tag in ("title", "h1", "h2", "p", "button", "td"):
        assert NASTY in parsed.texts[tag], tag
    assert parsed.texts["figcaption"] == [NASTY, NASTY]
    assert [a["aria-label"] for _, a in parsed.tags if "aria-label" in a] == [NASTY, NASTY]
    assert len(parsed.texts["script"]) == 1
    assert "alert" not in parsed.texts["script"][0]


def test_nothing_comes_from_elsewhere_and_only_its_own_script_may_run() -> None:
    parsed = Parsed(example().html())
    for _, attributes in parsed.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in parsed.texts["style"][0]
    assert "url(" not in parsed.texts["style"][0]
    (policy,) = [a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (script,) = parsed.texts["script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_ids_are_unique_and_each_reference_finds_its_own() -> None:
    html = example().html()
    ids = Counter(re.findall(r'\bid="([^"]+)"', html))
    assert set(ids.values()) == {1}
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert len(references) > 10
    assert references <= ids.keys()


def test_figures_carry_no_date_and_no_program() -> None:
    html = example().html()
    assert "<metadata" not in html
    assert "dc:date" not in html


def test_the_same_parts_give_the_same_bytes_in_another_process() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_records_page import example\n"
        "print(example().html(), end='')"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
    )
    assert done.stdout == example().html()


@pytest.mark.parametrize(
    ("cells", "is_number"),
    [
        (["1", "2.5", "−3"], True),
        (["98.89 ± 0.12", "–"], True),
        (["+0.50 [−0.10, 1.10] *", ""], True),
        (["12.3 %", "1,024"], True),
        (["1e-3", "nan"], True),
        (["–", ""], False),
        (["0003-nu_forward-2.1", "0004-tau-4"], False),
        (["1", "two"], False),
    ],
)
def test_columns_of_numbers_are_known(cells: list[str], is_number: bool) -> None:
    page = Page("t")
    page.table(("x",), [[cell] for cell in cells])
    classes = {a.get("class") for tag, a in Parsed(page.html()).tags if tag == "td"}
    assert classes == ({"number"} if is_number else {None})


def test_a_row_of_other_length_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="columns"):
        Page("t").table(("a", "b"), [["1"]])


def test_what_is_written_is_the_page(tmp_path: Path) -> None:
    example().write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == example().html()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as opened:
        yield opened


@pytest.fixture
def shown(tab: Tab, tmp_path: Path) -> Tab:
    example().write(tmp_path / "report.html")
    tab.errors.clear()
    tab.show(tmp_path / "report.html")
    return tab


def names(tab: Tab) -> list[str]:
    return tab.run("[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent)")


@needs_browser
@pytest.mark.slow
def test_a_click_sorts_numbers_as_numbers_and_again_the_other_way(shown: Tab) -> None:
    assert names(shown) == ["b10", "b9", "c", "a", "d"]
    shown.click("th:nth-child(2) button")
    assert names(shown) == ["b9", "d", "b10", "a", "c"]
    shown.click("th:nth-child(2) button")
    assert names(shown) == ["a", "b10", "d", "b9", "c"]  # what is missing stays last
    assert shown.run("document.querySelector('[aria-sort]').textContent") == "value"
    shown.click("th:nth-child(1) button")
    assert names(shown) == ["a", "b9", "b10", "c", "d"]
    assert shown.errors == []


@needs_browser
@pytest.mark.slow
def test_a_table_is_sorted_by_keyboard_alone(shown: Tab) -> None:
    shown.press("Tab", 9)
    shown.press("Tab", 9)
    assert shown.run("document.activeElement.textContent") == "name"
    shown.press("Enter", 13, "\r")
    assert names(shown) == ["a", "b9", "b10", "c", "d"]
    shown.press(" ", 32, " ")
    assert names(shown) == ["d", "c", "b10", "b9", "a"]
    assert shown.errors == []


@needs_browser
@pytest.mark.slow
def test_the_browser_asks_for_the_file_alone_and_runs_no_other_script(shown: Tab) -> None:
    assert [url.partition(":")[0] for url in shown.requests if not url.startswith("data:")] == ["file"]
    assert shown.errors == []
    shown.run("{ const s = document.createElement('script'); s.textContent = 'bad = 1'; document.body.append(s) }")
    assert shown.run("typeof bad") == "undefined"
    assert any("Content Security Policy" in error for error in shown.errors)


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width_px", [360, 390, 1280])
def test_wide_parts_scroll_in_their_own_box_and_the_page_does_not(tab: Tab, width_px: int, tmp_path: Path) -> None:
    page = example()
    page.table([f"column {n}" for n in range(30)], [["1.0000"] * 30] * 3)
    page.text("x" * 300)
    page.write(tmp_path / "report.html")
    tab.errors.clear()
    tab.show(tmp_path / "report.html", width_px)
    assert tab.run("document.documentElement.scrollWidth") <= width_px
    wide = tab.run("(b => [b.scrollWidth, b.clientWidth])([...document.querySelectorAll('.rows')].at(-1))")
    assert wide[0] > wide[1]
    assert tab.errors == []


@needs_browser
@pytest.mark.slow
def test_figures_stand_on_white_in_the_dark(tab: Tab, tmp_path: Path) -> None:
    example().write(tmp_path / "report.html")
    colours = {}
    for dark in (False, True):
        tab.show(tmp_path / "report.html", dark=dark)
        script = "['body', '.drawn', 'td'].map(s => getComputedStyle(document.querySelector(s)))"
        colours[dark] = tab.run(f"{script}.map((s, n) => n < 2 ? s.backgroundColor : s.color)")
    assert colours[False][0] == "rgb(255, 255, 255)"
    assert colours[True][0] != colours[False][0]
    assert colours[True][2] != colours[False][2]
    assert colours[True][1] == colours[False][1] == "rgb(255, 255, 255)"
