"""Networks for deployment: one exit, all exits or the stages of early exit as ONNX, torch.export or safetensors.

`sssd export` writes a file, or a folder where there is more than one:

    onnx            OUT, a graph with a dynamic batch size; class names, mean, std and size lie in its metadata
    onnx, int8      also OUT with `.int8.onnx` for its suffix, by onnxruntime's static quantiser
    onnx, early-exit   OUT/stage1.onnx to OUT/stage4.onnx and OUT/early_exit.json; docs/deploy.md has the loop
    torch-export    OUT, which `torch.export.load` reads; its extra file metadata.json has the same metadata
    safetensors     OUT/model.safetensors and OUT/config.json, which timm loads by `local-dir:OUT`

The graphs take images as float32 [B, C, S, S], normalised by mean and std, and give logits. C is 3 for RGB, or 1 for a
network for grey images; `input_size` in the metadata is [C, S, S].
"""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sssd_zoo.configs import DataConfig, ExportArgs
from sssd_zoo.data.inputs import prepared, storage_default
from sssd_zoo.data.loading import load_images
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.protocol import Evaluation, check_classes, evaluation_data
from sssd_zoo.files import atomic_write_bytes, write_json
from sssd_zoo.files.run_folder import atomic_dir, check_replaceable, open_out
from sssd_zoo.models import SSSDResNet, stages_and_heads
from sssd_zoo.models.networks import channels, config_for, input_spec, load_network
from sssd_zoo.models.resnet import check_thresholds
from sssd_zoo.models.saving import save_network

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
Arrays = list[NDArray[np.float32]]


class AllExits(nn.Module):
    """A network's four exits as four outputs; see `SSSDResNet.forward_exits`."""

    def __init__(self, network: SSSDResNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, S, S] to four logits [B, num_classes]."""
        return tuple(self.network.forward_exits(images).logits)


class Stage(nn.Module):
    """One stage of early exit, from the map before it to its own map and its exit's logits; the last gives logits only.

    Args:
        network: with all exits.
        number: of the stage, 1 to 4; the stem belongs to the first.
    """

    def __init__(self, network: Any, number: int) -> None:
        super().__init__()
        self.stage, self.head = stages_and_heads(network)[number - 1]
        self.last = number == 4

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C, h, w] to the next map and [B, num_classes]."""
        x = self.stage(x)
        logits: Tensor = self.head(x)
        return logits if self.last else (x, logits)


def metadata(model: Any, output: str) -> dict[str, Any]:
    """What a program that runs an exported network needs to know."""
    size, mean, std = input_spec(model)
    names = model.pretrained_cfg.get("label_names")
    return {
        "architecture": str(model.pretrained_cfg["architecture"]),
        "output": output,
        "input_size": [channels(model), size, size],
        "mean": list(mean),
        "std": list(std),
        **({} if getattr(model, "bits", None) is None else {"bits": model.bits}),
        "class_names": None if names is None else list(names),
    }


def import_onnxruntime() -> Any:
    """The module.

    Raises:
        UserError: if a package is missing.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f"ONNX needs more packages ({error}): pip install 'sssd-zoo[export]'") from error
    del onnx
    return onnxruntime


def onnx_bytes(module: nn.Module, example: Tensor, names: list[str], facts: dict[str, Any]) -> bytes:
    """A module as an ONNX graph with a dynamic batch size.

    Args:
        module: in eval mode, of one tensor.
        example: of its input, with a batch of at least 2.
        names: of its input, then of its outputs.
        facts: for the graph's metadata, whose values are JSON.
    """
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=names[:1],
        output_names=names[1:],
        verbose=False,
    )
    assert program is not None  # it is with dynamo=True
    program.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    serialised: bytes = program.model_proto.SerializeToString()
    return serialised


def torch_export_bytes(module: nn.Module, example: Tensor, facts: dict[str, Any]) -> bytes:
    """A module as what `torch.export.load` reads, with a dynamic batch size."""
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(facts)})
    return file.getvalue()


def session(source: bytes | str | Path) -> Any:
    """An onnxruntime session on the CPU, with torch's number of threads."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    source = source if isinstance(source, bytes) else str(source)
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_onnx(graph: Any, images: NDArray[np.float32]) -> Arrays:
    """All outputs of an onnxruntime session for one batch."""
    outputs: Arrays = graph.run(None, {graph.get_inputs()[0].name: images})
    return outputs


def quantise(graph: bytes, images: Iterator[NDArray[np.float32]]) -> bytes:
    """A graph in int8 by onnxruntime's static quantiser, per channel, the ranges those of the calibrating images.

    Args:
        graph: ONNX, float32.
        images: batches to calibrate on.
    """
    import_onnxruntime()
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = session(graph).get_inputs()[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(images, None)
            return None if batch is None else {name: batch}

    with TemporaryDirectory() as scratch:
        plain, ready, small = (Path(scratch) / file for file in ("plain.onnx", "ready.onnx", "int8.onnx"))
        plain.write_bytes(graph)
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
        quantize_static(str(ready), str(small), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        result = onnx.load(small)
    del result.metadata_props[:]  # the quantiser keeps some, drops others
    onnx.helper.set_model_props(result, {prop.key: prop.value for prop in onnx.load_from_string(graph).metadata_props})
    serialised: bytes = result.SerializeToString()
    return serialised


def onnx_accuracy(graph: Any, evaluation: Evaluation, model: Any, batch_size: int) -> list[float]:
    """Accuracy of each output of an onnxruntime session on an evaluation's test images, percent."""
    data = evaluation.test
    assert data.labels is not None  # an evaluation has them
    hits: Any = 0
    for positions, stored in data.batches(evaluation.test_positions.split(batch_size)):
        outputs = run_onnx(graph, prepared(stored, model).contiguous().numpy())
        hits = hits + np.array([(logits.argmax(1) == data.labels[positions.numpy()]).sum() for logits in outputs])
    return [float(percent) for percent in 100 * hits / len(evaluation.test_positions)]


def load_output(args: ExportArgs) -> SSSDResNet:
    """The network with the parts that the output asked for needs.

    Raises:
        UserError: if it is not a network of this package, or has no classes.
    """
    whole = args.output in ("ensemble", "all", "early-exit")
    model = load_network(args.model, output="ensemble" if whole else args.output)
    if not isinstance(model, SSSDResNet) or model.num_classes < 1:
        raise UserError(
            f"'{args.model}' is not a network of this package with classes: train its heads first (sssd linear)"
        )
    return model.eval()


def export(args: ExportArgs) -> None:
    """`sssd export`."""
    out = Path(args.out)
    check_request(args)
    open_target(args, out)
    model = load_output(args)
    facts = metadata(model, args.output)
    example = torch.randn(2, *facts["input_size"], generator=torch.Generator().manual_seed(0))
    if args.format == "safetensors":
        with atomic_dir(out, "network") as temporary:
            save_network(temporary, model, facts["architecture"], label_names=facts["class_names"])
    elif args.output == "early-exit":
        export_stages(model, args, facts, example, out)
    else:
        export_file(model, args, facts, example, out)
    print(f"{args.model}, output {args.output}, as {args.format}: {out}")


def writes_folder(args: ExportArgs) -> bool:
    """Whether the format has more than one file."""
    return args.format == "safetensors" or (args.format, args.output) == ("onnx", "early-exit")


def check_request(args: ExportArgs) -> None:
    """Refuses what cannot be exported.

    Raises:
        UserError: for options that do not go together, or packages that are missing.
    """
    if args.int8 and (args.format != "onnx" or args.output == "early-exit" or args.data is None):
        raise UserError("--int8 is for --format onnx of one graph (not early-exit), and needs --data to calibrate on")
    if args.format == "torch-export" and args.output == "early-exit":
        raise UserError("early exit is exported in stages as --format onnx; torch-export has one graph per file")
    if args.format == "onnx":
        import_onnxruntime()


def open_target(args: ExportArgs, out: Path) -> None:
    """Makes sure that what is to be written may be, and replaces nothing else.

    Raises:
        UserError: if something else is there.
    """
    folder = writes_folder(args)
    if out.exists() and out.is_dir() != folder:
        raise UserError(f"--out {out} must be a {'folder' if folder else 'file'} for this format, but is not")
    if folder:
        open_out(args, "network" if args.format == "safetensors" else "graphs")
        return
    for file in (out, *([out.with_suffix(".int8.onnx")] if args.int8 else [])):
        is_export = is_graph if args.format == "onnx" else is_program
        check_replaceable(file, args.overwrite, f"a network exported as {args.format}", is_export)


def export_file(model: SSSDResNet, args: ExportArgs, facts: dict[str, Any], example: Tensor, out: Path) -> None:
    """Writes one graph, of one output or of all exits, and with --int8 the quantised one beside it."""
    module: nn.Module = AllExits(model).eval() if args.output == "all" else model
    if args.format == "torch-export":
        atomic_write_bytes(out, torch_export_bytes(module, example, facts))
        return
    outputs = [f"logits{number}" for number in range(1, 5)] if args.output == "all" else ["logits"]
    graph = onnx_bytes(module, example, ["images", *outputs], facts)
    if args.int8:
        export_int8(model, args, graph, outputs, out)
    atomic_write_bytes(out, graph)


def is_program(path: Path) -> bool:
    """Whether a file is a torch.export program with the facts that `sssd export` puts into one."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/metadata.json") for name in archive.namelist())


def is_graph(path: Path) -> bool:
    """Whether a file is an ONNX graph with the facts that `sssd export` puts into one."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(path, load_external_data=False)
    except DecodeError:
        return False
    return {"architecture", "output"} <= {prop.key for prop in graph.metadata_props}


def export_stages(model: SSSDResNet, args: ExportArgs, facts: dict[str, Any], example: Tensor, out: Path) -> None:
    """Writes the folder of early exit's stages.

    Raises:
        UserError: if there are no thresholds.
    """
    if args.thresholds is not None:
        model.thresholds = check_thresholds(args.thresholds)
    if model.thresholds is None:
        raise UserError(f"'{args.model}' has no thresholds: calibrate it by `sssd early-exit`, or give --thresholds")
    files = []
    with atomic_dir(out, "graphs") as temporary:
        for number in range(1, 5):
            stage = Stage(model, number).eval()
            names = [
                "images" if number == 1 else f"map{number - 1}",
                *([f"map{number}"] if number < 4 else []),
                "logits",
            ]
            files.append(f"stage{number}.onnx")
            stage_facts = facts | {"output": f"stage {number} of early exit"}
            atomic_write_bytes(temporary / files[-1], onnx_bytes(stage, example, names, stage_facts))
            if number < 4:
                with torch.no_grad():
                    example = stage(example)[0]
        write_json(temporary / "early_exit.json", {**facts, "stages": files, "thresholds": model.thresholds})


def export_int8(model: SSSDResNet, args: ExportArgs, graph: bytes, outputs: list[str], out: Path) -> None:
    """Writes the int8 form of a graph beside it, and prints both accuracies."""
    assert args.data is not None  # `export` saw to it
    config = config_for(
        args.model, model, DataConfig(data=args.data, split=args.split, storage_size=model.storage_size)
    )
    data = load_images(config, default_size=storage_default(input_spec(model).size), require_labels=True)
    check_classes(data, model, args.model)
    evaluation = evaluation_data(data, config, test_split=args.test_split, holdout=0.5, seed=args.seed)
    drawn = torch.randperm(len(evaluation.train_positions), generator=torch.Generator().manual_seed(args.seed))
    positions = evaluation.train_positions[drawn[: args.calibration_images]]
    batches = (
        prepared(stored, model).contiguous().numpy() for _, stored in data.batches(positions.split(args.batch_size))
    )
    small = quantise(graph, batches)
    target = out.with_suffix(".int8.onnx")
    atomic_write_bytes(target, small)
    print(
        f"int8, calibrated on {len(positions)} images of {data.name} ({data.split}): {target}, "
        f"{len(small) / len(graph):.2f} of the size; accuracy in percent on {evaluation.describe()}:"
    )
    fp32, int8 = (onnx_accuracy(session(source), evaluation, model, args.batch_size) for source in (graph, small))
    for name, before, after in zip(outputs, fp32, int8, strict=True):
        print(f"  {name:8} fp32 {before:6.2f}   int8 {after:6.2f}")
