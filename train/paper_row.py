"""The paper's row "CIFAR-10, ResNet-18, 200 epochs" in a fixed wall time on one GPU, and its anchored form beside it.

    python train/paper_row.py --data uoft-cs/cifar10 --out RUNS --minutes 9

It measures the throughput of both trainings first, prints it beside the rate of bf16 matrix products and the time that
is left, and chooses the epochs that fit: MoCo v2 with the asymmetric loss, whose epoch costs half of a symmetric one.
RUNS/anchored and RUNS/sssd are run folders of `sssd fit`; both use the same pretrained network and the same pseudo
labels. All trainings come before what measures them, for which the same command can be repeated on another machine. It
also resumes a killed run.
"""

import argparse
import shutil
import time
import traceback
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sssd_zoo.cli.guard import guarded
from sssd_zoo.configs import ClusterConfig, DataConfig, FitArgs, MoCoConfig, RuntimeConfig, StudentConfig
from sssd_zoo.data.loading import load_images
from sssd_zoo.distributed.hardware import machine, tune_cpu
from sssd_zoo.files import RUN_MARK, read_json, write_json
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.labels.origin import labels_by_name
from sssd_zoo.pipeline.distill import distill_network
from sssd_zoo.pipeline.fit import Plan, fit, set_up_fit, with_method
from sssd_zoo.pipeline.pretext import with_augment
from sssd_zoo.pipeline.pretrain import pretrain_network
from sssd_zoo.pipeline.stages import Stages
from sssd_zoo.training.runs import RunSpec

ARCH, SIZE = "sssd_resnet18_cifar", 32
# Fractions of the time of all trainings.
SHARES = {"pretrain": 0.60, "anchored": 0.15, "sssd": 0.25}
# What one image costs in the anchored training, in units of the plain one: the frozen encoder's forward pass on top.
ANCHORED_COST = 1.35
SUSTAINED = 0.9  # throughput of a training over that of a short measurement
OVERHEAD = 45.0  # seconds: reading the images, compiling, and clusters, after the measurement


def pretrain_config(epochs: int, batch: int, images: int, crop_min: float) -> MoCoConfig:
    """MoCo v2 of the recipe cifar10-r18-200ep.yaml, with the asymmetric loss."""
    queue = min(4096, images // 2)
    return MoCoConfig(
        epochs=epochs,
        batch_size=batch,
        symmetric=False,
        queue_size=queue,
        lr=0.06 * batch / 512,
        crop_scale=(crop_min, 1.0),
    )


def distill_config(epochs: int, batch: int) -> StudentConfig:
    """That recipe's self distillation with four times the batch size and learning rate, for a GPU, after a warm-up."""
    return StudentConfig(epochs=epochs, batch_size=batch, lr=0.4 * batch / 512, warmup_epochs=min(5, epochs / 10))


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
    short = replace(runtime, log_every=args.steps, checkpoint_epochs=2)
    pretrain = pretrain_config(2, args.batch_size, images, args.crop_min)
    labels = labels_by_name("random", data, min(1000, len(data) // 4), runtime)
    distill = distill_config(2, args.batch_size)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        moco, sssd = (RunSpec(arch=ARCH, size=SIZE, out=folder / name, title=name) for name in ("moco", "sssd"))
        pretrain_network(data, pretrain, short, moco)
        distill_network(data, labels, distill, short, sssd)
        rates = [read_metrics(folder / name / "metrics.jsonl")[-1]["images_per_second"] for name in ("moco", "sssd")]
    return rates[0], rates[1]


def epochs_in(seconds: float, rate: float, images: int) -> int:
    """The epochs of a training that fit a time, at a measured throughput in images a second; whole tens of many."""
    epochs = max(1, int(seconds * SUSTAINED * rate / images))
    return epochs if epochs < 20 else epochs // 10 * 10


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
    parser.add_argument("--crop_min", type=float, default=0.08, help="smallest fraction of an image in a view of MoCo")
    parser.add_argument("--k", type=int, default=1000, help="number of clusters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="of each half of a measurement; the first half warms up")
    parser.add_argument("--workers", type=int, help="processes that decode; by default one for each CPU, at most 16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True, help="else train only")
    return parser.parse_args()


def choose_schedule(args: argparse.Namespace, runtime: RuntimeConfig, clock: Clock) -> dict[str, Any]:
    """Measures throughput and chooses the epochs that fit the time that is left.

    Returns:
        The content of schedule.json.
    """
    images = len(load_images(DataConfig(data=args.data, split=args.split, workers=args.workers), default_size=SIZE))
    rate = product_rate(torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu"))
    for attempt in (runtime, replace(runtime, cuda_graphs=False), replace(runtime, compile=False)):
        try:
            moco, sssd = measure_throughput(args, attempt)
        except Exception:
            if not attempt.compile:
                raise
            traceback.print_exc()
            clock.log(f"failed, see above, with compile {attempt.compile}, CUDA graphs {attempt.cuda_graphs}")
        else:
            break
    forward = 2 * 0.5554e9  # floating-point operations of ResNet-18 at 32 px
    clock.log(f"bf16 products: {rate / 1e12:.0f} TFLOP/s")
    clock.log(f"MoCo (asymmetric): {moco:,.0f} img/s, {4 * forward * moco / rate:.2f} of that rate")
    clock.log(f"self distillation: {sssd:,.0f} img/s, {3 * 1.062 * forward * sssd / rate:.2f} of that rate")
    rates = {"pretrain": moco, "anchored": sssd / ANCHORED_COST, "sssd": sssd}
    left = clock.left() - OVERHEAD
    return {
        **{name: epochs_in(share * left, rates[name], images) for name, share in SHARES.items()},
        "images": images,
        "compile": attempt.compile,
        "cuda_graphs": attempt.cuda_graphs,
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
        cuda_graphs=plan["cuda_graphs"],
        log_every=runtime.log_every,
        checkpoint_epochs=runtime.checkpoint_epochs,
        keep_best=0,
        pretrain=pretrain_config(plan["pretrain"], args.batch_size, plan["images"], args.crop_min),
        cluster=ClusterConfig(k=args.k),
        distill=distill_config(plan["sssd"], args.batch_size),
        baseline=False,
    )


def anchored_run(args: argparse.Namespace, plain: FitArgs, plan: dict[str, Any]) -> FitArgs:
    """The anchored form of the row, as arguments of `sssd fit`."""
    epochs = plan["anchored"]
    distill = replace(
        plain.distill, epochs=epochs, anchor=4.0, lr=0.1 * args.batch_size / 512, warmup_epochs=min(2, epochs / 10)
    )
    return replace(plain, out=str(Path(args.out) / "anchored"), distill=distill, warm_start=True)


def copy_pretext(source: Path, target: Path) -> None:
    """Copies a run's pretrained network and pseudo labels into another run folder, which then starts from them."""
    for name in (RUN_MARK, "pretrain", "labels", "steps/pretrain.json", "steps/labels.json"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            ignore = shutil.ignore_patterns("checkpoints")
            shutil.copytree(source / name, target / name, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy2(source / name, target / name)


def train(args: FitArgs) -> None:
    """The stages of `sssd fit` that train, and the clusters; `fit` takes their results."""
    args = with_augment(with_method(args), ("pretrain", "distill"))
    setup, _ = set_up_fit(args, None)
    plan = Plan(args, setup, evaluation=None, start={})
    stages = Stages(plan.out, {**setup.inputs, "seed": args.seed})
    for stage in plan.stages():
        if stage.name in ("pretrain", "labels", "distill"):
            stages.run(stage)


def main() -> None:
    """Measures, chooses a schedule, trains both forms, and measures them."""
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
    anchored = anchored_run(args, plain, plan)
    train(anchored)
    clock.log("the anchored form is trained")
    copy_pretext(Path(anchored.out), Path(plain.out))
    train(plain)
    clock.log("the paper's form is trained")
    if args.measure:
        fit(anchored)
        fit(plain)


if __name__ == "__main__":
    with guarded():
        main()
