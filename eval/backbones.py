"""What networks with exits cost: `python eval/benchmark.py backbones`, whose section this is."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import timm
import torch

from sssd_zoo.distributed.hardware import describe_machine
from sssd_zoo.distributed.threads import limit_threads
from sssd_zoo.errors.text import code
from sssd_zoo.evaluation.reports.markdown import table
from sssd_zoo.files import write_json
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.staged import TESTED
from sssd_zoo.pipeline.export import AllExits, import_onnxruntime, onnx_bytes, run_onnx, session

OUTPUTS: dict[str, int | str] = {"1": 1, "2": 2, "3": 3, "4": "final", "ensemble": "ensemble"}
RUNTIMES = ("torch", "onnxruntime")
BATCHES = (1, 128)
SMALL = 40  # px; up to there the stem for small images is the one to use
ENOUGH = 2.0  # seconds: no more rounds of an answer are begun after these

# Of each runtime and batch size, by the answer: milliseconds of an image.
Milliseconds = dict[str, dict[str, dict[str, float]]]


class Costs(TypedDict):
    """What a network costs; MACs and times by '1' to '4' and 'ensemble', `exits` as percent of the trunk's MACs."""

    parameters: int
    macs: dict[str, int]
    exits: float
    milliseconds: Milliseconds


def graphs_of(name: str, size: int, classes: int) -> dict[str, bytes]:
    """ONNX graphs in fp32: of each exit alone, cut out of that of all exits, and of all ('ensemble')."""
    import onnx
    from onnx.utils import Extractor

    model: Any = timm.create_model(name, num_classes=classes).eval()
    outputs = ["1", "2", "3", "4"]
    whole = onnx_bytes(AllExits(model).eval(), torch.randn(2, 3, size, size), ["images", *outputs], {})
    extractor = Extractor(onnx.load_model_from_string(whole))
    graphs = {output: extractor.extract_model(["images"], [output]).SerializeToString() for output in outputs}
    return {**graphs, "ensemble": whole}


@torch.inference_mode()
def time_in_turn(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all in turn, after one that is not counted.

    Args:
        ways: the calls, by name.
        rounds: at most; fewer, but one, where all that were timed took `ENOUGH` seconds together.
    """
    for call in ways.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for _ in range(rounds):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > ENOUGH:
            break
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure_network(name: str, size: int, classes: int, rounds: int) -> Costs:
    """The costs of a network at inputs of `size` px with so many classes."""
    whole: Any = timm.create_model(name, num_classes=classes)
    macs = multiply_adds(whole, (3, size, size))
    graphs = graphs_of(name, size, classes)
    milliseconds: Milliseconds = {runtime: {str(batch): {} for batch in BATCHES} for runtime in RUNTIMES}
    for answer, output in OUTPUTS.items():
        model: Any = timm.create_model(name, num_classes=classes, output=output).eval()
        model.to(memory_format=torch.channels_last)
        parameters = sum(parameter.numel() for parameter in model.parameters())  # of all, in the end
        for batch in BATCHES:
            images = torch.randn(batch, 3, size, size)
            last, array = images.contiguous(memory_format=torch.channels_last), images.numpy()
            deployed = session(graphs[answer])  # a new one gives back the memory of the last
            ways = {"torch": lambda: model(last), "onnxruntime": lambda: run_onnx(deployed, array)}  # noqa: B023
            for runtime, seconds in time_in_turn(ways, rounds).items():
                milliseconds[runtime][str(batch)][answer] = 1000 * seconds / batch
    exits = 100 * (macs["ensemble"] - macs["4"]) / macs["4"]
    return {"parameters": parameters, "macs": macs, "exits": exits, "milliseconds": milliseconds}


def tables(measured: dict[str, Costs], size: int, classes: int) -> str:
    """The costs as Markdown."""
    answers = ["exit 1", "exit 2", "exit 3", "exit 4", "ensemble"]
    costs, times = [], []
    for name, row in measured.items():
        macs = [f"{row['macs'][answer] / 1e6:,.1f}" for answer in OUTPUTS]
        costs.append([code(name), f"{row['parameters'] / 1e6:.2f}", *macs, f"{row['exits']:.1f}"])
        for runtime, by_batch in row["milliseconds"].items():
            cells = [f"{value:.3g}" for by_answer in by_batch.values() for value in by_answer.values()]
            times.append([code(name), runtime, *cells])
    batches = [f"{answer}, batch {batch}" for batch in BATCHES for answer in answers]
    machine = f"{describe_machine('fp32')}, onnxruntime {import_onnxruntime().__version__}"
    return "\n".join(
        [
            f"Inputs of {size} px, {classes:,} classes: parameters and MACs per image in millions, and the exits' MACs "
            "in percent of the trunk's.",
            "",
            *table(["network", "parameters", *answers, "exits (%)"], costs),
            "",
            f"Milliseconds of an image, medians ({machine}):",
            "",
            *table(["network", "runtime", *batches], times),
        ]
    )


def benchmark_backbones(names: Sequence[str] | None, size: int, rounds: int, out: Path | None) -> str:
    """Parameters, MACs and latency of networks with exits, in torch eager (channels last) and onnxruntime, fp32.

    An exit's latency is that of the network of this exit alone ('output=2'), the ensemble's that of all exits. Both
    runtimes have the same number of threads and take turns. MACs are of convolutions and linear layers: products of
    attention are not among them.

    Args:
        names: timm names; by default all tested ones and the ResNet-18, with the stem for small images at up to 40 px.
        size: side of the inputs in pixels.
        rounds: of each answer at most, see `time_in_turn`.
        out: JSON to write, anew after each network.

    Returns:
        Two tables in Markdown.
    """
    limit_threads()
    small = size <= SMALL
    classes = 10 if small else 1000
    names = names or [f"sssd_{name}{'_cifar' if small else ''}" for name in (*TESTED, "resnet18")]
    measured: dict[str, Costs] = {}
    for number, name in enumerate(names, start=1):
        began = time.perf_counter()
        measured[name] = measure_network(name, size, classes, rounds)
        if out is not None:
            versions = {"machine": describe_machine("fp32"), "onnxruntime": import_onnxruntime().__version__}
            write_json(out, {**versions, "size": size, "classes": classes, "networks": measured})
        print(f"{number}/{len(names)} {name}: took {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return tables(measured, size, classes)
