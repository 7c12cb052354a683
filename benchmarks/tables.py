"""Put the tables of benchmarks/results/ into README.md and docs/, so that no figure there is typed.

    .venv/bin/python benchmarks/tables.py

A place for a table is a pair of marks, ``<!-- benchmarks/results/NAME.txt -->`` and ``<!-- end -->``; it takes the file
from its first line in bold or of a table on.
"""

import re
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"<!-- (benchmarks/results/\S+) -->\n.*?<!-- end -->\n", re.DOTALL)


def main() -> None:
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if after != before:
            page.write_text(after)
            print(f"{page.relative_to(ROOT)} written")


def filled(page: str, root: Path = ROOT) -> str:
    """Return a page with what its marks name between them."""
    return PLACE.sub(lambda found: f"<!-- {found[1]} -->\n{tables(root / found[1])}\n<!-- end -->\n", page)


def tables(path: Path) -> str:
    """Return a result's part that is Markdown."""
    lines = dropwhile(lambda line: not line.startswith(("**", "|")), path.read_text().splitlines())
    return "\n".join(lines).strip()


if __name__ == "__main__":
    main()
