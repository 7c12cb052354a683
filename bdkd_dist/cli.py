"""The command line: reads it, calls one function, prints what it returned."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bdkd_dist import __version__
from bdkd_dist.errors import Fault, Interruption, UserError
from bdkd_dist.records.printing import print_line, print_table

if TYPE_CHECKING:
    from bdkd_dist.launch.run_folder import RunFolder

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


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda asked: _version(asked), help="Say which this is."),
    ] = False,
) -> None:
    pass


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="RAY", envvar="RAY_ADDRESS", help="Train on this Ray cluster: auto, or HOST:PORT.", show_envvar=True
        ),
    ] = None,
) -> None:
    """Train a teacher and its student together; the same command goes on where a run was cut."""
    from bdkd_dist import config
    from bdkd_dist.launch import run

    _report(run.train(config.load(recipe, overrides or ()), console, address))


@app.command()
def evaluate(
    run_path: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder or one of its checkpoints, by path or URI.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Where and how it runs, e.g. data.root=/data or launch.device=cpu."
        ),
    ] = None,
    shift: Annotated[bool, typer.Option("--shift", help="Measure under corruptions of the test images too.")] = False,
    ood: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Compare confidence on other images too: a folder as data.root takes, or digits."
        ),
    ] = None,
) -> None:
    """Measure accuracy and calibration of a run's networks, as trained and scaled post hoc."""
    from bdkd_dist.launch import run

    folder = run.evaluate(run_path, overrides or (), console, shift, ood)
    _report(folder)
    if shift:
        _report_shift(folder)
    if ood is not None:
        _report_ood(folder, ood)


@app.command()
def export(
    run_path: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder or one of its checkpoints, by path or URI.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.pt2", help="The file; one that is there is replaced.")],
    network: Annotated[
        str, typer.Option(metavar="NAME", help="student, teacher, student_ema, student_1 …")
    ] = "student",
) -> None:
    """Write a run's student, ready for pixels, as one file that torch loads without this package."""
    from bdkd_dist.launch import export as launched

    said = launched.export(run_path, out, network)
    size, classes = said["image_px"], said["num_classes"]
    print_line(console, f"{network} {said['architecture']}, {said['num_parameters']:,} parameters, in {out}")
    print_line(console, f"takes (N, {size}, {size}, 3) uint8 RGB, gives (N, {classes}) float32 logits")


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Finished runs or whole searches, by path or URI.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder, or an earlier comparison's.")] = Path(
        "comparison"
    ),
) -> None:
    """Set runs side by side: a table, a page, pictures and Parquet files; runs that differ in seed are one method."""
    from bdkd_dist.launch import compare as launched

    launched.compare(runs, out, console)


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
        str,
        typer.Option(metavar="full|headers", help="Check images to the last byte, or of kept JPEGs only both ends."),
    ] = "full",
    undecodable: Annotated[
        str, typer.Option(metavar="stop|leave-out", help="What to do about an image that cannot be decoded.")
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
        print_line(console, line)


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option(metavar="RAY", help="Look at every node of this Ray cluster: auto, or HOST:PORT.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="PATH|URI", help="With --address: is this run.storage the same place for every node?"),
    ] = None,
) -> None:
    """Say what is missing on this machine, or on every node of a cluster, and the command that mends it."""
    from bdkd_dist.launch import doctor

    if address is not None:
        from bdkd_dist.launch import ray_doctor

        nodes = ray_doctor.examine(address, storage)
        print_table(console, ray_doctor.table(nodes))
        for line in ray_doctor.problems(nodes):
            print_line(console, line)
        raise typer.Exit(int(any(node.lacks_something for node in nodes)))
    if storage is not None:
        raise UserError("--storage is looked at from the nodes of a cluster; give its --address too")
    findings = doctor.examine()
    console.print(doctor.table(findings))
    raise typer.Exit(int(any(finding.status == "missing" for finding in findings)))


Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The head node's job server, http://HEAD:8265; default RAY_API_SERVER_ADDRESS, or RAY_ADDRESS if http://….",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID")]


@app.command()
def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="After --: what a job may run, e.g. train.")
    ],
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and leave it alone.")] = False,
) -> None:
    """Run a command line as a job on a Ray cluster, show its log, and end as it ends."""
    from bdkd_dist.launch import submission
    from bdkd_dist.launch.jobs import Jobs

    name = submission.command_of(command)
    parsed = typer.main.get_command(app).commands[name].make_context(f"bdkd {name}", command[1:])  # type: ignore[attr-defined]
    submission.check(command, parsed.params, Path.cwd())
    cluster = Jobs(address)
    job = cluster.submit(command, Path.cwd())
    print(job, flush=True)
    _say(cluster.hint(job))
    if not detach:
        raise typer.Exit(cluster.follow(job, _write, _say))


jobs_app = typer.Typer(help="The jobs that were submitted to a cluster.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(jobs_app, name="jobs")


@jobs_app.command("list")
def list_jobs(address: Address = None) -> None:
    """List the jobs of a cluster and how they ended."""
    from bdkd_dist.launch.jobs import Jobs

    listed = Jobs(address).table()
    console.print(listed) if console.is_terminal else print_table(console, listed)  # elsewhere a job is one line


@jobs_app.command("logs")
def job_logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends; then end with its status.")] = False,
) -> None:
    """Print what a job has written."""
    from bdkd_dist.launch.jobs import Jobs

    if follow:
        raise typer.Exit(Jobs(address).follow(job, _write, _say))
    _write(Jobs(address).log(job))


@jobs_app.command("stop")
def stop_job(job: JobId, address: Address = None) -> None:
    """Stop a job and wait until it has ended; a training keeps its state, the same submit goes on."""
    from bdkd_dist.launch.jobs import Jobs

    _say(Jobs(address).stop(job))


@app.command()
def tune(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="A Python file with a search_space().")],
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    overrides: Overrides = None,
    num_trials: Annotated[
        int | None, typer.Option(metavar="N", help="How many trials; of a grid all, else 20.", show_default=False)
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(metavar="G", help="nll, accuracy, ece, pareto, or NETWORK/METRIC.", show_default=False),
    ] = None,
    subject_to: Annotated[
        list[str] | None, typer.Option(metavar="BOUND", help="A constraint, e.g. 'student/ece<=0.02'; repeatable.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(metavar="tpe|random|grid", help="What chooses values.", show_default=False)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="asha|hyperband|median|pbt|none", help="What stops or changes trials.", show_default=False
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="best|all", help="Whose test split is evaluated at the end.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search; trials have train.seed.")] = 0,
    address: Annotated[
        str | None,
        typer.Option(metavar="RAY", envvar="RAY_ADDRESS", help="Search on this Ray cluster: auto, or HOST:PORT."),
    ] = None,
) -> None:
    """Search over a recipe for accuracy and calibration; the same command goes on where a search was cut."""
    from bdkd_dist import config
    from bdkd_dist.launch.tune import search as launched

    if recipe.endswith(".py"):
        raise UserError(f"RECIPE {recipe} is a Python file; SPACE comes first, then RECIPE")
    asked = launched.Asked(goal, tuple(subject_to or ()), search, scheduler, num_trials, seed, test)
    named = config.load(recipe, [*launched.default_name(space, recipe), *(overrides or ())])
    found = launched.search(space, named, asked, console, address)
    print_table(console, found.table())
    for line in found.lines():
        print_line(console, line)
    if not found.chosen:
        raise UserError(found.lacking())


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from bdkd_dist import config

    console.print("\n".join(config.recipe_names()), highlight=False)


def _write(text: str) -> None:
    """Pass on a piece of a log as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(line: str) -> None:
    """Speak beside the output, which may go to a file."""
    print_line(Console(stderr=True), line)


def _report(folder: "RunFolder") -> None:
    from bdkd_dist.launch.programs import beside
    from bdkd_dist.records.results import read_results, results_table

    print_table(console, results_table(read_results(folder.results)))
    diagram = folder.name(folder.figures / "reliability_test.png")
    print_line(console, f"reliability diagram  {diagram}")
    print_line(console, f"curves               {beside('tensorboard')} --logdir {folder.above}")


def _report_shift(folder: "RunFolder") -> None:
    from bdkd_dist.records import shift as records

    path = records.shift_path(folder.path)
    measured = records.read(path)
    print_table(console, records.severity_table(measured))
    print_table(console, records.corruption_table(measured))
    print_line(console, f"under shift          {folder.name(folder.figures / 'shift.png')}")
    print_line(console, f"all figures          {folder.name(path)}")


def _report_ood(folder: "RunFolder", source: str) -> None:
    from bdkd_dist.records import shift as records
    from bdkd_dist.uris import shown

    path = records.ood_path(folder.path, shown(source))
    print_table(console, records.ood_table(records.read(path)))
    print_line(console, f"all figures          {folder.name(path)}")


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2, a fault 1, a stop by Ctrl-C 130."""
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Fault as error:
        _fail(str(error), 1)
    except Interruption as error:
        _fail(f"{error}; go on with: bdkd {shlex.join(sys.argv[1:])}", 130)


def _fail(line: str, code: int) -> None:
    print_line(Console(stderr=True), line, style="red")
    sys.exit(code)
