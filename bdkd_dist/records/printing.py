"""Lines and tables as a terminal, a log file or another program is to get them: no line is cut, no digit left out."""

from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is, without markup and without colours of its own."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def warner(console: Console) -> Callable[[str], None]:
    """Return what prints a line that asks for a person's attention."""
    return partial(print_line, console, style="yellow")


def print_table(console: Console, table: Table) -> None:
    """Print a table at its own width: on a narrower terminal its lines wrap, but no digit is left out."""
    width = Measurement.get(console, console.options.update(width=500), table).maximum
    Console(file=console.file, width=max(width, console.width), quiet=console.quiet).print(table)
