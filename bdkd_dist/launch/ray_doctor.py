"""What the nodes of a Ray cluster lack, seen by an actor on each of them, and the command that mends it."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from rich.table import Table
from rich.text import Text

from bdkd_dist.data.sources.storage import Place
from bdkd_dist.errors import UserError, first_line
from bdkd_dist.launch import cluster, node_probe
from bdkd_dist.launch.doctor import NEEDED_FREE_BYTES, SHARED_MEMORY_BYTES
from bdkd_dist.launch.node_probe import NodeProbe, holds
from bdkd_dist.uris import is_uri, shown

ANSWER_WITHIN_S = 60.0
"""For the first answer of a node: it starts a Python process there, which imports torch."""
CLOCK_WITHIN_S = 5.0
ALLOWED_SKEW_S = 2.0
CHECKS = ("python", "torch", "ray", "bdkd-dist", "decoder", "tmp free", "/dev/shm", "GPUs", "clock", "storage")
SAME = "install the same on every node (one image, or `make setup` in the same checkout)"
STYLES = {"ok": "", "optional": "yellow", "missing": "red"}


@dataclass
class Node:
    """A row of the table."""

    name: str
    cells: dict[str, tuple[str, str]] = field(default_factory=dict)
    """(status, text) of each of :data:`CHECKS` that was made; ``ok``, ``optional`` or ``missing``."""
    problems: list[str] = field(default_factory=list)

    def found(
        self, check: str, text: str, problem: str = "", status: Literal["optional", "missing"] = "missing"
    ) -> None:
        """Note what a check found and, where that is a problem, what it is and what mends it."""
        self.cells[check] = (status if problem else "ok", text)
        if problem:
            self.problems.append(problem)

    @property
    def lacks_something(self) -> bool:
        """Whether a run would fail, or differ, for this node."""
        return not self.cells or any(status == "missing" for status, _ in self.cells.values())


def examine(address: str, storage: str | None = None, within_s: float = ANSWER_WITHIN_S) -> list[Node]:
    """Look at every node of a cluster.

    Args:
        address: ``auto`` or ``HOST:PORT``; this machine is one of the cluster's.
        storage: A ``run.storage`` that each node has to reach.
        within_s: Nodes that do not answer by then are rows that say so.

    Raises:
        UserError: No cluster answers, or the storage cannot be written from here.
    """
    with _marked(storage) as mark, cluster.connected(address), _by_value():
        listed = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])
        probes = {node["NodeID"]: _probe(node["NodeID"]) for node in listed}
        mine = NodeProbe().report()
        reports = _answers({key: probe.report.remote() for key, probe in probes.items()}, within_s)
        nodes = {node["NodeID"]: Node(_name(node)) for node in listed}
        reached = {key: probes[key] for key, report in reports.items() if isinstance(report, dict)}
        for listing in listed:
            key = listing["NodeID"]
            if key in reached:
                judge(nodes[key], reports[key], mine, int(listing["Resources"].get("GPU", 0)))
            else:
                nodes[key].problems.append(f"no answer: {reports[key]}; see `ray status`, and that node's raylet")
        for key, probe in reached.items():
            _see_clock(nodes[key], probe)
        if mark is not None:
            _see_storage(mark, {key: (nodes[key], probe) for key, probe in reached.items()}, within_s)
    return list(nodes.values())


def judge(node: Node, report: dict[str, Any], mine: dict[str, Any], advertised_gpus: int) -> None:
    """Compare what a node says of itself with the driver and with what a run needs."""
    for name in ("python", "torch", "ray"):
        there, here = report[name] or "absent", mine[name]
        node.found(name, there, "" if there == here else f"{name} is {there}, the driver's {here}: {SAME}")
    version, source = report["bdkd-dist"], report["source"]
    if version is None:
        node.found("bdkd-dist", "absent", f"bdkd-dist does not load there: {SAME}, or send a job by `bdkd submit`")
    else:
        same = (version, source) == (mine["bdkd-dist"], mine["source"])
        other = f"bdkd-dist is {version}, source {source[:8]}; the driver's {mine['bdkd-dist']}, {mine['source'][:8]}"
        node.found("bdkd-dist", f"{version} {source[:8]}", "" if same else f"{other}: {SAME}")
    _judge_loading(node, report)
    free, shared = report["tmp_free_bytes"], report["shm_bytes"]
    scarce = f"{free / 2**30:.1f} GiB free in {report['tmp']}: empty it, or give `ray start --temp-dir` another disk"
    node.found("tmp free", _gib(free), scarce if free < NEEDED_FREE_BYTES else "", "optional")
    small = f"/dev/shm has {_gib(shared)}: give it 1 GiB or more (docker: --shm-size=1g)"
    node.found("/dev/shm", _gib(shared), small if shared < SHARED_MEMORY_BYTES else "", "optional")
    gpus = report["gpus"]
    if gpus > advertised_gpus:
        problem = f"torch sees {gpus} GPU(s), Ray offers {advertised_gpus}: `ray start --num-gpus={gpus}` there"
    else:
        problem = f"Ray offers {advertised_gpus} GPU(s), torch sees {gpus}: see `nvidia-smi` and torch's build there"
    node.found("GPUs", f"{gpus} of {advertised_gpus}", problem if gpus != advertised_gpus else "")


def table(nodes: list[Node]) -> Table:
    """Return a row for each node, a column for each check that was made."""
    made = [check for check in CHECKS if any(check in node.cells for node in nodes)]
    drawn = Table(title="bdkd doctor: nodes of the cluster", title_justify="left")
    for heading in ("node", *made):
        drawn.add_column(heading)
    for node in nodes:
        cells = [node.cells.get(check, ("missing", "–")) for check in made] or [("missing", "no answer")]
        drawn.add_row(node.name, *(Text(text, STYLES[status]) for status, text in cells))
    return drawn


def problems(nodes: list[Node]) -> Iterator[str]:
    """Yield a line for each problem: which node, what, what mends it."""
    for node in nodes:
        for problem in node.problems:
            yield f"{node.name}: {problem}"


def _judge_loading(node: Node, report: dict[str, Any]) -> None:
    ffcv = report["ffcv"]
    loads = ffcv is not None and not ffcv.startswith("does not load")
    native = "native" if report["decoder"] else ""
    if native or loads:
        node.found("decoder", " + ".join(filter(None, (native, f"ffcv {ffcv}" if loads else ""))))
    else:
        slow = "neither the native decoder nor FFCV; the torch loader gives the same batches, more slowly: make setup"
        node.found("decoder", "torch only", slow, "optional")


def _see_clock(node: Node, probe: Any) -> None:
    """Compare clocks; half the time of the question is what one cannot know."""
    asked_s = time.time()
    try:
        there_s = ray.get(probe.clock.remote(), timeout=CLOCK_WITHIN_S)
    except ray.exceptions.RayError as error:
        node.found("clock", "?", f"no answer when asked for the time ({type(error).__name__}); ask again")
        return
    answered_s = time.time()
    skew_s, unsure_s = there_s - (asked_s + answered_s) / 2, (answered_s - asked_s) / 2
    wrong = abs(skew_s) > ALLOWED_SKEW_S + unsure_s
    problem = f"its clock differs by {skew_s:+.1f} s from the driver's: run chrony or ntpd there"
    node.found("clock", f"{skew_s:+.2f} s", problem if wrong else "")


def _see_storage(mark: "Mark", reached: dict[str, tuple[Node, Any]], within_s: float) -> None:
    """Let every node read what the driver wrote, and see here what every node writes."""
    place = shown(mark.place.root)
    asked = {key: probe.storage.remote(mark.place.root, mark.name, mark.token) for key, (_, probe) in reached.items()}
    for key, said in _answers(asked, within_s).items():
        wrong = str(said).replace(mark.place.root, place)
        if not wrong and not holds(mark.place, f"{mark.name}.{key}", mark.token):
            wrong = "what it writes there does not arrive here"
        problem = f"--storage {place}: {wrong}; mount it there, or give that node its rights and credentials"
        reached[key][0].found("storage", "wrong" if wrong else "ok", problem if wrong else "")
        mark.place.delete(f"{mark.name}.{key}")


@dataclass(frozen=True)
class Mark:
    """A file in the storage, which every node has to find."""

    place: Place
    name: str
    token: str


@contextmanager
def _marked(storage: str | None) -> Iterator[Mark | None]:
    """Write a mark, and remove it at the end; None where no storage is asked after."""
    if storage is None:
        yield None
        return
    place = Place.of(storage, "--storage")
    if not is_uri(place.root) and not Path(place.root).is_dir():
        raise UserError(f"--storage {place.root}: no such folder here; make it: mkdir -p {place.root}")
    mark = Mark(place, f"bdkd-doctor-{uuid.uuid4().hex}", uuid.uuid4().hex)
    place.write(mark.name, mark.token.encode())
    try:
        yield mark
    finally:
        place.delete(mark.name)


@contextmanager
def _by_value() -> Iterator[None]:
    """Send the probe's code, not its name: a node may lack this package."""
    ray.cloudpickle.register_pickle_by_value(node_probe)
    try:
        yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_probe)


def _probe(node_id: str) -> Any:
    actor = ray.remote(NodeProbe).options(
        num_cpus=0,
        scheduling_strategy=cluster.on_node(node_id),
        runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}},  # else it would see no GPU
    )
    return actor.remote()


def _answers(asked: dict[str, Any], within_s: float) -> dict[str, Any]:
    """Return each node's answer, or the reason why there is none."""
    key_of = {reference: key for key, reference in asked.items()}
    done, _ = ray.wait(list(key_of), num_returns=len(key_of), timeout=within_s) if key_of else ([], [])
    answers: dict[str, Any] = dict.fromkeys(asked, f"not within {within_s:.0f} s")
    for reference in done:
        try:
            answers[key_of[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            answers[key_of[reference]] = f"{type(error).__name__}, {first_line(error)}"
    return answers


def _name(node: dict[str, Any]) -> str:
    address, hostname = node["NodeManagerAddress"], node["NodeManagerHostname"]
    return address if hostname in (address, "") else f"{address} ({hostname})"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
