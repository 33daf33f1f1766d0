"""`sssd detect-eval`: average precision of a trained detector."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from sssd_zoo.configs import DetectEvalArgs, DetectionDataConfig, ForwardConfig
from sssd_zoo.data.detection import load_detection, split_to_measure
from sssd_zoo.data.detection.annotations import clean_name
from sssd_zoo.detection.average_precision import coco_backend
from sssd_zoo.detection.detector import load_detector, measure_detector, metrics_table
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed
from sssd_zoo.files.run_folder import atomic_dir, open_out
from sssd_zoo.training.runs import save_config


def check_classes(asked: list[str] | None, classes: list[str]) -> None:
    """Refuses class names that are not the detector's; their order does not matter.

    Raises:
        UserError: naming both.
    """
    if asked is not None and {clean_name(name) for name in asked} != set(classes):
        raise UserError(
            f"--classes {listed(asked)} are not the classes of the detector, {listed(classes)}: remove --classes, or "
            "give the detector of these classes"
        )


def resize(transform: Any, short_side: int) -> None:
    """Sets the short side of a detector's images; the long one may be longer by as much as in training."""
    longer = transform.max_size / transform.min_size[-1]
    transform.min_size, transform.max_size = (short_side,), round(short_side * longer)


def detect_eval(args: DetectEvalArgs) -> None:
    """`sssd detect-eval`."""
    tune_cpu()
    out = None if args.out is None else open_out(args, "detections")
    coco_backend()
    detector, classes = load_detector(args.model)
    config = DetectionDataConfig.of(args)
    check_classes(config.classes, classes)
    if args.short_side is not None:
        resize(detector.transform, args.short_side)
    if not config.split:
        config = replace(config, split=split_to_measure(config))
    data = load_detection(config, classes=classes, device=args.device)
    data.check(detector.transform.max_size, "measured on")
    with nullcontext() if out is None else atomic_dir(out, "detections") as folder:
        if folder is not None:
            save_config(folder, args)
        metrics = measure_detector(detector, data, ForwardConfig.of(args), folder, voc=args.voc)
    print(f"average precision of {args.model} in percent on {len(data)} images of {data.name}:")
    print(metrics_table(metrics))
