"""Fine-tuning a detector: its losses on images of different sizes, and what of its trunk may move."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sssd_zoo.data.augment import BatchRandom, to_float
from sssd_zoo.data.detection import DetectionBatch
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.tasks.base import Task

BatchNormMode = Literal["train", "eval", "frozen"]


class Detection(Task):
    """Trains torchvision's Faster R-CNN: the sum of its four losses. Difficult objects take no part.

    Args:
        detector: torchvision's `FasterRCNN`, whose `backbone.body` is the trunk; it normalises and resizes by itself.
        size: of the images' shorter side in pixels.
        frozen: names of the trunk's modules whose weights do not move, nor their BatchNorm's statistics.
        batchnorm: of the rest of the trunk: 'train' normalises by the statistics of the global batch and learns scale
            and shift; 'eval' keeps the pretrained statistics and learns scale and shift; 'frozen' keeps all.
    """

    fixed_shapes = False

    def __init__(self, detector: Any, *, size: int, frozen: list[str], batchnorm: BatchNormMode) -> None:
        super().__init__(InputSpec(size, tuple(detector.transform.image_mean), tuple(detector.transform.image_std)))
        self.detector = detector
        trunk = detector.backbone.body
        # Names, not modules: several processes get other BatchNorm modules in the places of these.
        self._still: list[str] = []
        for name, module in trunk.named_modules():
            within = any(name == top or name.startswith(f"{top}.") for top in frozen)
            norm = isinstance(module, _BatchNorm)
            if within or (norm and batchnorm != "train"):
                self._still.append(name)
            if within or (norm and batchnorm == "frozen"):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "Detection":
        """As `nn.Module.train`, but what is not to move stays in evaluation mode."""
        super().train(mode)
        for name in self._still:
            self.detector.backbone.body.get_submodule(name).training = False
        return self

    def views(self, images: DetectionBatch, random: BatchRandom) -> dict[str, Any]:
        """Half of the images flipped, with their boxes: float32 [3, H, W] in [0, 1] each."""
        flips = (random.uniform(len(images.images)) < 0.5).tolist()
        # torchvision samples anchors and regions by the global generator: seeded here, a resume draws the same.
        seed = int(random.integers(1, high=2**31)[0])
        views, targets = [], []
        for image, target, flip in zip(images.images, images.targets, flips, strict=True):
            kept = ~target["difficult"]
            boxes = target["boxes"][kept]
            if flip:
                image, boxes = image.flip(-1), flip_boxes(boxes, image.shape[-1])
            views.append(to_float(image))
            targets.append({"boxes": boxes, "labels": target["labels"][kept]})
        return {"images": views, "targets": targets, "seed": seed}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The sum of the losses of proposals and regions (Ren et al. 2015), and each of them."""
        transform = self.detector.transform
        configured, transform.min_size = transform.min_size, (self.size,)  # progressive resizing changes `size`
        try:
            device = batch["images"][0].device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(batch["seed"])
                losses = self.detector(batch["images"], batch["targets"])
        finally:
            transform.min_size = configured
        parts = {name.removeprefix("loss_"): value.detach() for name, value in losses.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **parts}


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes xyxy [n, 4] of an image that is `width` wide, mirrored left to right."""
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([width - right, top, width - left, bottom], dim=1)
