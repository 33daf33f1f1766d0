"""Average precision of detections: COCO's by torchmetrics, and VOC2007's eleven-point rule."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from sssd_zoo.errors import UserError

Detections = Sequence[Mapping[str, Tensor]]


def coco_backend() -> str:
    """The COCO package that torchmetrics is to use.

    Raises:
        UserError: if there is none.
    """
    for module in ("pycocotools", "faster_coco_eval"):
        if importlib.util.find_spec(module):
            return module
    raise UserError("average precision needs pycocotools or faster-coco-eval: pip install pycocotools")


def coco_average_precision(predictions: Detections, targets: Detections, class_names: Sequence[str]) -> dict[str, Any]:
    """COCO's AP (mean over the IoU 0.5 to 0.95 and the classes), AP50 and AP75.

    Difficult objects are passed as COCO's crowds: they need not be found, and detections on them are not counted.

    Args:
        predictions: of each image: `boxes`, float32 [m, 4] xyxy; `scores`, float32 [m]; `labels`, int64 [m] in 1..C.
        targets: of each image: `boxes` [n, 4], `labels` [n], `difficult`, bool [n].
        class_names: the C names.

    Returns:
        `ap`, `ap50`, `ap75` in percent, and `ap_per_class` by name for the classes that occur in the images.

    Raises:
        UserError: if no COCO package is installed, or the images have no object to find.
    """
    from torchmetrics.detection import MeanAveragePrecision

    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    backend: Any = coco_backend()
    if all(bool(target["difficult"].all()) for target in targets):
        raise UserError("the test images have no object to find; give others")
    # This process has all predictions: torchmetrics would otherwise wait for those of the other processes.
    metric = MeanAveragePrecision(class_metrics=True, backend=backend, sync_on_compute=False)
    crowds = [{"boxes": t["boxes"], "labels": t["labels"], "iscrowd": t["difficult"].to(torch.long)} for t in targets]
    metric.update([dict(prediction) for prediction in predictions], crowds)
    result = metric.compute()
    # COCO's AP of a class without objects to find is -1.
    per_class = dict(
        zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1).tolist(), strict=True)
    )
    return {
        "ap": 100 * float(result["map"]),
        "ap50": 100 * float(result["map_50"]),
        "ap75": 100 * float(result["map_75"]),
        "ap_per_class": {class_names[label - 1]: 100 * ap for label, ap in per_class.items() if ap >= 0},
    }


def voc_average_precision(
    predictions: Detections, targets: Detections, num_classes: int, *, iou: float = 0.5
) -> dict[int, float]:
    """VOC2007's average precision: the mean, over the recalls 0, 0.1 to 1, of the best precision from there on.

    The rule of Everingham et al. (2010) and its development kit: detections of a class, most confident first, each
    compared with the object of its class that it overlaps most. At an overlap of at least `iou` the first to find it is
    right and later ones are wrong; on a difficult object they are neither. All others are wrong.

    Args:
        predictions: see `coco_average_precision`.
        targets: see `coco_average_precision`.
        num_classes: C.
        iou: the overlap, intersection over union.

    Returns:
        AP in percent of each class, 1..C, that has an object that is not difficult.
    """
    precisions = {}
    for label in range(1, num_classes + 1):
        outcomes: list[tuple[float, bool]] = []  # score, and whether the detection is right
        objects = 0
        for prediction, target in zip(predictions, targets, strict=True):
            image_outcomes, image_objects = _match(prediction, target, label, iou)
            outcomes += image_outcomes
            objects += image_objects
        if objects:
            outcomes.sort(key=lambda outcome: -outcome[0])
            precisions[label] = _eleven_points([correct for _, correct in outcomes], objects)
    return precisions


def _match(
    prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], label: int, iou: float
) -> tuple[list[tuple[float, bool]], int]:
    """Scores of an image's detections of a class and whether they are right, and its number of objects to find."""
    of_class = target["labels"] == label
    truth, difficult = target["boxes"][of_class], target["difficult"][of_class].tolist()
    predicted = prediction["labels"] == label
    scores, order = prediction["scores"][predicted].float().sort(descending=True, stable=True)
    boxes = prediction["boxes"][predicted][order]
    if not len(truth):
        return [(score, False) for score in scores.tolist()], 0
    overlaps, best = box_iou(boxes.float(), truth.float()).max(dim=1)
    outcomes = []
    detected: set[int] = set()
    for score, overlap, index in zip(scores.tolist(), overlaps.tolist(), best.tolist(), strict=True):
        if overlap < iou:
            outcomes.append((score, False))
        elif not difficult[index]:
            outcomes.append((score, index not in detected))
            detected.add(index)
    return outcomes, difficult.count(False)


def _eleven_points(correct: list[bool], objects: int) -> float:
    """VOC2007's average precision in percent, of detections in the order of their scores."""
    right = torch.tensor([float(each) for each in correct], dtype=torch.float64).cumsum(0)
    precision = right / torch.arange(1, len(right) + 1)
    recall = right / objects
    # Tenths as quotients, like the recalls: summing up 0.1 would miss some of them by a rounding error.
    tops = [precision[recall >= tenth / 10] for tenth in range(11)]
    return 100 * sum(float(top.max()) for top in tops if len(top)) / 11
