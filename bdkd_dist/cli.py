"""The command line: reads it, calls one function, prints what it returned."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
) -> None:
    """Measure accuracy and calibration of a run's networks, with and without temperature scaling."""
    from bdkd_dist.launch import run

    _report(run.evaluate(run_path, overrides or (), console))


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


def _report(folder: "RunFolder") -> None:  # type: ignore[name-defined]  # noqa: F821
    from bdkd_dist.records.results import read_results, results_table

    console.print(results_table(read_results(folder.results)))
    console.print(f"reliability diagram  {folder.figures / 'reliability_test.png'}", highlight=False, soft_wrap=True)
    command = Path(sys.executable).with_name("tensorboard")
    shown = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    console.print(f"curves               {shown} --logdir {folder.path.parent}", highlight=False, soft_wrap=True)


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
            case "Diverged" | "DataError":
                _fail(str(error), 1)
        raise


def _fail(line: str, code: int) -> None:
    Console(stderr=True).print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)
