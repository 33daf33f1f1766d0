"""Classes of image files: `sssd predict`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sssd_zoo.configs import PredictArgs
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.images import Corrupt, quiet_pillow
from sssd_zoo.data.inputs import pixels_of, prepare
from sssd_zoo.data.loading import CorruptTally
from sssd_zoo.data.opening import encoded
from sssd_zoo.data.walk import printable, walk
from sssd_zoo.distributed.hardware import autocast_dtype, compute_device, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain
from sssd_zoo.evaluation.features import float32_classifiers
from sssd_zoo.evaluation.prediction import Prediction
from sssd_zoo.files import expand_home
from sssd_zoo.models import MultiExit
from sssd_zoo.models.merged import Answers
from sssd_zoo.models.networks import load_network, no_classifier, no_thresholds
from sssd_zoo.models.saving import class_descriptions


def find_images(names: list[str], *, arrays: bool = False) -> list[Path]:
    """The files named, and the images below the folders named, which are those that training would read.

    Args:
        names: of files and folders.
        arrays: count files of NumPy arrays as images of folders.

    Raises:
        UserError: for a name that is not there or is not a regular file, or a folder without images.
    """
    files: list[Path] = []
    for name in names:
        path = Path(expand_home(name))
        if path.is_dir():
            folder = walk(path, arrays=arrays)
            if not folder.images:
                raise folder.no_images()
            folder.warn()
            files += [path / image for image in folder.images]
        elif path.is_file():
            files.append(path)
        elif path.exists():
            raise UserError(f"{printable(path)} is not a regular file: give image files, or folders of them")
        else:
            raise UserError(f"there is no file or folder '{printable(path)}'")
    return files


def load_answering(args: PredictArgs) -> tuple[Any, str]:
    """The network, and what answers: an exit's number, 'ensemble' or 'early-exit'.

    Raises:
        UserError: if it is not a network of this package, or lacks classes, or thresholds for early exit.
    """
    whole = args.output in ("auto", "ensemble", "early-exit")
    kwargs = {} if args.output == "auto" else {"output": "ensemble" if whole else args.output}
    model = load_network(args.model, **kwargs)
    if not isinstance(model, MultiExit) or model.num_classes < 1:
        raise no_classifier(args.model)
    thresholds = args.thresholds if args.thresholds is not None else model.thresholds
    output: str = args.output
    if output == "auto":
        output = "early-exit" if thresholds is not None else model.output
    if output == "early-exit" and model.output != "ensemble":
        raise UserError(
            f"'{args.model}' has one exit, so there is no early exit: remove --thresholds, or give the whole network"
        )
    if output == "early-exit" and thresholds is None:
        raise no_thresholds(args.model)
    if args.thresholds is not None and output != "early-exit":
        raise UserError(f"--thresholds apply to early exit only, not to --output {output}")
    return float32_classifiers(model).eval(), "4" if output == "final" else output


def predict(args: PredictArgs) -> None:
    """`sssd predict`."""
    tune_cpu()
    model, output = load_answering(args)
    files = find_images(args.images, arrays=pixels_of(model) is not None)
    rows = Rows(model, args.format)
    rows.print_head()
    for good, logits, exits in answers(args, model, output, files):
        rows.print_answers(good, logits, exits)


def predictions(args: PredictArgs) -> list[Prediction]:
    """What `sssd predict` prints, as objects; images that cannot be read are left out, see `max_corrupt`."""
    tune_cpu()
    model, output = load_answering(args)
    files = find_images(args.images, arrays=pixels_of(model) is not None)
    rows = Rows(model, args.format)
    return [one for batch in answers(args, model, output, files) for one in rows.entries(*batch)]


def answers(
    args: PredictArgs, model: Any, output: str, files: list[Path]
) -> Iterator[tuple[list[Path], Tensor, list[int] | list[str]]]:
    """The files of each batch that can be read, their logits [B, num_classes], and the exits that gave them.

    Raises:
        UserError: for an answer that is not finite; at the end, if more than `max_corrupt` images cannot be read.
    """
    device = compute_device(args.device)
    model.to(device, memory_format=torch.channels_last)
    # Early exit is calibrated and measured in fp32, all else in the precision that 'auto' stands for.
    fp32 = output == "early-exit" and args.precision == "auto"
    autocast = None if fp32 else autocast_dtype(args.precision, args.device)
    corrupt: list[Corrupt] = []
    for start in range(0, len(files), args.batch_size):
        good, pixels = read_batch(files[start : start + args.batch_size], model, args.max_pixels, corrupt)
        if not good:
            continue
        with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits, exits = answer(model, torch.cat(pixels), output, args.thresholds)
        if not (finite := logits.isfinite().all(1)).all():
            file = good[int(finite.int().argmin())]
            raise UserError(
                f"{args.model} gives NaN or infinity for {file}: give --precision fp32, or check its weights"
            )
        yield good, logits, exits
    if corrupt:
        CorruptTally("those given", args.max_corrupt).add(corrupt, len(files))


def read_batch(
    files: list[Path], model: Any, max_pixels: int, corrupt: list[Corrupt]
) -> tuple[list[Path], list[Tensor]]:
    """The files that are images, and each as the network's input; the others are added to `corrupt`."""
    good, pixels = [], []
    with quiet_pillow():
        for file in files:
            image = encoded(0, {"bytes": None, "path": str(file)})
            try:
                pixels.append(prepare(image, model, max_pixels))
                good.append(file)
            except CorruptImageError as error:
                corrupt.append((str(file), str(error)))
    return good, pixels


class Rows:
    """Prints answers, a line for each image.

    Args:
        model: whose classes are answered.
        form: 'table' or 'jsonl'.
    """

    def __init__(self, model: Any, form: str) -> None:
        self.form = form
        names = model.pretrained_cfg.get("label_names") or [str(number) for number in range(model.num_classes)]
        self.answers = Answers(names)
        self.names = self.answers.names
        self.descriptions = class_descriptions(self.names)  # of WordNet's ids, which say nothing to a person
        described = self.descriptions
        self.shown = [plain(described[name].split(",")[0] if described else name) for name in self.names]
        self.width = max(len("class"), *map(len, self.shown))

    def print_head(self) -> None:
        """The head of a table."""
        if self.form == "table":
            print(f"{'class':{self.width}}  confidence  exit      image")

    def print_answers(self, files: list[Path], logits: Tensor, exits: list[int] | list[str]) -> None:
        """A batch's answers.

        Args:
            files: B images.
            logits: of them, [B, num_classes].
            exits: that gave them; see `answer`.
        """
        for one in self.entries(files, logits, exits):
            if self.form == "jsonl":
                entry = {"image": one.image, "class": one.label, "confidence": round(one.confidence, 6)}
                described = {} if one.description is None else {"description": one.description}
                print(json.dumps({**entry, "exit": one.exit, **described}))
            else:
                shown, path = self.shown[self.names.index(one.label)], plain(one.image, longest=4096)
                print(f"{shown:{self.width}}  {one.confidence:10.4f}  {one.exit!s:8}  {path}", flush=True)

    def entries(self, files: list[Path], logits: Tensor, exits: list[int] | list[str]) -> list[Prediction]:
        """A batch's answers as objects; see `print_answers`."""
        confidences, classes = self.answers.probabilities(logits).max(1)
        takers: Sequence[int | str] = exits
        return [
            Prediction(str(file), name := self.names[number], confidence, taken, (self.descriptions or {}).get(name))
            for file, number, confidence, taken in zip(
                files, classes.tolist(), confidences.tolist(), takers, strict=True
            )
        ]


def answer(
    model: Any, images: Tensor, output: str, thresholds: list[float] | None
) -> tuple[Tensor, list[int] | list[str]]:
    """Logits [B, num_classes], and which exit gave each: its number, or 'ensemble'."""
    if output == "early-exit":
        early = model.forward_early(images, thresholds)
        return early.logits, early.exit.tolist()
    exits: Any = [output if output == "ensemble" else int(output)] * len(images)
    return model(images), exits
