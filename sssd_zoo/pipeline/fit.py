"""`sssd fit`: every step in turn, each skipped when its result is there; other inputs need --overwrite.

RUN/
    .sssd-zoo.json  marks the folder as this package's, see `run_folder`
    config.yaml     the arguments as resolved
    pretrain/       the pretrained trunk, its log, curves and checkpoints (not with --features)
    labels/         the pseudo labels
    distill/        the distilled network, with a class per cluster
    baseline/       the same on random labels, where true ones exist to compare by
    probe/          accuracy of both, where labels exist
    steps/          each step's inputs and result, by which the next call knows what is done
    model/          what to use: the network (with the probes as heads where labels exist) and its card
    figures/        PNG
    report.md       tables and figures; metrics.json holds their numbers
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sssd_zoo.configs import FitArgs, SelfDistillationConfig
from sssd_zoo.data.loading import ImageData
from sssd_zoo.distributed import barrier, rank
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed
from sssd_zoo.evaluation.protocol import evaluation_data, evaluation_features, knn_features, probe_features, put_heads
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.evaluation.reports.markdown import Results, write_report
from sssd_zoo.files import write_json
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.hub.model_card import save_model_folder
from sssd_zoo.labels.pseudo_labels import PseudoLabels, random_labels
from sssd_zoo.labels.soft import SoftLabels
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.networks import load_network
from sssd_zoo.pipeline.distill import distill_network
from sssd_zoo.pipeline.pretext import set_up
from sssd_zoo.pipeline.stages import Stages, machine_words, say
from sssd_zoo.training.runs import digest, part, save_config, settings_of


def fit(args: FitArgs) -> None:
    """`sssd fit`."""
    began = time.perf_counter()
    setup = set_up(args, "fit", [args.distill], warm=args.warm_start)
    if args.soft is not None and args.cluster.nearest < 2:
        raise UserError("soft labels want the distances to several centroids: give --cluster.nearest 8, say")
    out, runtime, forward = setup.out, setup.runtime, setup.forward
    data, size, arch, pretext = setup.data, setup.size, setup.arch, setup.pretext
    labelled = data.labels is not None
    evaluation = None
    if labelled:
        evaluation = evaluation_data(
            data, setup.config, test_split=args.test_split, holdout=args.probe.holdout, seed=args.seed
        )
    if rank() == 0 and not (out / "config.yaml").exists():  # an older one describes what is there until the end
        save_config(out, args)
    stages = Stages(out, {**setup.inputs, "seed": runtime.seed}, overwrite=args.overwrite)
    say(
        f"{len(data)} images of {data.name}, {labels_in_words(data)}; "
        f"{arch} at {size} px, {machine_words(stages.common['precision'])}"
    )
    say(f"labels from {pretext.words.replace('`', '')}")
    pretext.pretrain(stages, settings_of(args.pretrain), runtime)
    pretext.label(stages, data, args.cluster, forward, runtime.seed)
    pseudo = PseudoLabels.load(out / "labels")
    pseudo.check(data.fingerprint)
    soft = None if args.soft is None else SoftLabels(pseudo, data.rows, args.soft)

    init = pretext.network(out) if args.warm_start else None
    encoder = pretext.network(out) if args.distill.anchor else None

    def distill_on(
        labels: np.ndarray[Any, np.dtype[np.int64]],
        title: str,
        config: SelfDistillationConfig,
        init: str | None = None,
        soft: SoftLabels | None = None,
    ) -> Callable[[Path], dict[str, Any]]:
        return lambda folder: distill_network(
            data,
            labels,
            config,
            runtime,
            arch=arch,
            size=size,
            out=folder,
            labels_digest=digest(labels, None if soft is None else args.soft),
            soft=soft,
            init=init,
            encoder=encoder,
            title=title,
        )

    labels = pseudo.labels_of(data.rows)
    stages.run(
        "distill",
        distill_on(labels, "self distillation", args.distill, init, soft),
        {
            **settings_of(args.distill),
            "warm_start": args.warm_start,
            **({} if args.soft is None else {"soft": args.soft}),
        },
        after=("labels",),
        all_processes=True,
    )
    networks = {"anchored SSSD" if args.distill.anchor else "SSSD": "distill"}
    if labelled and args.baseline:
        random = random_labels(len(data), args.cluster.k, runtime.seed)
        plain = part(args.distill, SelfDistillationConfig)  # an anchor would teach it what the labels do not say
        settings = {**settings_of(plain), "labels": f"random, K = {args.cluster.k}"}
        stages.run("baseline", distill_on(random, "random labels", plain), settings, all_processes=True)
        networks["random labels"] = "baseline"

    def measure(folder: Path) -> dict[str, Any]:
        assert evaluation is not None
        accuracy = []
        for title, name in networks.items():
            print(f"linear probes: {title}")
            network = load_network(str(out / name))
            probe = probe_features(evaluation_features(network, evaluation, forward), args.probe, runtime.seed)
            accuracy.append({"name": title, "exits": probe.exits, "ensemble": probe.ensemble})
            if name == "distill":
                put_heads(network, probe, data.size)
                save_model_folder(folder / "network", network, arch=arch, label_names=data.class_names, input_size=size)
        trunk = load_network(pretext.network(out), num_classes=0)
        found = evaluation_features(trunk, evaluation, forward)
        neighbours = min(200, len(found.train_y))
        return {
            "accuracy": accuracy,
            "clustered": {
                "linear probe": probe_features(found, args.probe, runtime.seed).exits[-1],
                f"weighted kNN (k = {neighbours})": knn_features(found, neighbours, 0.1)[-1],
            },
            "test": evaluation.words,
            "test_images": len(evaluation.test_positions),
        }

    if labelled:
        settings = {
            **asdict(args.probe),
            "networks": list(networks),
            "test": evaluation.test.fingerprint if evaluation else None,
        }
        measured_on = evaluation.digest() if evaluation else None
        stages.run("probe", measure, settings, after=tuple(networks.values()), measured_on=measured_on)
    if rank() == 0:
        finish(args, data, pseudo, stages, networks, arch=arch, size=size, pretext=pretext.words)
        report_words = out / "report.md"
        print(f"\nDone in {(time.perf_counter() - began) / 60:.1f} minutes. Report and figures: {report_words}")
        print(f"Network: {out / 'model'}, for timm.create_model('local-dir:{out / 'model'}', pretrained=True)")
    barrier()


def finish(
    args: FitArgs,
    data: ImageData,
    pseudo: PseudoLabels,
    stages: Stages,
    networks: dict[str, str],
    *,
    arch: str,
    size: int,
    pretext: str,
) -> None:
    """Writes the figures, the report, metrics.json and the model folder."""
    out = stages.out
    probe = stages.results.get("probe", {})
    titles = {"pretrain": "MoCo v2", "distill": "self distillation", "baseline": "random labels"}
    trained = {title: name for name, title in titles.items() if name in stages.results}
    network = load_network(str(out / "probe" / "network" if probe else out / "distill"))
    macs = multiply_adds(network, (3, size, size))

    captions: dict[str, str] = {}
    figures.loss_curves(
        {title: read_metrics(out / name / "metrics.jsonl") for title, name in trained.items()},
        out / "figures/curves.png",
    )
    captions["figures/curves.png"] = "Losses and learning rates."
    figures.cluster_sizes(pseudo.meta["sizes"], out / "figures/cluster_sizes.png")
    captions["figures/cluster_sizes.png"] = "Images per cluster."
    images, rows = sheet(data, pseudo)
    figures.cluster_sheet(images, rows, out / "figures/clusters.png")
    captions["figures/clusters.png"] = "The images nearest to the centres of some clusters."
    if probe:
        figures.accuracy_cost(probe["accuracy"], macs, out / "figures/accuracy.png")
        captions["figures/accuracy.png"] = "Accuracy against cost, exit by exit."

    results: Results = {
        "model": arch,
        "image_size": size,
        "data": data.name,
        "split": data.split,
        "images": len(data),
        "corrupt": len(data.corrupt),
        "fingerprint": data.fingerprint,
        "seed": args.seed,
        "machine": machine_words(stages.common["precision"]),
        "k_asked": args.cluster.k,
        "sizes": pseudo.meta["sizes"],
        "quality": pseudo.meta["quality"],
        "macs": macs,
        "times": [{"step": name, "seconds": result["seconds"]} for name, result in stages.results.items()],
        "figures": captions,
        "notes": [
            f"**Labels from**: {pretext}" + ("" if args.soft is None else f"; soft, temperature {args.soft:g}"),
        ],
    }
    if probe:
        results["test"], results["test_images"] = probe["test"], probe["test_images"]
        results["classes"] = len(data.class_names or [])
        results["accuracy"], results["clustered"] = probe["accuracy"], probe["clustered"]
    write_report(out / "report.md", results)
    write_json(out / "metrics.json", results)
    measured = {}
    if probe:
        ours = probe["accuracy"][0]
        measured = {str(number): value for number, value in enumerate(ours["exits"], start=1)}
        measured["ensemble"] = ours["ensemble"]
    save_model_folder(
        out / "model",
        network,
        arch=arch,
        input_size=size,
        label_names=data.class_names if probe else [f"cluster {number}" for number in range(len(pseudo.meta["sizes"]))],
        metrics=measured,
        card_context=results,
    )
    save_config(out, args)


def labels_in_words(data: ImageData) -> str:
    """Whether the images are labelled, and by what: sub-folders may be dates or cameras."""
    if data.class_names is None:
        return "without labels"
    return (
        f"labelled for evaluation by {len(data.class_names)} classes ({listed(data.class_names)}; give --unlabelled if "
        "these are none)"
    )


def sheet(data: ImageData, pseudo: PseudoLabels, clusters: int = 12, columns: int = 12) -> tuple[Any, list[str]]:
    """The images nearest to the centres of some clusters, from the largest cluster to the smallest.

    Returns:
        Uint8 [clusters, columns, 3, S, S], filled up with white, and a title for each cluster.
    """
    sizes = np.array(pseudo.meta["sizes"])
    order = np.argsort(-sizes, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(clusters, len(order))).round().astype(int))]
    labels = pseudo.labels_of(data.rows)
    position_of = {row: position for position, row in enumerate(data.rows)}
    images = np.full((len(chosen), columns, 3, data.size, data.size), 255, dtype=np.uint8)
    titles = []
    for place, cluster in enumerate(chosen):
        members = np.flatnonzero(pseudo.labels == cluster)
        nearest = pseudo.rows[members[np.argsort(pseudo.distances[members], kind="stable")]]
        positions = [position_of[row] for row in nearest if row in position_of][:columns]
        images[place, : len(positions)] = data.gather(torch.tensor(positions)).numpy()
        title = f"cluster {cluster}: {sizes[cluster]} images"
        if data.labels is not None and data.class_names is not None:
            truth = np.bincount(data.labels[labels == cluster], minlength=len(data.class_names))
            title += f", {100 * truth.max() / max(1, truth.sum()):.0f} % {data.class_names[int(truth.argmax())]}"
        titles.append(title)
    return images, titles
