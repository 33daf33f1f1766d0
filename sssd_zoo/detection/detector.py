"""Faster R-CNN on a multi-exit trunk: building, saving, loading and measuring a detector.

The trunk is a network made with timm's `features_only`, under torchvision's feature pyramid and heads (table 5 of the
SSSD paper). A run folder holds detector.json and model.safetensors; `load_detector` reads them.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models._input import get_model_args
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from sssd_zoo.configs import (
    DetectorConfig,
    ForwardConfig,
)
from sssd_zoo.configs.ranges import Names
from sssd_zoo.data.augment import grey, to_float
from sssd_zoo.data.detection import DetectionData
from sssd_zoo.data.inputs import input_channels, input_spec
from sssd_zoo.detection.average_precision import coco_average_precision, voc_average_precision
from sssd_zoo.distributed import rank
from sssd_zoo.distributed.hardware import autocast_dtype, compute_device
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plain
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.files import atomic_write_bytes, check_content, sha256_of, write_json
from sssd_zoo.models.backbones import stored_as
from sssd_zoo.models.checks import check_network, read_config
from sssd_zoo.models.networks import check_weights, load_network
from sssd_zoo.models.saving import network_weights
from sssd_zoo.models.staged import StagedMultiExit

SHOWN = 6  # test images in detections.png

CONFIDENT = 0.5  # the lowest score of the boxes drawn there


class Pyramid(nn.Module):
    """The maps of a trunk's last four stages and torchvision's feature pyramid on them (Lin et al. 2017).

    Args:
        body: a timm network made with `features_only=True`.
        out_channels: of every map of the pyramid.
    """

    def __init__(self, body: Any, out_channels: int) -> None:
        super().__init__()
        self.body, self.out_channels, self.grey = body, out_channels, input_channels(body) == 1
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels()[-4:], out_channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images, float32 [B, 3, H, W], to maps [B, channels, h, w], '0' the finest, 'pool' the coarsest."""
        if self.grey:
            images = grey(images)
        # The memory format of the weights: otherwise every convolution on a CPU converts its input.
        stages = self.body(images.contiguous(memory_format=torch.channels_last))[-4:]
        maps: dict[str, Tensor] = self.fpn({str(i): each for i, each in enumerate(stages)})
        return maps


def build_detector(body: Any, num_classes: int, config: DetectorConfig) -> FasterRCNN:
    """Faster R-CNN (Ren et al. 2015) on a trunk.

    Anchors are squares and 1:2 and 2:1 boxes of `anchor_scale` times a map's stride: 32 px at stride 4 by default, as
    in torchvision.

    Args:
        body: a timm network made with `features_only=True`.
        num_classes: without the background.
        config: sizes of images, anchors, pyramid and regions.

    Raises:
        UserError: if the trunk's maps do not have growing strides.
    """
    reductions = body.feature_info.reduction()[-4:]
    widths = body.feature_info.channels()[-4:]
    # An unusual size separates networks that take any size from those built for a single one.
    try:
        with torch.no_grad():
            maps = [tuple(each.shape) for each in body.eval()(torch.zeros(1, input_channels(body), 96, 160))[-4:]]
    except (RuntimeError, AssertionError, ValueError):
        maps = []
    expected = [(1, count, 96 // step, 160 // step) for count, step in zip(widths, reductions, strict=True)]
    if maps != expected or len(set(reductions)) < len(reductions):
        raise UserError(
            f"'{config.model}' does not give maps [B, C, H, W] of growing strides for images of any size; take a "
            "convolutional network"
        )
    steps = [*reductions, 2 * reductions[-1]]
    sizes = tuple((round(config.anchor_scale * step),) for step in steps)
    levels = [str(number) for number in range(len(reductions))]
    _, mean, std = input_spec(body)
    per_channel = 3 // len(mean)  # images stay RGB until `Pyramid` makes them grey for a network of one channel
    return FasterRCNN(
        Pyramid(body, config.fpn_channels),
        num_classes + 1,
        min_size=config.short_side,
        max_size=config.longest(),
        image_mean=list(mean) * per_channel,
        image_std=list(std) * per_channel,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        box_batch_size_per_image=config.regions,
    )


def stage_modules(body: Any, stages: int) -> list[str]:
    """Names of the trunk's modules up to its `stages`-th map: of a ResNet 1 is the stem, 2 also the first stage.

    Raises:
        UserError: if it has fewer stages, or they cannot be told apart.
    """
    if stages == 0:
        return []
    ends = [str(info["module"]) for info in body.feature_info.info]
    if not 0 < stages <= len(ends):
        raise UserError(f"frozen_stages {stages} must be from 0 to {len(ends)}, the stages of the network")
    trunk = getattr(body, "model", None)
    if isinstance(trunk, StagedMultiExit):  # its modules run one after the other
        modules = [name for names in trunk.structure.stages for name in names]
        last = [i for i, name in enumerate(modules) if f"{name}.".startswith(f"{ends[stages - 1]}.")]
        names = [f"model.{name}" for name in modules]
    else:
        names = [name for name, _ in body.named_children()]
        last = [i for i, name in enumerate(names) if name == ends[stages - 1].replace(".", "_")]
    if not last:
        raise UserError("the stages of this network cannot be frozen one by one; use --frozen_stages 0")
    return names[: last[-1] + 1]


class DetectorRecord(TypedDict):
    """The contents of detector.json."""

    architecture: str
    model_args: dict[str, Any]
    mean: list[float]
    std: list[float]
    classes: Names
    detector: dict[str, Any]


def save_detector(folder: Path, detector: FasterRCNN, config: DetectorConfig, class_names: Sequence[str]) -> None:
    """Writes detector.json and model.safetensors, which `load_detector` reads.

    Args:
        folder: to write into.
        detector: the trained one.
        config: that it was built by.
        class_names: of the classes 1..C.
    """
    body: Any = detector.backbone.body
    skipped = ("features_only", "num_classes", "global_pool")
    arguments = {name: value for name, value in get_model_args(body).items() if name not in skipped}
    architecture, more = stored_as(str(body.pretrained_cfg["architecture"]))
    (folder / "detector.json").unlink(missing_ok=True)  # written last, so that it never describes other weights
    atomic_write_bytes(folder / "model.safetensors", network_weights(detector))
    content = {
        "sha256": sha256_of(folder, [folder / "model.safetensors"]),
        "architecture": architecture,
        "model_args": {**arguments, **more},
        "mean": list(body.pretrained_cfg["mean"]),
        "std": list(body.pretrained_cfg["std"]),
        "classes": list(class_names),
        "detector": asdict(config),
    }
    write_json(folder / "detector.json", content)


def load_detector(folder: str | Path) -> tuple[FasterRCNN, list[str]]:
    """A trained detector in evaluation mode and the names of its classes.

    Raises:
        UserError: if the folder holds no detector, or a damaged one.
    """
    folder = Path(folder)
    missing = [name for name in ("detector.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} holds no detector: {' and '.join(missing)} missing; did its run finish?")
    content = read_config(folder / "detector.json")
    check_content(folder / "detector.json", content, DetectorRecord)
    check_weights(folder, content)
    try:
        check_network(content, folder / "model.safetensors", str(folder), features_only=True)
        body = load_network(content["architecture"], pretrained=False, features_only=True, **content["model_args"])
        body.pretrained_cfg.update(mean=content["mean"], std=content["std"])
        config = DetectorConfig(**content["detector"])
        detector = build_detector(body, len(content["classes"]), config)
        detector.load_state_dict(load_file(folder / "model.safetensors"))
    except (KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise UserError(f"cannot load the detector in {folder}: {str(error)[:300]}") from error
    return detector.eval(), content["classes"]


def detect_objects(detector: FasterRCNN, data: DetectionData, config: ForwardConfig) -> list[dict[str, Tensor]]:
    """Detects objects in all images, in order.

    Args:
        detector: put into evaluation mode.
        data: the images.
        config: batch size, precision and device.

    Returns:
        For each image, on the CPU: `boxes`, float32 [m, 4] xyxy in its pixels, `scores` [m] in [0, 1], `labels` [m] in
        1..C.
    """
    device = compute_device(config.device)
    autocast = autocast_dtype(config.precision, config.device)
    detector.eval().to(device)
    detections: list[dict[str, Tensor]] = []
    order = torch.arange(len(data)).split(config.batch_size)
    with (
        progress_bar(len(data), "detect", "img", disable=rank() != 0) as bar,
        torch.inference_mode(),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
    ):
        for index, batch in data.batches(order):
            outputs = detector([to_float(image.to(device)) for image in batch.images])
            detections += [{name: value.float().cpu() for name, value in output.items()} for output in outputs]
            bar.update(len(index))
    return [{**each, "labels": each["labels"].long()} for each in detections]


def measure_detector(
    detector: FasterRCNN, data: DetectionData, config: ForwardConfig, out: Path | None, *, voc: bool
) -> dict[str, Any]:
    """Average precision of a detector in percent; with a folder, also metrics.json and detections.png in it.

    Args:
        detector: to measure.
        data: the test images, whose classes are the detector's.
        config: how to run it.
        out: the folder, if any.
        voc: also measure VOC2007's AP50.
    """
    detections = detect_objects(detector, data, config)
    metrics: dict[str, Any] = {"test": data.name, "images": len(data), "left_out": len(data.bad)}
    metrics |= coco_average_precision(detections, data.targets, data.class_names)
    if voc:
        per_class = voc_average_precision(detections, data.targets, len(data.class_names))
        metrics["voc_ap50"] = sum(per_class.values()) / len(per_class)
        metrics["voc_ap50_per_class"] = {data.class_names[label - 1]: ap for label, ap in per_class.items()}
    if out is not None:
        draw_detections(detections, data, out / "detections.png")
        write_json(out / "metrics.json", metrics)
    return metrics


def draw_detections(detections: list[dict[str, Tensor]], data: DetectionData, path: Path) -> None:
    """Draws the confident detections and the true boxes of a few images that are spread over the data."""
    shown = range(0, len(data), max(1, len(data) // SHOWN))[:SHOWN]
    images, targets = [], []
    for _, batch in data.batches([torch.tensor(list(shown))]):
        images, targets = [image.numpy() for image in batch.images], batch.targets
    confident = [
        {name: value[detections[i]["scores"] >= CONFIDENT] for name, value in detections[i].items()} for i in shown
    ]
    figures.detections(images, targets, confident, data.class_names, path)


def metrics_table(metrics: dict[str, Any]) -> str:
    """Average precision, as lines for a terminal."""
    names = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "voc_ap50": "VOC2007 AP50"}
    lines = [f"  {title:16} {metrics[name]:6.2f}" for name, title in names.items() if name in metrics]
    return "\n".join(lines + [f"  AP of {plain(name):10} {ap:6.2f}" for name, ap in metrics["ap_per_class"].items()])
