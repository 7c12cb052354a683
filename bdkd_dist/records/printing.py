"""Lines and tables as a terminal, a log file or another program is to get them: no line is cut, no digit left out."""

from collections.abc import Callable, Iterable
from functools import partial

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is, without markup and without colours of its own."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def warner(console: Console) -> Callable[[str], None]:
    """Return what prints a line that asks for a person's attention."""
    return partial(print_line, console, style="yellow")


def titled_table(title: str, words: Iterable[str] = (), numbers: Iterable[str] = ()) -> Table:
    """Return a table without rows.

    Args:
        title: Above it.
        words: Its first columns, which stand to the left.
        numbers: Those that follow, which stand to the right.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table at its own width: on a narrower terminal its lines wrap, but no digit is left out."""
    width = Measurement.get(console, console.options.update(width=500), table).maximum
    Console(file=console.file, width=max(width, console.width), quiet=console.quiet).print(table)
