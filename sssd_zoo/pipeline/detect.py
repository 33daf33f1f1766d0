"""`sssd detect`: Faster R-CNN on a trained trunk."""

from dataclasses import asdict

import torch

from sssd_zoo.configs import DetectArgs, DetectionDataConfig, DetectorConfig, ForwardConfig, OptimConfig, RuntimeConfig
from sssd_zoo.data.detection import DetectionLoader, load_detection
from sssd_zoo.detection.average_precision import coco_backend
from sssd_zoo.detection.detector import build_detector, measure, metrics_table, save_detector, stage_modules
from sssd_zoo.distributed import barrier, rank
from sssd_zoo.distributed.hardware import machine, tune_cpu
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.files import write_json
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.run_folder import open_out
from sssd_zoo.models.networks import load_network
from sssd_zoo.pipeline.detect_eval import measured_on
from sssd_zoo.tasks.detection import Detection
from sssd_zoo.training.engine import check_trainable, train
from sssd_zoo.training.hardware import make_accelerator
from sssd_zoo.training.runs import announce, prepare_run_folder


def detect(args: DetectArgs) -> None:
    """`sssd detect`."""
    tune_cpu()
    runtime, optim = RuntimeConfig.of(args), OptimConfig.of(args)
    processes = make_accelerator(runtime).num_processes
    out = open_out(args, "detector")
    coco_backend()
    config, settings = DetectionDataConfig.of(args), DetectorConfig.of(args)
    data = load_detection(config)
    test = measured_on(config, args.test_data, args.test_split, data.class_names)
    check_trainable(optim, processes, len(data))
    torch.manual_seed(runtime.seed)
    body = load_network(args.model, pretrained=args.pretrained, features_only=True)
    detector = build_detector(body, len(data.class_names), settings)
    frozen = stage_modules(body, args.frozen_stages)
    task = Detection(detector, size=args.short_side, frozen=frozen, batchnorm=args.batchnorm)
    prepare_run_folder(out, args)
    identity = {"data": data.fingerprint, "images": len(data), "classes": data.class_names, **asdict(settings)}
    loader = DetectionLoader(data, args.batch_size, runtime.seed)
    measured = train(task, loader, optim=optim, runtime=runtime, out=out, identity=identity, title="detect")
    announce(out, f"Faster R-CNN on {args.model} trained on {len(data)} images of {data.name}", measured)
    if rank() == 0:
        figures.loss_curves({"Faster R-CNN": read_metrics(out / "metrics.jsonl")}, out / "curves.png")
        save_detector(out, detector, settings, data.class_names)
        if test is not None:
            # Scores in half precision tie at the top, and average precision lives by their order.
            forward = ForwardConfig(
                batch_size=max(1, args.batch_size // processes), precision="fp32", device=args.device
            )
            metrics = measure(detector, test, forward, out, voc=args.voc)
            run = {"model": args.model, "pretrained": args.pretrained, "seed": args.seed, "machine": machine()}
            write_json(out / "metrics.json", {**metrics, **run, **measured})
            print(f"average precision in percent on {len(test)} images of {test.name}:\n{metrics_table(metrics)}")
    barrier()
