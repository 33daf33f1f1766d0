"""Networks for deployment: one exit, all exits or the stages of early exit, with or without this package.

`sssd export` writes a file, or a folder where there is more than one:

    onnx            OUT, a graph with a dynamic batch size; class names, mean, std and size lie in its metadata
    onnx, int8      also OUT with `.int8.onnx` for `.onnx`, by onnxruntime's static quantiser
    onnx, early-exit   OUT/stage1.onnx to OUT/stage4.onnx and OUT/early_exit.json; docs/deploy.md has the loop
    torch-export    OUT, which `torch.export.load` reads; its extra file metadata.json has the same metadata
    safetensors     OUT/model.safetensors and OUT/config.json, which timm loads by `local-dir:OUT` with this package
    timm            the same for exit 4 as timm's own network, without this package
    transformers    the same for the whole network, and the code that transformers builds it by

The graphs take images as float32 [B, C, S, S], normalised by mean and std, and give logits. C is 3 for RGB, or 1 for a
network for grey images; `input_size` in the metadata is [C, S, S].
"""

import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sssd_zoo.configs import DataConfig, ExportArgs, ProbeConfig
from sssd_zoo.data.inputs import input_channels, input_spec, prepared, storage_default
from sssd_zoo.data.loading import ImageData, load_images, other_split
from sssd_zoo.data.several import open_data
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.protocol import check_classes, evaluation_data, hold_out, refuse_shared_rows
from sssd_zoo.files import atomic_write_bytes, int8_beside, write_json
from sssd_zoo.files.run_folder import atomic_dir, check_replaceable, open_out
from sssd_zoo.hub.portable import plain_network, save_for_transformers
from sssd_zoo.models import MultiExit, stages_and_heads
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.multi_exit import check_thresholds
from sssd_zoo.models.networks import config_for, load_network, no_classifier, no_thresholds
from sssd_zoo.models.saving import save_network

FILE_NAMES = (".safetensors", ".onnx", ".pt2", ".pt", ".pth", ".bin")
FOLDERS = {"safetensors": "network", "timm": "network", "transformers": "transformers"}  # by format, the folder's kind
WHOLE = ("ensemble", "all", "early-exit")  # outputs that need all exits
MOST_FACTS = 10_000_000  # bytes of the metadata of a torch.export program, which has the names of all classes
Arrays = list[NDArray[np.float32]]


class AllExits(nn.Module):
    """A network's four exits as four outputs; see `MultiExit.forward_exits`."""

    def __init__(self, network: MultiExit) -> None:
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
        "architecture": architecture_of(model),
        "output": output,
        "input_size": [input_channels(model), size, size],
        "mean": list(mean),
        "std": list(std),
        **{name: value for name in ("bits", "storage_size") if (value := getattr(model, name, None)) is not None},
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
        raise UserError(
            f"ONNX needs more packages ({error}): pip install onnx onnxruntime onnxscript protobuf"
        ) from error
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


def onnx_answers(graph: Any, images: "Images", model: Any, batch_size: int) -> NDArray[np.int64]:
    """The classes that each output of an onnxruntime session answers, int64 [outputs, N]."""
    batches = images.data.batches(images.positions.split(batch_size))
    outputs = [run_onnx(graph, prepared(stored, model).contiguous().numpy()) for _, stored in batches]
    return np.concatenate([[logits.argmax(1) for logits in batch] for batch in outputs], axis=1)


def load_output(args: ExportArgs) -> MultiExit:
    """The network with the parts that the output asked for needs.

    Raises:
        UserError: if it is not a network of this package, or has no classes.
    """
    output = asked_output(args)
    model = load_network(args.model, output="ensemble" if output in WHOLE else output)
    if not isinstance(model, MultiExit) or (model.num_classes < 1 and args.format != "timm"):
        raise no_classifier(args.model)
    return model.eval()


def export(args: ExportArgs) -> None:
    """`sssd export`."""
    out, output = Path(args.out), asked_output(args)
    check_request(args)
    open_target(args, out)
    model = load_output(args)
    if args.thresholds is not None:
        model.thresholds = check_thresholds(args.thresholds)
    facts = metadata(model, output)
    example = torch.randn(2, *facts["input_size"], generator=torch.Generator().manual_seed(0))
    if args.format in FOLDERS:
        export_folder(model, args, facts, out)
    elif output == "early-exit":
        export_stages(model, args, facts, example, out)
    else:
        export_file(model, args, facts, example, out)
    print(f"{args.model}, output {output}, as {args.format}: {out}")


def asked_output(args: ExportArgs) -> str:
    """The output to export: what was asked for, else the whole network, for timm's own network exit 4."""
    return args.output or ("4" if args.format == "timm" else "ensemble")


def writes_folder(args: ExportArgs) -> bool:
    """Whether the format has more than one file."""
    return args.format in FOLDERS or (args.format, args.output) == ("onnx", "early-exit")


def export_folder(model: MultiExit, args: ExportArgs, facts: dict[str, Any], out: Path) -> None:
    """Writes a folder that timm or transformers loads."""
    arch, names = facts["architecture"], facts["class_names"]
    plain = plain_network(model) if args.format == "timm" else None
    with atomic_dir(out, FOLDERS[args.format]) as temporary:
        if plain is not None:
            save_network(temporary, *plain, label_names=names)
        elif args.format == "transformers":
            save_for_transformers(temporary, model, arch, names)
        else:
            save_network(temporary, model, arch, label_names=names)


def check_request(args: ExportArgs) -> None:
    """Refuses what cannot be exported.

    Raises:
        UserError: for options that do not go together, or packages that are missing.
    """
    if args.int8 and (args.format != "onnx" or args.output == "early-exit" or args.data is None):
        raise UserError("--int8 is for --format onnx of one graph (not early-exit), and needs --data to calibrate on")
    if args.data is not None and not args.int8:
        raise UserError("--data is what --int8 calibrates on, which is not given: give --int8, or remove --data")
    output = asked_output(args)
    if args.format == "timm" and output not in ("4", "final"):
        raise UserError(
            f"--format timm is exit 4 as timm's own network, which has no output {output}: leave --output out, or give "
            "--format onnx, torch-export or transformers, which need no sssd-zoo either"
        )
    if args.format == "transformers" and output not in WHOLE:
        raise UserError("--format transformers is the whole network: leave --output out; exit 4 alone is --format timm")
    if args.format == "torch-export" and args.output == "early-exit":
        raise UserError("early exit is exported in stages as --format onnx; torch-export has one graph per file")
    if args.thresholds is not None:
        if args.format not in ("safetensors", "transformers") and output != "early-exit":
            raise UserError(
                "--thresholds are stored by --output early-exit, --format safetensors and --format transformers alone: "
                "leave them out"
            )
        if output not in WHOLE:
            raise UserError(f"--thresholds need all exits, and output {output} has one: leave them or --output out")
    if args.format == "onnx":
        import_onnxruntime()


def open_target(args: ExportArgs, out: Path) -> None:
    """Makes sure that what is to be written may be, and replaces nothing else.

    Raises:
        UserError: if something else is there.
    """
    folder = writes_folder(args)
    if not folder and args.out.endswith(os.sep):
        name = "model.onnx" if args.format == "onnx" else "model.pt2"
        raise UserError(f"--out {args.out} is a folder, and --format {args.format} writes a file: give {out / name}")
    if folder and out.suffix in FILE_NAMES and not out.exists():
        raise UserError(
            f"--out {out} is the name of a file, and --format {args.format} writes a folder here: give --out "
            f"{out.with_suffix('')}"
        )
    own = ".onnx" if args.format == "onnx" else ".pt2"
    if not folder and out.suffix in FILE_NAMES and out.suffix != own:
        raise UserError(f"--format {args.format} does not write {out.suffix} files: give --out {out.with_suffix(own)}")
    if out.exists() and out.is_dir() != folder:
        raise UserError(f"--out {out} must be a {'folder' if folder else 'file'} for this format, but is not")
    if folder:
        open_out(args, FOLDERS.get(args.format, "graphs"))
        return
    for file in (out, *([int8_beside(out)] if args.int8 else [])):
        is_export = is_graph if args.format == "onnx" else is_program
        check_replaceable(file, args.overwrite, f"a network exported as {args.format}", is_export)
    earlier = int8_beside(out)
    if args.format == "onnx" and not args.int8 and earlier.is_file() and is_graph(earlier):
        print(f"{earlier} is of an earlier export, perhaps of another network: remove it, or replace it by --int8")


def export_file(model: MultiExit, args: ExportArgs, facts: dict[str, Any], example: Tensor, out: Path) -> None:
    """Writes one graph, of one output or of all exits, and with --int8 the quantised one beside it."""
    module: nn.Module = AllExits(model).eval() if args.output == "all" else model
    if args.format == "torch-export":
        atomic_write_bytes(out, torch_export_bytes(module, example, facts), follow_link=True)
        return
    outputs = [f"logits{number}" for number in range(1, 5)] if args.output == "all" else ["logits"]
    graph = onnx_bytes(module, example, ["images", *outputs], facts)
    if args.int8:
        export_int8(model, args, graph, outputs, out)
    atomic_write_bytes(out, graph, follow_link=True)


def is_program(path: Path) -> bool:
    """Whether a file is a torch.export program with the facts that `sssd export` puts into one."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/extra/metadata\.json", name)]
            facts = [json.loads(archive.read(name)) for name in names if archive.getinfo(name).file_size <= MOST_FACTS]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError):  # damaged, encrypted, or no JSON
        return False
    return any(isinstance(each, dict) and {"architecture", "output"} <= each.keys() for each in facts)


def is_graph(path: Path) -> bool:
    """Whether a file is an ONNX graph with the facts that `sssd export` puts into one."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        # As `export` writes it, whatever the name: of itself onnx would read a name in .json or .textproto as text.
        graph = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError:
        return False
    return {"architecture", "output"} <= {prop.key for prop in graph.metadata_props}


def export_stages(model: MultiExit, args: ExportArgs, facts: dict[str, Any], example: Tensor, out: Path) -> None:
    """Writes the folder of early exit's stages.

    Raises:
        UserError: if there are no thresholds.
    """
    if model.thresholds is None:
        raise no_thresholds(args.model)
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


@dataclass(frozen=True)
class Images:
    """Some images of a split."""

    data: ImageData
    positions: Tensor


def int8_images(args: ExportArgs, model: MultiExit) -> tuple[Images, Images, str]:
    """Images to calibrate on, images to measure on, and the words for the latter.

    Raises:
        UserError: for labels of other classes than the network's, or too few images.
    """
    assert args.data is not None  # `export` saw to it
    given = {name: getattr(args, name) for name in {field.name for field in fields(DataConfig)} & vars(args).keys()}
    asked = DataConfig(**given, storage_size=model.storage_size)
    config = config_for(args.model, model, asked)
    data = load_images(config, default_size=storage_default(input_spec(model).size))
    if data.labels is not None:
        check_classes(data, model, args.model)
        # Without a test split these are, with the same seed, the images that `sssd fit` held out from its probes.
        holdout = ProbeConfig.holdout
        evaluation = evaluation_data(data, config, test_split=args.test_split, holdout=holdout, seed=args.seed)
        if evaluation.test is data:
            evaluation = replace(evaluation, words=f"a part of split {data.split} that is not calibrated on")
        measured = Images(evaluation.test, evaluation.test_positions)
        return Images(data, evaluation.train_positions), measured, evaluation.describe()
    splits = open_data(config, progress=False)
    others = [name for name in splits if name != data.split.split("[")[0]]
    test_split = args.test_split or next((name for name in ("test", "validation") if name in others), None)
    if test_split is not None:
        refuse_shared_rows(splits, data, test_split)
        test = load_images(replace(other_split(config, data, test_split), unlabelled=True))
        return Images(data, torch.arange(len(data))), Images(test, torch.arange(len(test))), f"split {test.split}"
    kept, held_out = hold_out(data, 0.5, args.seed, purpose="measure on", advice="add images")
    return Images(data, kept), Images(data, held_out), f"the other half of split {data.split}"


def export_int8(model: MultiExit, args: ExportArgs, graph: bytes, outputs: list[str], out: Path) -> None:
    """Writes the int8 form of a graph beside it, and prints both accuracies; without labels how often they agree."""
    train, test, words = int8_images(args, model)
    drawn = torch.randperm(len(train.positions), generator=torch.Generator().manual_seed(args.seed))
    positions = train.positions[drawn[: args.calibration_images]]
    batches = (
        prepared(stored, model).contiguous().numpy()
        for _, stored in train.data.batches(positions.split(args.batch_size))
    )
    small = quantise(graph, batches)
    target = int8_beside(out)
    atomic_write_bytes(target, small, follow_link=True)
    print(
        f"int8, calibrated on {len(positions)} images of {train.data.name} ({train.data.split}): {target}, "
        f"{len(small) / len(graph):.2f} of the size"
    )
    fp32, int8 = (onnx_answers(session(source), test, model, args.batch_size) for source in (graph, small))
    agreement = 100 * (fp32 == int8).mean(1)
    if train.data.labels is None or test.data.labels is None:
        print(f"answers in percent that are those of fp32, on {len(test.positions)} images, {words} (no labels):")
        for name, percent in zip(outputs, agreement, strict=True):
            print(f"  {name:8} {percent:6.2f}")
        return
    truth = test.data.labels[test.positions.numpy()]
    before, after = (100 * (answers == truth).mean(1) for answers in (fp32, int8))
    print(f"accuracy in percent on {words}; agreement is that of int8 with fp32:")
    for row in zip(outputs, before, after, agreement, strict=True):
        print("  {:8} fp32 {:6.2f}   int8 {:6.2f}   agreement {:6.2f}".format(*row))
