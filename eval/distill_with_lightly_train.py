"""LightlyTrain on the same images, teacher and time as `sssd fit --features`, so that the two can be compared.

LightlyTrain (AGPL-3.0) is not a dependency of this project and needs an environment of its own:

    pip install lightly-train timm
    python eval/distill_with_lightly_train.py --data IMAGES --teacher TEACHER --out RUN --minutes 20

It distils a timm network into timm's ResNet-18 by LightlyTrain's default method, on views of `--image_size`, on one
thread, with everything else at its defaults. bf16 is slow on a CPU without bf16 instructions, where `sssd fit` trains
in fp32: give `--precision 32-true` there. The number of steps is what fits into the time at the rate of a few
measured steps, so that its learning rate schedule ends in time. The student is written to RUN/student for timm and
`sssd linear`; RUN/result.json has the steps and the rate. IMAGES is a folder of image files;
`python eval/image_folder.py` writes one. The reports are hub_cards/reports/lightly-train-*.
"""

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what LightlyTrain normalises its views by
CALIBRATION = 16  # steps whose rate decides how many fit into the time; the first three are not counted


class Teacher(nn.Module):
    """A timm network in the form of LightlyTrain's custom models, at an image size and normalisation of its own."""

    def __init__(self, folder: str, side: int) -> None:
        super().__init__()
        self.net: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        self.side = side
        self.times: list[float] = []  # when each forward pass began
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
        config: Any = self.net.pretrained_cfg
        own_mean, own_std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def feature_dim(self) -> int:
        """Channels of the last map."""
        return int(self.net.num_features)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """The last map of views [B, 3, S, S]."""
        self.times.append(time.perf_counter())
        x = F.interpolate(x, size=(self.side, self.side), mode="bicubic", align_corners=False)
        return {"features": self.net.forward_features(x * self.scale + self.shift)}

    def forward_pool(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pooled map, [B, C, 1, 1]."""
        return {"pooled_features": F.adaptive_avg_pool2d(x["features"], 1)}

    def get_model(self) -> nn.Module:
        """The network itself."""
        return self.net  # type: ignore[no-any-return]


def train(args: argparse.Namespace, out: Path, steps: int, teacher: Teacher) -> Any:
    """Trains a student for so many steps, and gives it."""
    import lightly_train

    torch.manual_seed(args.seed)
    student = timm.create_model("resnet18", num_classes=0)
    images = sum(1 for entry in os.scandir(args.data) if entry.is_file())
    lightly_train.pretrain(
        out=out,
        data=args.data,
        seed=args.seed,
        model=student,
        method="distillation",
        method_args={"teacher": teacher},
        epochs=math.ceil(steps / (images // args.batch_size)),
        batch_size=args.batch_size,
        num_workers=0,
        transform_args={"image_size": (args.image_size, args.image_size)},
        precision=args.precision,
        accelerator="cpu",
        devices=1,
        loggers={"tensorboard": None},
        trainer_args={"max_steps": steps},
    )
    return student


def main() -> None:
    """Calibrates, trains, and writes the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of image files, without subfolders")
    parser.add_argument("--teacher", required=True, help="folder of a network in timm's layout")
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    parser.add_argument("--minutes", required=True, type=float, help="training time; start and calibration come on top")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--teacher_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # no usage events over the network
    if args.out.exists():
        parser.error(f"{args.out} exists: give another --out")
    teacher = Teacher(args.teacher, args.teacher_size)
    train(args, args.out / "calibration", CALIBRATION, teacher)
    per_step = statistics.mean(
        after - before for before, after in zip(teacher.times[3:], teacher.times[4:], strict=False)
    )
    steps = max(1, int(60 * args.minutes / per_step))
    teacher.times.clear()
    student = train(args, args.out / "training", steps, teacher).float().eval()
    seconds = (teacher.times[-1] - teacher.times[0]) * len(teacher.times) / (len(teacher.times) - 1)
    size = {"input_size": (3, args.image_size, args.image_size), "mean": IMAGENET[0], "std": IMAGENET[1]}
    save_for_hf(
        student,
        str(args.out / "student"),
        model_config={"num_classes": 0},
        data_config={**size, "interpolation": "bilinear", "crop_pct": 1.0},
        safe_serialization=True,
    )
    result = {
        "steps": len(teacher.times),
        "batch_size": args.batch_size,
        "seconds": round(seconds, 1),
        "images_per_second": round(len(teacher.times) * args.batch_size / seconds, 1),
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(result)


if __name__ == "__main__":
    main()
