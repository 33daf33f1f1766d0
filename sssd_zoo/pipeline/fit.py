"""`sssd fit`: every step in turn, each skipped when its result is there; other inputs need --overwrite.

RUN/
    .sssd-zoo.json  marks the folder as this package's, see `run_folder`
    config.yaml     the arguments as resolved
    pretrain/       the pretrained trunk, its log and curves (not with --features); checkpoints while it trains
    labels/         the pseudo labels
    distill/        the distilled network, with a class per cluster
    quality/        figures of both networks that need no labels
    baseline/       the same on random labels, where true ones exist to compare by
    probe/          accuracy of both, where labels exist
    steps/          each step's inputs and result, by which the next call knows what is done
    model/          what to use: the network (with the probes as heads where labels exist) and its card
    figures/        PNG
    report.md       tables and figures; metrics.json holds their numbers
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sssd_zoo.configs import FitArgs, KNNConfig, QualityConfig, SelfDistillationConfig
from sssd_zoo.data.loading import ImageData
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import barrier, print_main, rank
from sssd_zoo.distributed.hardware import describe_machine
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed
from sssd_zoo.evaluation.probe import Probe
from sssd_zoo.evaluation.protocol import (
    Evaluation,
    evaluation_data,
    evaluation_features,
    knn_features,
    probe_features,
    put_heads,
)
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.evaluation.reports.markdown import Results, write_report
from sssd_zoo.evaluation.subset import IMAGES
from sssd_zoo.files import write_json
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.hub.model_card import save_model_folder
from sssd_zoo.labels.origin import labels_by_name, pseudo_labels_for
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.networks import load_encoder, load_network
from sssd_zoo.pipeline.defaults import advice, derive
from sssd_zoo.pipeline.distill import distill_network
from sssd_zoo.pipeline.pretext import Setup, check_start, set_up
from sssd_zoo.pipeline.quality import run_figures, run_verdict
from sssd_zoo.pipeline.stages import Stage, Stages
from sssd_zoo.training.runs import save_config, settings_of


def fit(args: FitArgs, given: frozenset[str] | None = None) -> None:
    """`sssd fit`.

    Args:
        args: of the command.
        given: names of the arguments that were given, such as 'pretrain.batch_size'; `defaults.derive` chooses others
            by the number of images. By default all are taken as they are.
    """
    began = time.perf_counter()
    if args.warm_start and args.init is not None:
        raise UserError("--warm_start and --init both say what the student starts from: remove one")
    args = replace(args, distill=args.distill.resolved(encoder=args.features is not None))
    if args.distill.cached_views and not args.distill.anchor:
        raise UserError("--distill.cached_views is of the anchor's network: give --distill.anchor too, or remove it")

    def complete(images: int, device: str, processes: int) -> FitArgs:
        if given is None:
            return args
        completed, lines = derive(args, given, images, device=device, processes=processes)
        if lines:
            print_main(f"chosen for {images:,} images on this machine: {', '.join(lines)} (flags of these names)")
        if few := advice(images, completed):
            print_main(few)
        return completed

    setup = set_up(args, "fit", ["distill"], warm=args.warm_start, complete=complete)
    args = setup.args
    start = {} if args.init is None else {"init": check_start(args.init, setup.arch)}
    if args.soft is not None and args.cluster.nearest < 2:
        raise UserError(
            "--soft needs the distances to several centroids: set --cluster.nearest to more than 1, such as 8"
        )
    evaluation = None
    if setup.data.labels is not None:
        evaluation = evaluation_data(
            setup.data, setup.config, test_split=args.test_split, holdout=args.probe.holdout, seed=args.seed
        )
    plan = Plan(args, setup, evaluation, start)
    if rank() == 0 and not (plan.out / "config.yaml").exists():  # an older one describes what is there until the end
        save_config(plan.out, args)
    stage_list = plan.stages()
    print_main(plan.describe())
    print_main(f"{len(stage_list)} stages: {', '.join(stage.name for stage in stage_list)}")
    stages = Stages(
        plan.out, {**setup.inputs, "seed": args.seed}, overwrite=args.overwrite, keep_checkpoints=args.keep_checkpoints
    )
    for stage in stage_list:
        stages.run(stage)
    if rank() == 0:
        print("\n" + describe_results(write_results(plan, stages)))
        report = plan.out / "report.md"
        print(f"Done in {(time.perf_counter() - began) / 60:.1f} minutes. Report and figures: {report}")
        print(
            f"Network: {plan.out / 'model'}, for timm.create_model('local-dir:{plan.out / 'model'}', pretrained=True)"
        )
    barrier()


@dataclass(frozen=True)
class Plan:
    """The stages of a run, declared, and what each does.

    Attributes:
        args: of the command.
        setup: the images, the networks, and where to run.
        evaluation: what the networks are measured on, where the images are labelled.
        start: the digest of the weights of `args.init`, as `init`, where it is given.
    """

    args: FitArgs
    setup: Setup
    evaluation: Evaluation | None
    start: dict[str, str]

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.setup.out

    @property
    def networks(self) -> dict[str, str]:
        """The networks to measure: their titles, and the stages that train them."""
        trained = {"anchored SSSD" if self.args.distill.anchor else "SSSD": "distill"}
        if self.evaluation is not None and self.args.baseline:
            trained["random labels"] = "baseline"
        return trained

    def describe(self) -> str:
        """What is about to run, in two lines."""
        data, setup = self.setup.data, self.setup
        return (
            f"{len(data)} images of {data.name}, {describe_labelling(data)}; {setup.arch} at {setup.size} px, "
            f"{describe_machine(setup.inputs['precision'])}\nlabels from {setup.pretext.description.replace('`', '')}"
        )

    def stages(self) -> list[Stage]:
        """All stages in turn."""
        args, pretext = self.args, self.setup.pretext
        soft = {} if args.soft is None else {"soft": args.soft}
        stages = [
            *pretext.pretrain_stages(settings_of(args.pretrain), self.setup.runtime, QualityConfig.of(args)),
            pretext.label_stage(self.setup, args.cluster, self.out, args.seed),
            Stage(
                name="distill",
                action=self.distill,
                settings={**settings_of(args.distill), "warm_start": args.warm_start, **self.start, **soft},
                after=("labels",),
                all_processes=True,
            ),
            Stage(
                name="quality",
                action=self.quality,
                settings={"looked_at": IMAGES},
                after=("distill",),
                measured_on=None if self.evaluation is None else self.evaluation.digest(),
            ),
        ]
        if "baseline" in self.networks.values():
            random = {"labels": f"random, K = {args.cluster.k}"}
            settings = {**settings_of(SelfDistillationConfig.of(args.distill)), **random}
            stages.append(Stage(name="baseline", action=self.baseline, settings=settings, all_processes=True))
        if self.evaluation is not None:
            probed = {"networks": list(self.networks), "test": self.evaluation.test.fingerprint}
            stages.append(
                Stage(
                    name="probe",
                    action=self.probe,
                    settings={**asdict(args.probe), **probed},
                    after=tuple(self.networks.values()),
                    measured_on=self.evaluation.digest(),
                )
            )
        return stages

    def pseudo_labels(self) -> PseudoLabels:
        """What the stage 'labels' made."""
        return PseudoLabels.load(self.out / "labels")

    def distill(self, folder: Path) -> dict[str, Any]:
        """Self distillation on the pseudo labels."""
        args, setup = self.args, self.setup
        encoder = setup.pretext.network(self.out)
        return distill_network(
            setup.data,
            pseudo_labels_for(setup.data, self.pseudo_labels(), args.soft),
            args.distill,
            setup.runtime,
            setup.spec(folder, "self distillation"),
            init=encoder if args.warm_start else args.init,
            encoder=encoder if args.distill.anchor else None,
            teacher_size=setup.pretext.teacher_size,
        )

    def quality(self, folder: Path) -> dict[str, Any]:
        """Figures without labels, of the distilled network and of the one that was clustered."""
        setup = self.setup
        clustered = load_encoder(setup.pretext.network(self.out), setup.pretext.teacher_size)
        distilled = load_network(str(self.out / "distill"))
        return {"label_free": run_figures(distilled, clustered, setup.data, setup.forward, self.args.seed)}

    def baseline(self, folder: Path) -> dict[str, Any]:
        """The same on random labels; without an anchor, which would teach the network what the labels do not say."""
        setup = self.setup
        labels = labels_by_name("random", setup.data, self.args.cluster.k, setup.runtime)
        plain = SelfDistillationConfig.of(self.args.distill)
        return distill_network(setup.data, labels, plain, setup.runtime, setup.spec(folder, "random labels"))

    def probe(self, folder: Path) -> dict[str, Any]:
        """Accuracy of the trained networks, and of the one that was clustered."""
        evaluation, setup = self.evaluation, self.setup
        assert evaluation is not None  # else there is no such stage
        accuracy = []
        for title, stage in self.networks.items():
            print(f"linear probes: {title}")
            network = load_network(str(self.out / stage))
            probe = self._probe_of(network)
            accuracy.append({"name": title, "exits": probe.exits, "ensemble": probe.ensemble})
            if stage == "distill":
                put_heads(network, probe, setup.data.size)
                names = setup.data.class_names
                save_model_folder(
                    folder / "network", network, arch=setup.arch, label_names=names, input_size=setup.size
                )
        trunk = load_encoder(setup.pretext.network(self.out), setup.pretext.teacher_size)
        features = evaluation_features(trunk, evaluation, setup.forward)
        knn = KNNConfig(neighbours=min(KNNConfig.neighbours, len(features.train_y)))
        return {
            "accuracy": accuracy,
            "clustered": {
                "linear probe": probe_features(features, self.args.probe, self.args.seed).exits[-1],
                f"weighted kNN (k = {knn.neighbours})": knn_features(features, knn)[-1],
            },
            "test": evaluation.words,
            "test_images": len(evaluation.test_positions),
        }

    def _probe_of(self, network: Any) -> Probe:
        assert self.evaluation is not None  # else there is no stage that asks
        features = evaluation_features(network, self.evaluation, self.setup.forward)
        return probe_features(features, self.args.probe, self.args.seed)


def describe_results(results: Results) -> str:
    """The accuracies in a few lines for the terminal; without labels, what the clusters are."""
    if not results.get("accuracy"):
        sizes = results["sizes"]
        return f"{len(sizes)} clusters of {min(sizes)} to {max(sizes)} images; no labels, so no accuracy was measured"
    names = ["exit 1", "exit 2", "exit 3", "exit 4", "ensemble"]
    width = max(len(row["name"]) for row in results["accuracy"])
    lines = [f"linear-probe accuracy in percent, {results['test']}:", f"{'':{width}}  " + "  ".join(names)]
    for row in results["accuracy"]:
        values = [*row["exits"], row["ensemble"]]
        cells = "  ".join(f"{value:{len(name)}.2f}" for name, value in zip(names, values, strict=True))
        lines.append(f"{row['name']:{width}}  {cells}")
    return "\n".join(lines)


def write_results(plan: Plan, stages: Stages) -> Results:
    """Writes the figures, the report, metrics.json and the model folder.

    Returns:
        The content of metrics.json.
    """
    args, setup, out = plan.args, plan.setup, plan.out
    pseudo = plan.pseudo_labels()
    probe = stages.results.get("probe", {})
    network = load_network(str(out / "probe" / "network" if probe else out / "distill"))
    macs = multiply_adds(network, (3, setup.size, setup.size))
    results: Results = {
        "model": setup.arch,
        "image_size": setup.size,
        "data": setup.data.name,
        "split": setup.data.split,
        "images": len(setup.data),
        "corrupt": len(setup.data.corrupt),
        "fingerprint": setup.data.fingerprint,
        "seed": args.seed,
        "machine": describe_machine(stages.common["precision"]),
        "k_asked": args.cluster.k,
        "sizes": pseudo.meta["sizes"],
        "quality": pseudo.meta["quality"],
        "label_free": stages.results["quality"]["label_free"],
        "verdict": run_verdict(args, setup.arch, len(setup.data), stages.results["quality"]["label_free"]),
        "macs": macs,
        "times": [{"step": name, "seconds": result["seconds"]} for name, result in stages.results.items()],
        "figures": draw_figures(plan, stages, pseudo, macs),
        "notes": [
            f"**Labels from**: {setup.pretext.description}"
            + ("" if args.soft is None else f"; soft, temperature {args.soft:g}"),
        ],
    }
    if setup.pretext.source is None:
        results["encoder"] = short_name(setup.pretext.arch)
    measured = {}
    if probe:
        results["test"], results["test_images"] = probe["test"], probe["test_images"]
        results["classes"] = len(setup.data.class_names or [])
        results["accuracy"], results["clustered"] = probe["accuracy"], probe["clustered"]
        ours = probe["accuracy"][0]
        measured = {str(number): value for number, value in enumerate(ours["exits"], start=1)}
        measured["ensemble"] = ours["ensemble"]
    write_report(out / "report.md", results)
    write_json(out / "metrics.json", results)
    clusters = [f"cluster {number}" for number in range(len(pseudo.meta["sizes"]))]
    save_model_folder(
        out / "model",
        network,
        arch=setup.arch,
        input_size=setup.size,
        label_names=setup.data.class_names if probe else clusters,
        metrics=measured,
        card_context=results,
    )
    save_config(out, args)
    return results


def draw_figures(plan: Plan, stages: Stages, pseudo: PseudoLabels, macs: dict[str, int]) -> dict[str, str]:
    """Draws the figures of a run; gives their captions by their paths in it."""
    folder, captions = plan.out / "figures", {}
    titles = {"pretrain": "MoCo v2", "distill": "self distillation", "baseline": "random labels"}
    trained = {title: name for name, title in titles.items() if name in stages.results}
    figures.loss_curves(
        {title: read_metrics(plan.out / name / "metrics.jsonl") for title, name in trained.items()},
        folder / "curves.png",
    )
    captions["figures/curves.png"] = "Losses and learning rates."
    figures.cluster_sizes(pseudo.meta["sizes"], folder / "cluster_sizes.png")
    captions["figures/cluster_sizes.png"] = "Images per cluster."
    images, rows = nearest_images(plan.setup.data, pseudo)
    figures.cluster_sheet(images, rows, folder / "clusters.png")
    captions["figures/clusters.png"] = "The images nearest to the centres of some clusters."
    if "probe" in stages.results:
        figures.accuracy_cost(stages.results["probe"]["accuracy"], macs, folder / "accuracy.png")
        captions["figures/accuracy.png"] = "Accuracy against cost, exit by exit."
    return captions


def describe_labelling(data: ImageData) -> str:
    """Whether the images are labelled, and by what: sub-folders may be dates or cameras."""
    if data.class_names is None:
        return "without labels"
    return (
        f"labelled for evaluation by {len(data.class_names)} classes ({listed(data.class_names)}; give --unlabelled if "
        "these are none)"
    )


def nearest_images(
    data: ImageData, pseudo: PseudoLabels, clusters: int = 12, columns: int = 12
) -> tuple[Any, list[str]]:
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
