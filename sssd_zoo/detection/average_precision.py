"""How good detections are: COCO's average precision by torchmetrics, and VOC2007's by its own rule."""

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
    """The package that counts for torchmetrics.

    Raises:
        UserError: if there is none.
    """
    for module in ("pycocotools", "faster_coco_eval"):
        if importlib.util.find_spec(module):
            return module
    raise UserError("average precision needs pycocotools or faster-coco-eval: pip install 'sssd-zoo[detection]'")


def coco_average_precision(predictions: Detections, targets: Detections, class_names: Sequence[str]) -> dict[str, Any]:
    """COCO's AP (mean over the IoU 0.5 to 0.95 and the classes), AP50 and AP75.

    Difficult objects are given as COCO's crowds: not to be found, and what is found on them is not counted.

    Args:
        predictions: of each image: `boxes`, float32 [m, 4] xyxy; `scores`, float32 [m]; `labels`, int64 [m] in 1..C.
        targets: of each image: `boxes` [n, 4], `labels` [n], `difficult`, bool [n].
        class_names: the C names.

    Returns:
        `ap`, `ap50`, `ap75` in percent, and `ap_per_class` by name for the classes that the images have.

    Raises:
        UserError: if no package for it is installed, or no object is there to be found.
    """
    from torchmetrics.detection import MeanAveragePrecision

    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    backend: Any = coco_backend()
    if all(bool(target["difficult"].all()) for target in targets):
        raise UserError("there is no object to be found in the images to measure on; give others")
    # The process that calls has all predictions: torchmetrics would otherwise wait for the others'.
    metric = MeanAveragePrecision(class_metrics=True, backend=backend, sync_on_compute=False)
    crowds = [{"boxes": t["boxes"], "labels": t["labels"], "iscrowd": t["difficult"].to(torch.long)} for t in targets]
    metric.update([dict(prediction) for prediction in predictions], crowds)
    found = metric.compute()
    # Of a class without objects to be found COCO's AP is -1.
    per_class = dict(
        zip(found["classes"].reshape(-1).tolist(), found["map_per_class"].reshape(-1).tolist(), strict=True)
    )
    return {
        "ap": 100 * float(found["map"]),
        "ap50": 100 * float(found["map_50"]),
        "ap75": 100 * float(found["map_75"]),
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
    result = {}
    for label in range(1, num_classes + 1):
        outcomes: list[tuple[float, bool]] = []  # score and whether it is right
        objects = 0
        for prediction, target in zip(predictions, targets, strict=True):
            own = target["labels"] == label
            truth, difficult = target["boxes"][own], target["difficult"][own].tolist()
            objects += difficult.count(False)
            mine = prediction["labels"] == label
            scores, order = prediction["scores"][mine].float().sort(descending=True, stable=True)
            boxes = prediction["boxes"][mine][order]
            if len(truth):
                overlaps, best = box_iou(boxes.float(), truth.float()).max(dim=1)
                pairs = list(zip(overlaps.tolist(), best.tolist(), strict=True))
            else:
                pairs = [(0.0, 0)] * len(boxes)
            taken: set[int] = set()
            for score, (overlap, thing) in zip(scores.tolist(), pairs, strict=True):
                if overlap < iou or not len(truth):
                    outcomes.append((score, False))
                elif not difficult[thing]:
                    outcomes.append((score, thing not in taken))
                    taken.add(thing)
        if objects:
            outcomes.sort(key=lambda outcome: -outcome[0])
            right = torch.tensor([float(correct) for _, correct in outcomes], dtype=torch.float64).cumsum(0)
            precision = right / torch.arange(1, len(right) + 1)
            recall = right / objects
            # Tenths as quotients, like the recalls: 0.1 summed up would miss some of them by a rounding.
            tops = [precision[recall >= tenth / 10] for tenth in range(11)]
            result[label] = 100 * sum(float(top.max()) for top in tops if len(top)) / 11
    return result
