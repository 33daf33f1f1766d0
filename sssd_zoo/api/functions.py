"""A function for each command that trains, measures or uses a network; see `sssd_zoo.api` on their arguments."""

import os
from collections.abc import Sequence
from dataclasses import is_dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from sssd_zoo.api.results import (
    Accuracy,
    EarlyExit,
    Embeddings,
    Export,
    FineTuning,
    Prediction,
    PseudoLabels,
    Run,
    Training,
    by_exit,
)
from sssd_zoo.api.running import in_process, is_name, run
from sssd_zoo.api.settings import flattened
from sssd_zoo.configs import ContrastiveConfig
from sssd_zoo.errors import UserError

Name = str | PathLike[str]  # a path, a timm name, a Hub id, or what another function returned
Data = Name | Sequence[Name] | Any  # names of data, or a data set; see `sssd_zoo.data.objects.stored`


def fit(
    data: Data,
    out: Name,
    *,
    epochs: int | None = None,
    model: str | None = None,
    image_size: int | None = None,
    budget: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Run:
    """Runs the whole pipeline: pretrains, clusters, distils, measures and reports. Call it again to resume.

    What is not given is chosen by the number of images and the device, as `sssd fit` does.

    Args:
        data: the images.
        out: run folder to write.
        epochs: of both trainings; `pretrain={"epochs": ...}` and `distill={"epochs": ...}` give them one by one.
        model: timm name of the student; any timm network that runs in stages; by default chosen by the image size.
        image_size: side of the views in pixels; by default the images' own up to 40 px, otherwise 224.
        budget: wall time of the whole run, such as '30m', by which the epochs are chosen.
        overwrite: redo what `out` holds from other settings or data.
        **settings: any other argument of `sssd fit`, a field of `sssd_zoo.configs.FitArgs`, such as
            `pretrain={"batch_size": 64}`, `cluster={"k": 100}`, `features="..."`, `unlabelled=True`, `seed=1`.

    Raises:
        UserError: for what is wrong with the arguments, the images or `out`.
    """
    if is_dataclass(distill := settings.get("distill")) and "method" not in settings:
        # One of no method of its own is as it was before there were others: the paper's, or with an anchor.
        settings["method"] = "contrastive" if isinstance(distill, ContrastiveConfig) else None
    if epochs is not None:
        given = {name for name, _ in flattened(settings)}
        trainings = ["distill"] if settings.get("features") is not None else ["pretrain", "distill"]
        if whole := [name for name in trainings if is_dataclass(settings.get(name))]:
            raise UserError(
                f"sssd_zoo.fit: epochs, and the {type(settings[whole[0]]).__name__} given as {whole[0]}, both say how "
                f"long to train: leave out epochs, or give {whole[0]} as a dict of what is not at its default"
            )
        settings |= {f"{name}.epochs": epochs for name in trainings if f"{name}.epochs" not in given}
    main = {"data": data, "out": out, "model": model, "image_size": image_size}
    args, _ = run("fit", {**main, "budget": budget, "overwrite": overwrite}, settings)
    return Run.read(Path(args.out))


def pretrain(
    data: Data,
    out: Name,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    model: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Training:
    """Pretrains a network without labels by MoCo v2.

    Args:
        data: the images.
        out: run folder to write.
        epochs: passes over the images.
        batch_size: images per optimiser step.
        model: timm name of the network; by default one of this package's, chosen by the image size.
        resume: resume from the newest checkpoint in `out`.
        overwrite: discard the run in `out` and start again.
        **settings: any other argument of `sssd pretrain`, a field of `sssd_zoo.configs.PretrainArgs`.

    Raises:
        UserError: for what is wrong with the arguments, the images or `out`.
    """
    main = {"data": data, "out": out, "epochs": epochs, "batch_size": batch_size, "model": model}
    args, _ = run("pretrain", {**main, "resume": resume, "overwrite": overwrite}, settings)
    return Training.read(Path(args.out))


def pseudo_label(
    model: Name, data: Data, out: Name, *, k: int | None = None, overwrite: bool = False, **settings: Any
) -> PseudoLabels:
    """Clusters the features of a pretrained network into pseudo labels by k-means.

    Args:
        model: what `pretrain` returned, a run folder, or the name of any timm model.
        data: the images.
        out: folder to write the labels into.
        k: number of clusters.
        overwrite: replace older labels in `out`.
        **settings: any other argument of `sssd pseudo-label`, a field of `sssd_zoo.configs.PseudoLabelArgs`.

    Raises:
        UserError: for what is wrong with the arguments, the images or `out`.
    """
    main = {"model": model, "data": data, "out": out, "k": k, "overwrite": overwrite}
    args, _ = run("pseudo-label", main, settings)
    return PseudoLabels.read(Path(args.out))


def distill(
    data: Data,
    labels: Name,
    out: Name,
    *,
    epochs: int | None = None,
    model: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Training:
    """Trains a four-exit network by self distillation on pseudo, random or true labels.

    Args:
        data: the images.
        labels: what `pseudo_label` returned or its folder, 'random', 'true', or 'own'.
        out: run folder to write.
        epochs: passes over the images.
        model: timm name of the student; any timm network that runs in stages; by default chosen by the image size.
        resume: resume from the newest checkpoint in `out`.
        overwrite: discard the run in `out` and start again.
        **settings: any other argument of `sssd distill`, a field of `sssd_zoo.configs.DistillArgs`.

    Raises:
        UserError: for what is wrong with the arguments, the images or `out`.
    """
    main = {"data": data, "labels": labels, "out": out, "epochs": epochs, "model": model}
    args, _ = run("distill", {**main, "resume": resume, "overwrite": overwrite}, settings)
    return Training.read(Path(args.out))


def embed(
    model: Name,
    data: Data,
    out: Name,
    *,
    exits: Literal[1, 2, 3, 4, "final", "all"] | None = None,
    normalise: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Embeddings:
    """Writes the features of images into a file. Call it again to resume.

    Args:
        model: what another function returned, folder of a network or of a run, any timm name, or hf-hub:NAME.
        data: the images.
        out: file to write; its extension sets the format: .parquet, .csv or .npy.
        exits: an exit's number, 'final', or 'all'.
        normalise: divide every embedding by its L2 norm.
        overwrite: replace an older file.
        **settings: any other argument of `sssd embed`, a field of `sssd_zoo.configs.EmbedArgs`.

    Raises:
        UserError: for what is wrong with the arguments, the images or `out`.
    """
    main = {"model": model, "data": data, "out": out, "exits": exits, "normalise": normalise, "overwrite": overwrite}
    args, _ = run("embed", main, settings)
    return Embeddings.read(Path(args.out))


def linear(
    model: Name,
    data: Data,
    *,
    out: Name | None = None,
    test_split: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Accuracy:
    """Trains a linear probe on every exit of a frozen network, and measures them.

    Args:
        model: what another function returned, a run folder, or the name of any timm model.
        data: labelled images.
        out: folder to write the network with the probes as its heads into; by default none.
        test_split: split to measure on; by default 'test' or 'validation', otherwise a fraction held out.
        overwrite: replace an older network in `out`.
        **settings: any other argument of `sssd linear`, a field of `sssd_zoo.configs.LinearArgs`.

    Raises:
        UserError: for what is wrong with the arguments, the images or `out`.
    """
    main = {"model": model, "data": data, "out": out, "test_split": test_split, "overwrite": overwrite}
    args, measured = run("linear", main, settings)
    return Accuracy(
        exits=by_exit(measured["exits"], measured["ensemble"]),
        data=measured["data"],
        test=measured["test"],
        path=None if args.out is None else Path(args.out),
    )


def knn(
    model: Name, data: Data, *, neighbours: int | None = None, test_split: str | None = None, **settings: Any
) -> Accuracy:
    """Measures every exit of a frozen network by weighted k-nearest neighbours.

    Args:
        model: what another function returned, a run folder, or the name of any timm model.
        data: labelled images.
        neighbours: number of neighbours.
        test_split: split to measure on; by default 'test' or 'validation', otherwise a fraction held out.
        **settings: any other argument of `sssd knn`, a field of `sssd_zoo.configs.KNNArgs`.

    Raises:
        UserError: for what is wrong with the arguments or the images.
    """
    main = {"model": model, "data": data, "neighbours": neighbours, "test_split": test_split}
    _, measured = run("knn", main, settings)
    return Accuracy(exits=by_exit(measured["exits"]), data=measured["data"], test=measured["test"])


def early_exit(
    model: Name,
    data: Data,
    out: Name,
    *,
    points_lost: float | None = None,
    answers_changed: float | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> EarlyExit:
    """Calibrates a network's early exit on held-out images: thresholds that meet a budget.

    Args:
        model: what another function returned, folder of a network or of a run, timm name, or hf-hub:NAME.
        data: images that its classifiers were not trained on; labels are not needed.
        out: folder to write the calibrated network and its report into.
        points_lost: budget in percentage points of accuracy; needs labels.
        answers_changed: budget in percent of the images that are answered otherwise than by the ensemble.
        overwrite: replace an older network in `out`.
        **settings: any other argument of `sssd early-exit`, a field of `sssd_zoo.configs.EarlyExitArgs`, such as the
            budgets `multiply_adds` and `latency`, of which one is given at most.

    Raises:
        UserError: for what is wrong with the arguments, the images or `out`.
    """
    budgets = {"points_lost": points_lost, "answers_changed": answers_changed}
    args, _ = run("early-exit", {"model": model, "data": data, "out": out, **budgets, "overwrite": overwrite}, settings)
    return EarlyExit.read(Path(args.out))


def export(
    model: Name,
    out: Name,
    *,
    format: Literal["onnx", "torch-export", "safetensors", "timm", "transformers"] | None = None,
    output: Literal[1, 2, 3, 4, "final", "ensemble", "all", "early-exit"] | None = None,
    data: Data | None = None,
    int8: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Export:
    """Exports a network for deployment, with or without this package.

    Args:
        model: what another function returned, folder of a network or of a run, timm name, or hf-hub:NAME.
        out: file or folder to write.
        format: what is written, see `sssd export`.
        output: which of the network's answers.
        data: images to calibrate int8 on.
        int8: also write the ONNX graph quantised to int8.
        overwrite: replace an older export.
        **settings: any other argument of `sssd export`, a field of `sssd_zoo.configs.ExportArgs`.

    Raises:
        UserError: for what is wrong with the arguments or `out`, or packages that are missing.
    """
    main = {"model": model, "out": out, "format": format, "output": output, "data": data}
    args, _ = run("export", {**main, "int8": int8, "overwrite": overwrite}, settings)
    return Export.read(Path(args.out), int8=args.int8)


def predict(
    model: Name,
    images: Any,
    *,
    output: Literal["auto", 1, 2, 3, 4, "final", "ensemble", "early-exit"] | None = None,
    thresholds: Sequence[float] | None = None,
    **settings: Any,
) -> list[Prediction]:
    """Classifies images.

    Args:
        model: what another function returned, folder of a network or of a run, timm name, or hf-hub:NAME.
        images: an image file, a folder of them or a list of these; or a data set, a list of images or an image, as in
            `sssd_zoo.data.objects`, whose answers then name images by their numbers.
        output: an exit's number, 'final', 'ensemble' or 'early-exit'; by default early exit where the network has
            thresholds.
        thresholds: of early exit at exits 1 to 3, 0 to 1.
        **settings: any other argument of `sssd predict`, a field of `sssd_zoo.configs.PredictArgs`.

    Raises:
        UserError: for what is wrong with the arguments or the images.
    """
    main = {"model": model, "output": output, "thresholds": thresholds}
    named = [images] if is_name(images) else images
    if isinstance(named, (list, tuple)) and named and all(map(is_name, named)):
        _, found = run("predict", {**main, "images": list(named)}, settings, function="predictions")
        answers: list[Prediction] = found
        return answers
    with TemporaryDirectory(prefix="sssd-predict-") as folder:
        with in_process():
            from sssd_zoo.data.objects import image_files, is_image

            files = image_files([images] if is_image(images) else images, Path(folder))
        try:
            _, found = run("predict", {**main, "images": files}, settings, function="predictions")
        except UserError as error:  # the user knows an image by its number, not by its file
            raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from error
    # Some images may have been left out, and several may be one file.
    numbers, answers = iter(enumerate(files)), []
    for one in found:
        number = next(number for number, file in numbers if file == one.image)
        answers.append(one._replace(image=number))
    return answers


def finetune(
    models: Name | Sequence[Name],
    data: Data,
    out: Name,
    *,
    fractions: Sequence[float] | None = None,
    per_class: Sequence[int] | None = None,
    epochs: int | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> FineTuning:
    """Fine-tunes networks on class-balanced subsets of the labels, over several seeds. Call it again to resume.

    Args:
        models: networks: what other functions returned, run folders, timm names, and 'scratch'.
        data: labelled images.
        out: folder to write.
        fractions: of each class's labels, above 0 and up to 1.
        per_class: numbers of labels per class, instead of fractions.
        epochs: passes over the labelled images.
        overwrite: redo what `out` holds from other settings or data.
        **settings: any other argument of `sssd finetune`, a field of `sssd_zoo.configs.FinetuneArgs`.

    Raises:
        UserError: for what is wrong with the arguments, the images or `out`.
    """
    several = [models] if is_name(models) else list(models)  # type: ignore[arg-type]  # a name is no sequence of names
    amounts = {
        name: value if value is None else list(value)
        for name, value in (("fractions", fractions), ("per_class", per_class))
    }
    main = {"models": several, "data": data, "out": out, **amounts, "epochs": epochs, "overwrite": overwrite}
    args, _ = run("finetune", main, settings)
    return FineTuning.read(Path(args.out), deployed=args.deploy)
