"""Images per second of 1, 2 and 4 workers on this machine, and a model that predicts them for many GPUs.

    python benchmarks/scaling.py                                  # measure, check the model, predict 8 to 1,024 GPUs
    python benchmarks/scaling.py --model-only --batch-per-gpu 128 --tflops 100 --node-gbit-s 200
    python benchmarks/scaling.py --model-only --compute-ms 48 --compression bf16     # where a step was measured

**Measured**: the trainings of ``ray_overhead.py`` under torchrun, ``--batch-per-worker`` images a worker, so that the
batch grows with the workers; one torch thread each. More workers than cores share them, and count by the cores.

**Checked**: the model must give the step of two workers from (a) their step when nothing travels, measured with the
same two ranks whose messages are left out, and (b) latency and bandwidth of gloo's all-reduce between two idle ranks.

**Predicted**: the step of the ImageNet pair resnet34 -> resnet18 at ``--batch-per-gpu`` images a GPU, by the model in
``scaling_model.py``, which says what is in it and what is not. Computing time is multiplications by ``--tflops``, what
a GPU sustains on these networks: assumed, unless ``--compute-ms`` gives a measured step. Bandwidths are line rates
times ``--usable``. ``--jitter`` was set so that PyTorch's own resnet50 on 16 GPUs comes out; the other published
figures are a test.

The last line is the predicted by the measured step of two workers (none with --model-only). Run it on a machine that
does nothing else. docs/scaling.md explains.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray_overhead as runs
import torch
import torch.distributed as dist
from machine import header
from scaling_model import FLOPS_PER_MAC, PUBLISHED, Layer, Links, Settings, layers_of, predict
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bdkd_dist import models

WORKERS = (1, 2, 4)
SMALL_BYTES, LARGE_BYTES = 256, 4 * 2**20
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    arguments = parse()
    if arguments.exchange:
        exchange_main()
    elif arguments.muted_rank:
        mute()
        runs.rank_main(arguments.muted_rank)
    else:
        print(header())
        ratio = None if arguments.model_only else measure(arguments)
        predict_gpus(arguments)
        compare_published(arguments)
        if ratio is not None:
            print(f"\nstep of two workers, predicted/measured = {ratio:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs.add_training_arguments(parser)
    parser.add_argument("--batch-per-worker", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model-only", action="store_true", help="measure nothing here")
    model = parser.add_argument_group("the model")
    model.add_argument("--batch-per-gpu", type=int, default=64)
    model.add_argument("--tflops", type=float, default=60.0, help="sustained by a GPU, 10^12 per second")
    model.add_argument("--compute-ms", type=float, help="of a step on one GPU, where measured")
    model.add_argument("--compression", choices=["none", "bf16"], default="none", help="train.gradient_compression")
    model.add_argument("--bucket-mib", type=float, help="launch.bucket_mib; by default DDP's own sizes")
    model.add_argument("--gpus-per-node", type=int, default=8)
    model.add_argument("--inside-gbyte-s", type=float, default=300.0, help="NVLink, of a GPU in one direction")
    model.add_argument("--node-gbit-s", type=float, nargs="+", default=[100.0, 400.0], help="between nodes, of a node")
    model.add_argument("--usable", type=float, default=0.85, help="share of these rates that payload gets")
    model.add_argument("--launch-us", type=float, default=20.0, help="of a message")
    model.add_argument("--inside-hop-us", type=float, default=2.0)
    model.add_argument("--node-hop-us", type=float, default=5.0)
    model.add_argument("--jitter", type=float, default=0.02, help="deviation of a GPU's computing time, a share of it")
    parser.add_argument("--exchange", action="store_true", help=argparse.SUPPRESS)  # what torchrun starts
    parser.add_argument("--muted-rank", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> float:
    """Measure all numbers of workers, print them and the model's check; return predicted by measured step of two."""
    steps: dict[str, list[float]] = {
        name: [] for name in ("1", "2", "muted", "4")
    }  # what is compared runs side by side
    exchanges = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = runs.prepare(folder, images=arguments.batch_per_worker * max(WORKERS) * arguments.steps)
        for number in range(arguments.repeats):
            for name, found in steps.items():
                ranks = 2 if name == "muted" else int(name)
                batch_size = ranks * arguments.batch_per_worker
                settings = runs.overrides(arguments, data, batch_size)
                settings += [f"run.storage={folder}", f"run.name={name}-{number}", f"launch.workers={ranks}"]
                script = [__file__, "--muted-rank"] if name == "muted" else [runs.__file__, "--rank"]
                words = runs.torchrun(ranks, [*script, *settings])
                found.append(runs.run(words, folder / f"{name}-{number}", batch_size, arguments.warmup_steps).step_s)
            exchanges.append(json.loads(runs.execute(runs.torchrun(2, [__file__, "--exchange"]))))
    print_measured(steps, arguments)
    small_s, large_s = (statistics.median(seconds) for seconds in zip(*exchanges, strict=True))
    return check(statistics.median(steps["muted"]), statistics.median(steps["2"]), small_s, large_s, arguments)


def print_measured(steps: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    print(
        f"measured: {arguments.teacher} -> {arguments.student}, {arguments.batch_per_worker} images a worker, "
        f"one torch thread each, train.batchnorm=sync;\n{arguments.repeats} rounds of {arguments.steps} steps, the "
        f"first {arguments.warmup_steps} not counted; more than {cores} workers share the cores"
    )
    spread = f"{'step ms':>10}{'fastest':>9}{'slowest':>9}"
    print(f"{'workers':>7}{spread}{'images/s':>10}{'a core used':>13}{'efficiency':>12}")
    alone = arguments.batch_per_worker / statistics.median(steps["1"])
    for workers in WORKERS:
        found_ms = [1e3 * step_s for step_s in steps[str(workers)]]
        images_per_s = workers * arguments.batch_per_worker / statistics.median(found_ms) * 1e3
        a_core = images_per_s / min(workers, cores)
        print(
            f"{workers:7}{statistics.median(found_ms):10.1f}{min(found_ms):9.1f}{max(found_ms):9.1f}"
            f"{images_per_s:10.1f}{a_core:13.1f}{100 * a_core / alone:10.1f} %"
        )


def check(muted_s: float, measured_s: float, small_s: float, large_s: float, arguments: argparse.Namespace) -> float:
    """Print the model's step of two workers beside the measured one; return their ratio."""
    # Of two ranks an all-reduce sends as many bytes as it has.
    links = Links(2, (LARGE_BYTES - SMALL_BYTES) / (large_s - small_s), 1.0, launch_s=small_s)
    layers = pair(arguments.teacher, arguments.student, runs.NUM_CLASSES, 32)
    step = predict(layers, muted_s, 2, links, Settings(cpu=True, overlap=False))
    agreement_s = links.all_reduce_s(4, 2)  # after each step ranks agree whether to go on
    predicted_s = step.step_s + agreement_s
    megabytes = 4e-6 * sum(layer.parameters for layer in layers)
    messages = 2 * sum(layer.bn_channels > 0 for layer in layers)
    print(f"gloo between two idle ranks: {1e6 * small_s:.0f} us a message, {1e-9 * links.inside_bandwidth:.2f} GB/s")
    print(
        f"two workers: {1e3 * muted_s:.1f} ms when nothing travels, + {1e3 * step.batchnorm_s:.1f} ms of {messages} "
        f"batch-norm messages\n+ {1e3 * step.gradients_s:.1f} ms of {megabytes:.1f} MB of gradients + "
        f"{1e3 * agreement_s:.1f} ms of agreeing\n= {1e3 * predicted_s:.1f} ms predicted; "
        f"{1e3 * measured_s:.1f} ms measured"
    )
    return predicted_s / measured_s


def exchange_main() -> None:
    """One of torchrun's ranks: time all-reduces of two sizes; rank 0 prints the medians as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    medians = [
        statistics.median(all_reduce_s(num_bytes) for _ in range(200)) for num_bytes in (SMALL_BYTES, LARGE_BYTES)
    ]
    if dist.get_rank() == 0:
        print(json.dumps(medians))
    dist.destroy_process_group()


def all_reduce_s(num_bytes: int) -> float:
    values = torch.zeros(num_bytes // 4)
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    return time.perf_counter() - began


def mute() -> None:
    """Let this rank train as ever, only that nothing travels between steps' layers and after their backward pass."""
    build = DistributedDataParallel.__init__

    @functools.wraps(build)
    def silent(self: DistributedDataParallel, *settings: Any, **options: Any) -> None:
        build(self, *settings, **options)
        self.register_comm_hook(None, keep)

    def keep(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    DistributedDataParallel.__init__ = silent  # type: ignore[method-assign]  # wherever the engine makes one
    dist.all_reduce = lambda *_, **__: None  # type: ignore[assignment]


def pair(teacher: str, student: str, num_classes: int, image_px: int) -> list[Layer]:
    return [layer for name in (teacher, student) for layer in network(name, num_classes, image_px)]


def network(name: str, num_classes: int = 1000, image_px: int = 224) -> list[Layer]:
    with torch.device("meta"):
        built: nn.Module = models.build(name, num_classes)
    return layers_of(built, image_px)


def links_of(arguments: argparse.Namespace, inside_gbyte_s: float, node_gbit_s: float) -> Links:
    return Links(
        arguments.gpus_per_node,
        inside_bandwidth=arguments.usable * 1e9 * inside_gbyte_s,
        node_bandwidth=arguments.usable * 1e9 / 8 * node_gbit_s,
        launch_s=1e-6 * arguments.launch_us,
        inside_hop_s=1e-6 * arguments.inside_hop_us,
        node_hop_s=1e-6 * arguments.node_hop_us,
    )


def predict_gpus(arguments: argparse.Namespace) -> None:
    """Print the assumptions, and for each bandwidth a table over numbers of GPUs."""
    layers, images = pair("resnet34", "resnet18", 1000, 224), arguments.batch_per_gpu
    flops = FLOPS_PER_MAC * sum(layer.macs for layer in layers)
    compute_s = 1e-3 * arguments.compute_ms if arguments.compute_ms else images * flops / (1e12 * arguments.tflops)
    gradient_bytes = 2 if arguments.compression == "bf16" else 4
    megabytes = 1e-6 * gradient_bytes * sum(layer.parameters for layer in layers)
    messages = 2 * sum(layer.bn_channels > 0 for layer in layers)
    source = "given" if arguments.compute_ms else f"{1e-9 * flops:.1f} GFLOP an image at {arguments.tflops:g} TFLOP/s"
    print(
        f"\npredicted: resnet34 -> resnet18, 224 px, {images} images a GPU; {1e3 * compute_s:.1f} ms computing "
        f"({source}),\n{megabytes:.0f} MB of gradients in buckets of {arguments.bucket_mib or '1, then 25'} MiB, "
        f"{messages} batch-norm messages; jitter {100 * arguments.jitter:g} %;\n"
        f"{arguments.gpus_per_node} GPUs a node at {arguments.inside_gbyte_s:g} GB/s, {100 * arguments.usable:g} % of "
        f"rates usable, {arguments.launch_us:g} us a message, hops of {arguments.inside_hop_us:g} us within and "
        f"{arguments.node_hop_us:g} us between nodes"
    )
    for node_gbit_s in arguments.node_gbit_s:
        links = links_of(arguments, arguments.inside_gbyte_s, node_gbit_s)
        step_columns = f"{'step ms':>10}{'images/s':>12}{'efficiency':>12}"
        print(
            f"\n{f'{node_gbit_s:g} Gbit/s a node':20}{'batchnorm=sync':>29}{'of that waiting for':>25}"
            f"{'batchnorm=local':>34}"
        )
        print(f"{'GPUs':>6}{'batch':>9}{step_columns}{'batch norm':>14}{'gradients':>11}{step_columns}")
        for gpus in GPUS:
            settings = Settings(True, False, gradient_bytes, arguments.bucket_mib, True, arguments.jitter)
            sync = predict(layers, compute_s, gpus, links, settings)
            local = predict(layers, compute_s, gpus, links, replace(settings, sync_batchnorm=False))
            columns = [
                f"{1e3 * step.step_s:10.1f}{gpus * images / step.step_s:12,.0f}{100 * compute_s / step.step_s:10.1f} %"
                for step in (sync, local)
            ]
            waiting = f"{1e3 * sync.batchnorm_s:14.1f}{1e3 * sync.gradients_s:11.1f}"
            print(f"{gpus:6}{gpus * images:9,}{columns[0]}{waiting}{columns[1]}")


def compare_published(arguments: argparse.Namespace) -> None:
    """Print the model's efficiency beside what others measured; batch norm is local in all of these."""
    settings = Settings(sync_batchnorm=False, jitter=arguments.jitter)
    print(f"\n{'published':32}{'network':>10}{'GPUs':>6}{'by those of':>13}{'published':>11}{'model':>8}")
    for one in PUBLISHED:
        layers, links = network(one.network), links_of(arguments, one.inside_gbyte_s, one.node_gbit_s)
        base_s = predict(layers, one.compute_s, one.base, links, settings).step_s
        for gpus, efficiency in one.efficiency.items():
            ours = base_s / predict(layers, one.compute_s, gpus, links, settings).step_s
            print(f"{one.what:32}{one.network:>10}{gpus:6}{one.base:13}{100 * efficiency:9.1f} %{100 * ours:6.1f} %")


if __name__ == "__main__":
    main()
