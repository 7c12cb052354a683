"""The command line: reads it, calls one function, prints what it returned."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from bdkd_dist.errors import UserError

app = typer.Typer(
    help="Online distillation of small image classifiers whose confidence can be trusted (BD-KD).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted recipe keys, e.g. train.epochs=5."),
]
console = Console()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Train a teacher and its student together; the same command goes on where a run was cut."""
    from bdkd_dist import config
    from bdkd_dist.launch import run

    _report(run.train(config.load(recipe, overrides or ()), console))


@app.command()
def evaluate(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")],
    overrides: Overrides = None,
    shift: Annotated[bool, typer.Option("--shift", help="Measure under corruptions of the test images too.")] = False,
    ood: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Compare confidence on other images too: a folder as data.root takes, or digits."
        ),
    ] = None,
) -> None:
    """Measure accuracy and calibration of a run's networks, with and without temperature scaling."""
    from bdkd_dist.launch import run

    folder = run.evaluate(run_path, overrides or (), console, shift, ood)
    _report(folder)
    if shift:
        _report_shift(folder)
    if ood is not None:
        _report_ood(folder, ood)


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="A path or URI as data.root takes, or digits, cifar10, cifar100.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="A new folder, on a file system that all who train can read.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="data.threads, data.image_px, data.download.")
    ] = None,
    max_side: Annotated[int, typer.Option(metavar="PX", help="Larger images are shrunk to this longer side.")] = 512,
    quality: Annotated[int, typer.Option(metavar="1-100", help="Of JPEGs that have to be encoded anew.")] = 90,
    check: Annotated[
        str, typer.Option(metavar="full|headers", help="Decode every image, or trust JPEGs that have head and end.")
    ] = "full",
    undecodable: Annotated[
        str, typer.Option(metavar="stop|leave-out", help="What an image does that cannot be decoded.")
    ] = "stop",
    address: Annotated[
        str | None,
        typer.Option(metavar="RAY", help="Convert on this Ray cluster: auto, HOST:PORT, or local."),
    ] = None,
) -> None:
    """Turn a data set into files for fast loading; the same command goes on where it was cut off."""
    from bdkd_dist.launch import prepare as launched

    rules = launched.rules_of(max_side, quality, check, undecodable)
    outcome = launched.prepare(source, out, rules, console, address, overrides or ())
    for line in outcome.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what is missing on this machine, and the command that mends it."""
    from bdkd_dist.launch.doctor import examine, table

    findings = examine()
    console.print(table(findings))
    raise typer.Exit(int(any(finding.status == "missing" for finding in findings)))


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from bdkd_dist import config

    console.print("\n".join(config.recipe_names()), highlight=False)


def _show(table: Table) -> None:
    """Print a table at its own width: on a narrower terminal its lines wrap, but no digit is left out."""
    width = Measurement.get(console, console.options.update(width=500), table).maximum
    Console(width=max(width, console.width)).print(table)


def _report(folder: "RunFolder") -> None:  # type: ignore[name-defined]  # noqa: F821
    from bdkd_dist.records.results import read_results, results_table

    _show(results_table(read_results(folder.results)))
    console.print(f"reliability diagram  {folder.figures / 'reliability_test.png'}", highlight=False, soft_wrap=True)
    command = Path(sys.executable).with_name("tensorboard")
    shown = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    console.print(f"curves               {shown} --logdir {folder.path.parent}", highlight=False, soft_wrap=True)


def _report_shift(folder: "RunFolder") -> None:  # type: ignore[name-defined]  # noqa: F821
    from bdkd_dist.records import shift as records

    path = records.shift_path(folder.path)
    measured = records.read(path)
    _show(records.severity_table(measured))
    _show(records.corruption_table(measured))
    console.print(f"under shift          {folder.figures / 'shift.png'}", highlight=False, soft_wrap=True)
    console.print(f"all figures          {path}", highlight=False, soft_wrap=True)


def _report_ood(folder: "RunFolder", source: str) -> None:  # type: ignore[name-defined]  # noqa: F821
    from bdkd_dist.data.sources.storage import shown
    from bdkd_dist.records import shift as records

    path = records.ood_path(folder.path, shown(source))
    _show(records.ood_table(records.read(path)))
    console.print(f"all figures          {path}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2, a stop by Ctrl-C is 130."""
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        # By name: the modules that define these take seconds to import, and a mistake is to be told at once.
        match type(error).__name__:
            case "Interrupted":
                _fail(f"{error}; go on with: bdkd {shlex.join(sys.argv[1:])}", 130)
            case "Diverged" | "DataError" | "WorkersLost":
                _fail(str(error), 1)
        raise


def _fail(line: str, code: int) -> None:
    Console(stderr=True).print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)
