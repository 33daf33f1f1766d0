"""`sssd detect-eval`: average precision of a trained detector."""

from dataclasses import replace
from typing import Any

from sssd_zoo.configs import DetectEvalArgs, DetectionDataConfig, ForwardConfig
from sssd_zoo.data.detection import has_split, load_detection
from sssd_zoo.detection.average_precision import coco_backend
from sssd_zoo.detection.detector import load_detector, measure_detector, metrics_table
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.training.runs import prepare_run_folder


def load_test_data(config: DetectionDataConfig, data: list[str] | None, split: str | None, classes: list[str]) -> Any:
    """The test data: the data and split asked for, else the same data's split 'test' or 'val', else None."""
    test_config = replace(config, data=data or config.data)
    names = ("test", "val", "validation")
    # A COCO file has no splits: without a name, all of another file is measured on.
    chosen = split or next((name for name in names if name != config.split and has_split(test_config, name)), None)
    if chosen is None and data is None:
        return None
    return load_detection(replace(test_config, split=chosen), classes=classes)


def detect_eval(args: DetectEvalArgs) -> None:
    """`sssd detect-eval`."""
    tune_cpu()
    out = None if args.out is None else open_out(args, "detections")
    coco_backend()
    detector, classes = load_detector(args.model)
    config = DetectionDataConfig.of(args)
    if args.short_side is not None:
        transform: Any = detector.transform
        transform.min_size, transform.max_size = (args.short_side,), round(args.short_side * 5 / 3)
    data = (
        load_detection(config, classes=classes) if config.split else load_test_data(config, config.data, None, classes)
    )
    if out is not None:
        prepare_run_folder(out, args)
    metrics = measure_detector(detector, data, ForwardConfig.of(args), out, voc=args.voc)
    print(f"average precision of {args.model} in percent on {len(data)} images of {data.name}:")
    print(metrics_table(metrics))
