"""`sssd detect`: Faster R-CNN on a trained trunk."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN

from sssd_zoo.configs import DetectArgs, DetectionDataConfig, DetectorConfig, ForwardConfig, OptimConfig, RuntimeConfig
from sssd_zoo.data.detection import DetectionData, DetectionLoader, default_test_splits, load_detection
from sssd_zoo.data.inputs import input_channels, pixels_of
from sssd_zoo.detection.average_precision import coco_backend
from sssd_zoo.detection.detector import (
    build_detector,
    measure_detector,
    metrics_table,
    save_detector,
    stage_modules,
)
from sssd_zoo.distributed import barrier, rank, world_size
from sssd_zoo.distributed.hardware import machine, tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.files import write_json
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.models.networks import load_network, weights_digest
from sssd_zoo.tasks.detection import Detection
from sssd_zoo.training.engine import check_trainable
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import announce, recorded_trainer


def detect(args: DetectArgs) -> None:
    """`sssd detect`."""
    tune_cpu()
    runtime, optim = RuntimeConfig.of(args), OptimConfig.of(args)
    processes = make_accelerator(runtime).num_processes  # from here on each process knows its rank
    out = open_out(args, "detector")
    coco_backend()
    data_config, settings = DetectionDataConfig.of(args), DetectorConfig.of(args)
    data = load_detection(data_config, device=args.device)
    data.check(settings.longest(), "trained on")
    test = load_test_data(data_config, args.test_data, args.test_split, data, device=args.device)
    if test is not None:
        test.check(settings.longest(), "measured on")
    check_trainable(optim, processes, len(data))
    torch.manual_seed(runtime.seed)
    trunk = load_trunk_to_train(args)
    identity = {
        **asdict(settings),
        "data": data.fingerprint,
        "images": len(data),
        "classes": data.class_names,
        # The weights count, not where they lie; random ones follow from the network and the seed.
        "model": weights_digest(trunk) if args.pretrained else args.model,
    }
    task = make_task(trunk, args, settings, len(data.class_names))
    loader = DetectionLoader(data, args.batch_size, runtime.seed)
    # Not `run_training`, whose run folder holds a classification network and whose images are squares of one size.
    trainer = recorded_trainer(
        task, loader, arguments=args, optim=optim, runtime=runtime, out=out, identity=identity, title="detect"
    )
    measured = trainer.run()
    announce(out, f"Faster R-CNN on {args.model} trained on {len(data)} images of {data.name}", measured)
    if rank() == 0:
        figures.loss_curves({"Faster R-CNN": read_metrics(out / "metrics.jsonl")}, out / "curves.png")
        save_detector(out, task.detector, settings, data.class_names)
        if test is not None:
            write_metrics(out, args, task.detector, test, measured)
    barrier()


def load_test_data(
    config: DetectionDataConfig,
    data: list[str] | None,
    split: str | None,
    train: DetectionData,
    *,
    device: Literal["auto", "cpu"] = "auto",
) -> DetectionData | None:
    """The images to measure on, none of which may be trained on.

    Args:
        config: of the images to train on.
        data: sources to measure on; by default those of `config`.
        split: split to measure on; by default 'test' or 'val', the first that has no image to train on.
        train: the images to train on.
        device: see `load_detection`.

    Returns:
        The images; None if no data and no split are given and the data have neither 'test' nor 'val'.

    Raises:
        UserError: if the images given are trained on too, or those of all default splits.
    """
    config = replace(config, data=data or config.data)
    names: list[str | None] = [split] if split else [*default_test_splits(config)]
    if not names and data is None:
        return None
    # A COCO file has no splits: without a name, all of another file is measured on.
    for name in names or [None]:
        test = load_detection(replace(config, split=name), classes=train.class_names, device=device)
        shared = test.shared_with(train)
        if not shared:
            return test
    raise UserError(
        f"{len(shared)} of {len(test)} images of {test.name} are trained on too ({listed(shared)}): give other images "
        "to measure on by --test_split or --test_data, or train on another --split"
    )


def load_trunk_to_train(args: DetectArgs) -> nn.Module:
    """The trunk that the arguments name.

    Raises:
        UserError: if the trunk cannot be loaded, or is not for RGB images of 8 bits.
    """
    trunk: nn.Module = load_network(args.model, pretrained=args.pretrained, features_only=True)
    if pixels_of(trunk) is not None:
        raise UserError(
            f"'{args.model}' takes images with {input_channels(trunk)} channels as they are stored, and detection "
            "reads RGB of 8 bits: give a network for those"
        )
    return trunk


def make_task(trunk: nn.Module, args: DetectArgs, settings: DetectorConfig, num_classes: int) -> Detection:
    """A new detector on a trunk, ready to train.

    Raises:
        UserError: if the trunk's maps do not suit a detector, or it has fewer stages than are to be frozen.
    """
    detector = build_detector(trunk, num_classes, settings)
    frozen = stage_modules(trunk, args.frozen_stages)
    return Detection(detector, size=args.short_side, frozen=frozen, batchnorm=args.batchnorm)


def write_metrics(
    out: Path, args: DetectArgs, detector: FasterRCNN, test: DetectionData, measured: dict[str, float]
) -> None:
    """Measures a trained detector, writes metrics.json and prints average precision.

    Args:
        out: the run folder.
        args: of the command.
        detector: the trained one.
        test: images to measure on.
        measured: of the training, see `Trainer.run`.
    """
    # Scores in half precision tie at the top, and average precision depends on their order.
    forward = ForwardConfig(batch_size=max(1, args.batch_size // world_size()), precision="fp32", device=args.device)
    metrics = measure_detector(detector, test, forward, out, voc=args.voc)
    run = {"model": args.model, "pretrained": args.pretrained, "seed": args.seed, "machine": machine()}
    write_json(out / "metrics.json", {**metrics, **run, **measured})
    print(f"average precision in percent on {len(test)} images of {test.name}:\n{metrics_table(metrics)}")
