"""The paper's row "CIFAR-10, ResNet-18, 200 epochs" in a fixed wall time on one GPU, and its anchored form beside it.

    python train/paper_row.py --data uoft-cs/cifar10 --out RUNS --minutes 9

It measures the throughput of both trainings first, prints it beside the rate of bf16 matrix products and the time that
is left, and chooses the longest schedule of `SCHEDULES` that fits. RUNS/sssd and RUNS/anchored are run folders of
`sssd fit`; both use the same pretrained network and the same pseudo labels. The same command resumes a killed run.
"""

import argparse
import dataclasses
import shutil
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sssd_zoo.configs import AnchoredConfig, ClusterConfig, DataConfig, FitArgs, MoCoConfig, RuntimeConfig
from sssd_zoo.data.loading import load_images
from sssd_zoo.distributed.hardware import machine, tune_cpu
from sssd_zoo.files import RUN_MARK, read_json, write_json
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.labels.origin import labels_by_name
from sssd_zoo.pipeline.distill import distill_network
from sssd_zoo.pipeline.fit import fit
from sssd_zoo.pipeline.pretrain import pretrain_network
from sssd_zoo.training.runs import RunSpec

ARCH, SIZE = "sssd_resnet18_cifar", 32
# Longest first: whether MoCo's loss is symmetric (twice the cost of an epoch), its epochs, those of each distillation.
SCHEDULES = (
    (True, 200, 200),
    (True, 200, 100),
    (False, 200, 200),
    (False, 200, 100),
    (False, 200, 50),
    (False, 100, 50),
    (False, 50, 25),
    (False, 20, 10),
    (False, 2, 1),
)
# What one image costs in the anchored training, in units of the plain one: the frozen encoder's forward pass on top.
ANCHORED_COST = 1.35
# Sustained throughput over that of a short measurement: on an H200 0.91 for MoCo and 0.59 for self distillation, which
# had a slower crop then (medians over windows of 50 steps).
SUSTAINED = 0.75
OVERHEAD = 130.0  # seconds: reading the images, compiling, clusters, probes and figures of both runs


def pretrain_config(epochs: int, symmetric: bool, batch: int, images: int) -> MoCoConfig:
    """MoCo v2 of the recipe cifar10-r18-200ep.yaml."""
    queue = min(4096, images // 2)
    return MoCoConfig(epochs=epochs, batch_size=batch, symmetric=symmetric, queue_size=queue, lr=0.06 * batch / 512)


def distill_config(epochs: int, batch: int) -> AnchoredConfig:
    """That recipe's self distillation with four times the batch size and learning rate, for a GPU, after a warm-up."""
    return AnchoredConfig(epochs=epochs, batch_size=batch, lr=0.4 * batch / 512, warmup_epochs=min(5, epochs / 10))


def product_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large bf16 matrix product on random numbers."""
    side = 8192 if device.type == "cuda" else 1024
    factors = [torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2)]
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        product = factors[0] @ factors[1]
        float(product[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return float(2 * side**3 / min(seconds))


def measure_throughput(args: argparse.Namespace, runtime: RuntimeConfig) -> tuple[float, float]:
    """Images per second of MoCo with the asymmetric loss and of self distillation, each over its second half."""
    images = args.steps * args.batch_size
    config = DataConfig(data=args.data, split=f"train[:{images}]", workers=args.workers)
    data = load_images(config, default_size=SIZE)
    short = dataclasses.replace(runtime, log_every=args.steps, checkpoint_epochs=2)
    pretrain = pretrain_config(2, False, args.batch_size, images)
    labels = labels_by_name("random", data, min(1000, len(data) // 4), runtime)
    distill = distill_config(2, args.batch_size)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        moco, sssd = (RunSpec(arch=ARCH, size=SIZE, out=folder / name, title=name) for name in ("moco", "sssd"))
        pretrain_network(data, pretrain, short, moco)
        distill_network(data, labels, distill, short, sssd)
        rates = [read_metrics(folder / name / "metrics.jsonl")[-1]["images_per_second"] for name in ("moco", "sssd")]
    return rates[0], rates[1]


def seconds_of(schedule: tuple[bool, int, int], images: int, moco: float, sssd: float) -> float:
    """How long a schedule takes at these throughputs in images a second, with both distillations."""
    symmetric, pretrain, distill = schedule
    units = pretrain * (1 + symmetric) / moco + distill * (1 + ANCHORED_COST) / sssd
    return images * units / SUSTAINED + OVERHEAD


class Clock:
    """Prints lines with the time that has passed and the time that is left.

    Args:
        minutes: wall time for everything.
    """

    def __init__(self, minutes: float) -> None:
        self.began, self.seconds = time.perf_counter(), 60 * minutes

    def left(self) -> float:
        """Seconds that are left; negative when the time is over."""
        return self.began + self.seconds - time.perf_counter()

    def log(self, text: str) -> None:
        """Prints a line."""
        print(f"[{self.seconds - self.left():5.0f} s, {self.left():5.0f} s left] {text}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as for sssd fit")
    parser.add_argument("--out", required=True, help="folder for the two run folders")
    parser.add_argument("--minutes", type=float, default=9.0, help="wall time for everything")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--split", default="train", help="a part of the training images, to try it: 'train[:2000]'")
    parser.add_argument("--k", type=int, default=1000, help="number of clusters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="of each half of a measurement; the first half warms up")
    parser.add_argument("--workers", type=int, default=8, help="threads that decode")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def choose_schedule(args: argparse.Namespace, runtime: RuntimeConfig, clock: Clock) -> dict[str, Any]:
    """Measures throughput and chooses the longest schedule that fits the time that is left.

    Returns:
        The content of schedule.json.
    """
    rate = product_rate(torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu"))
    try:
        moco, sssd = measure_throughput(args, runtime)
    except Exception:
        if not runtime.compile:
            raise
        traceback.print_exc()
        clock.log("the compiled training failed, see above: continuing without --compile")
        runtime = dataclasses.replace(runtime, compile=False)
        moco, sssd = measure_throughput(args, runtime)
    images = len(load_images(DataConfig(data=args.data, split=args.split, workers=args.workers), default_size=SIZE))
    forward = 2 * 0.5554e9  # floating-point operations of ResNet-18 at 32 px
    clock.log(f"bf16 products: {rate / 1e12:.0f} TFLOP/s")
    clock.log(f"MoCo (asymmetric): {moco:,.0f} img/s, {4 * forward * moco / rate:.2f} of that rate")
    clock.log(f"self distillation: {sssd:,.0f} img/s, {3 * 1.062 * forward * sssd / rate:.2f} of that rate")
    left = clock.left()
    for schedule in SCHEDULES:
        clock.log(f"{schedule}: {seconds_of(schedule, images, moco, sssd):.0f} s")
    fitting = (schedule for schedule in SCHEDULES if seconds_of(schedule, images, moco, sssd) < left)
    symmetric, pretrain, distill = next(fitting, SCHEDULES[-1])
    return {
        "symmetric": symmetric,
        "pretrain": pretrain,
        "distill": distill,
        "images": images,
        "compile": runtime.compile,
        "moco_images_per_second": moco,
        "sssd_images_per_second": sssd,
        "bf16_flops": rate,
        "machine": machine(),
    }


def plain_run(args: argparse.Namespace, runtime: RuntimeConfig, plan: dict[str, Any]) -> FitArgs:
    """The paper's row as arguments of `sssd fit`."""
    return FitArgs(
        data=args.data,
        split=args.split,
        workers=args.workers,
        out=str(Path(args.out) / "sssd"),
        model=ARCH,
        image_size=SIZE,
        seed=args.seed,
        device=args.device,
        compile=plan["compile"],
        log_every=runtime.log_every,
        checkpoint_epochs=runtime.checkpoint_epochs,
        keep_best=0,
        pretrain=pretrain_config(plan["pretrain"], plan["symmetric"], args.batch_size, plan["images"]),
        cluster=ClusterConfig(k=args.k),
        distill=distill_config(plan["distill"], args.batch_size),
        baseline=False,
    )


def anchored_run(args: argparse.Namespace, plain: FitArgs, plan: dict[str, Any]) -> FitArgs:
    """The anchored form of the row, as arguments of `sssd fit`."""
    distill = dataclasses.replace(
        plain.distill, anchor=4.0, lr=0.1 * args.batch_size / 512, warmup_epochs=min(2, plan["distill"] / 10)
    )
    return dataclasses.replace(plain, out=str(Path(args.out) / "anchored"), distill=distill, warm_start=True)


def copy_pretext(source: Path, target: Path) -> None:
    """Copies a run's pretrained network and pseudo labels into another run folder, which then starts from them."""
    for name in (RUN_MARK, "pretrain", "labels", "steps/pretrain.json", "steps/labels.json"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            ignore = shutil.ignore_patterns("checkpoints")
            shutil.copytree(source / name, target / name, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy2(source / name, target / name)


def main() -> None:
    """Measures, chooses a schedule, and runs both forms."""
    args = parse_arguments()
    clock = Clock(args.minutes)
    tune_cpu()
    runtime = RuntimeConfig(
        seed=args.seed, device=args.device, compile=args.compile, log_every=50, checkpoint_epochs=20, keep_best=0
    )
    clock.log(str(machine()))
    record = Path(args.out) / "schedule.json"
    if not record.exists():
        write_json(record, choose_schedule(args, runtime, clock))
    plan = read_json(record)
    clock.log(f"schedule: {plan}")
    plain = plain_run(args, runtime, plan)
    fit(plain)
    clock.log("the paper's row is done")
    anchored = anchored_run(args, plain, plan)
    copy_pretext(Path(plain.out), Path(anchored.out))
    fit(anchored)
    clock.log("the anchored form is done")


if __name__ == "__main__":
    main()
