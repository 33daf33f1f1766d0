"""`sssd fit`: every step in turn, each skipped when its result is there; other inputs need --overwrite.

RUN/
    .sssd-zoo.json  marks the folder as this package's, see `run_folder`
    config.yaml     the arguments as resolved
    pretrain/       the pretrained trunk, its log and curves (not with --features); checkpoints while it trains
    labels/         the pseudo labels
    distill/        the distilled network, with a class per cluster
    more-1/, ...    the same trained further, with --more_epochs
    quality/        figures of both networks that need no labels
    baseline/       self distillation from new weights on random labels, where true ones exist to compare by
    probe/          accuracy of both, where labels exist
    steps/          each step's inputs and result, by which the next call knows what is done
    model/          what to use: the network (with the probes as heads where labels exist) and its card
    cluster_names.json   what `sssd rename` called the clusters
    figures/        PNG
    corrupt.tsv     the images that were skipped, and why, where there are any
    report.md       tables and figures; metrics.json holds their numbers
    report.html     the same as a page, with the clusters to look at, to name and to merge
    budget.json     the epochs that --budget chose
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sssd_zoo.configs import (
    AnchoredConfig,
    ContrastiveConfig,
    FitArgs,
    KNNConfig,
    OptimConfig,
    QualityConfig,
    SelfDistillationConfig,
    StudentConfig,
)
from sssd_zoo.configs.methods import OWN_ANCHOR, Method
from sssd_zoo.configs.ranges import seconds_of
from sssd_zoo.data.loading import ImageData
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import barrier, on_main, print_main, rank
from sssd_zoo.distributed.hardware import describe_machine
from sssd_zoo.distributed.progress import duration
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import listed, plural
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
from sssd_zoo.evaluation.reports.markdown import RANDOM, Results, write_report
from sssd_zoo.evaluation.reports.terminal import summary
from sssd_zoo.evaluation.subset import IMAGES
from sssd_zoo.files import write_json
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.files.network_link import link_network
from sssd_zoo.files.run_steps import digests
from sssd_zoo.hub.cards import distillation
from sssd_zoo.hub.model_card import save_model_folder
from sssd_zoo.labels.origin import labels_by_name, pseudo_labels_for
from sssd_zoo.labels.protocol import Labels
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.networks import load_network
from sssd_zoo.pipeline.budget import MARGIN, check_epochs, chosen_in, describe_kept, keep, serves, with_epochs
from sssd_zoo.pipeline.defaults import EPOCH_SETTINGS, Scale, advice, derive, describe_chosen
from sssd_zoo.pipeline.distill import distill_network
from sssd_zoo.pipeline.earlier import (
    check_earlier,
    is_extension,
    method_there,
    more_epochs_there,
    remove_figures,
    remove_stages,
)
from sssd_zoo.pipeline.estimate import LONGEST, Rates, Work, epochs_within, expected, measure
from sssd_zoo.pipeline.forecast import Forecast
from sssd_zoo.pipeline.gpu_memory import within_memory
from sssd_zoo.pipeline.mistakes import Mistakes
from sssd_zoo.pipeline.preflight import check_start, size_note
from sssd_zoo.pipeline.pretext import Setup, set_up, with_augment
from sssd_zoo.pipeline.quality import from_scratch, run_figures, run_verdict
from sssd_zoo.pipeline.rename import cluster_names
from sssd_zoo.pipeline.report import write_run_page
from sssd_zoo.pipeline.stages import Stage, Stages, Survey
from sssd_zoo.training.runs import RunSpec, begin_config, save_config, save_corrupt, settings_of

SHOWN = 12  # clusters in the figure of them, and images of each
# What no other method has; its queue and splits are chosen by `derive`, and so stand in saved settings.
CONTRAST = ("contrast", "contrast_temperature", "dim", "key_momentum", "blur")
DEFAULT: Method = "contrastive"  # where the student can start from M_ssl's weights; it won (docs/methods.md)
MEASURING = ("quality", "probe")  # the stages that only measure what the others made
SEED_STEP = 7919  # between the seeds of a run's trainings: --more_epochs sees new views, in another order


def fit(args: FitArgs, given: frozenset[str] | None = None) -> None:
    """`sssd fit`.

    Args:
        args: of the command.
        given: names of the arguments that were given, such as 'pretrain.batch_size'; `defaults.derive` chooses others
            by the images and the device. By default all are taken as they are.
    """
    began = time.perf_counter()
    args = with_augment(args, ("pretrain", "distill"))
    args = with_method(args, given)
    setup, chosen = set_up_fit(args, given)
    setup, in_parts = within_memory(setup, given)
    chosen |= in_parts
    args = setup.args
    start = {} if args.init is None else {"init": check_start(args.init, setup.arch, setup.data)}
    evaluation = None
    if setup.data.labels is not None:
        evaluation = evaluation_data(
            setup.data, setup.config, test_split=args.test_split, holdout=args.probe.holdout, seed=args.seed
        )
    plan = Plan(args, setup, evaluation, start)
    print_main(plan.describe())
    if args.budget is not None:  # which chooses the epochs that the next line names
        plan = within_budget(plan, began)
        trained = ("pretrain", "distill") if args.features is None else ("distill",)
        chosen |= {f"{name}.epochs": getattr(plan.args, name).epochs for name in trained}
    print_main(f"labels from {plan.setup.pretext.description.replace('`', '')}")
    surveyed = plan.survey()  # refuses other settings before it says what was chosen
    if chosen:
        print_main(describe_chosen(chosen, len(setup.data)))
    if few := advice(len(setup.data), plan.args):
        print_main(few)
    if rank() == 0 and (sizes := size_note(plan.args, setup.size)):
        print_main(sizes)
    stages = plan.run_stages(*surveyed)
    if rank() == 0:
        results = write_results(plan, stages)
        page = write_run_page(plan.out, setup.data, setup.forward)
        print_main("\n" + summary(results, plan.out, args.data))
        took, all_stages = time.perf_counter() - began, sum(stage["seconds"] for stage in results["times"])
        budget = ""
        if args.budget is not None and not args.more_epochs and stages.results.keys() - surveyed[1].done:
            budget = f", {describe_kept(args.budget, max(took, all_stages))}"
        print_main(f"\nDone in {took / 60:.1f} minutes{budget}. Report and figures: {plan.out / 'report.md'}")
        print_main(f"The clusters to look at and name, in a browser: {page}")
        network = plan.out / "model"
        print_main(f"Network: {network}, for timm.create_model('local-dir:{network}', pretrained=True)")
    barrier()


def with_method(args: FitArgs, given: frozenset[str] | None = None) -> FitArgs:
    """The arguments with the method's name, and what it has by default: the anchor's weight, the weights to start from.

    Args:
        args: of the command.
        given: names of those that were given; None takes all as they are.

    Raises:
        UserError: for a method and a weight that contradict each other.
    """
    anchor = args.distill.anchor
    if (args.method in ("sssd", "contrastive") and anchor) or (args.method == "anchored" and anchor == 0):
        raise UserError(f"--method {args.method} and --distill.anchor {anchor:g} contradict each other: remove one")
    own_trunk = all(other is None for other in (args.features, args.init, args.pretrain_model))
    if own_trunk and chooses_method(args, given):
        # A run keeps its method, also where the default was another when it was begun.
        args = replace(args, method=DEFAULT if args.overwrite else method_there(Path(args.out), DEFAULT))
    if args.method in (None, "anchored"):
        own = OWN_ANCHOR if args.method == "anchored" else 0.0
        distill = args.distill.resolved(encoder=args.features is not None, own=own)
        args = replace(args, method="anchored" if distill.anchor else "sssd", distill=distill)
    warm = args.method == "contrastive" and own_trunk if args.warm_start is None else args.warm_start
    return replace(args, distill=replace(args.distill, anchor=args.distill.anchor or 0.0), warm_start=warm)


def chooses_method(args: FitArgs, given: frozenset[str] | None) -> bool:
    """Whether the method is left to `with_method`: nothing that was given decides it."""
    decided = args.distill.anchor is not None or args.distill.mix != "none"
    return given is not None and "method" not in given and not decided


def set_up_fit(args: FitArgs, given: frozenset[str] | None) -> tuple[Setup, dict[str, Any]]:
    """Checks the arguments and opens the data; gives the settings that were chosen, by their names.

    Raises:
        UserError: with all mistakes.
    """
    mistakes = Mistakes()
    if args.warm_start and args.init is not None:
        mistakes.note(
            "--warm_start and --init both say what the student starts from: remove one, or give --warm_start false"
        )
    with mistakes.noted():
        _ = args.student
    if not args.distill.clusters and not args.distill.anchor:
        mistakes.note("--distill.clusters false leaves nothing to learn without --distill.anchor: give a weight")
    for name in ("cached_views", "dense") if not args.distill.anchor else ():
        if getattr(args.distill, name):
            mistakes.note(f"--distill.{name} is of the anchor's network: give --distill.anchor too, or remove it")
    for name in CONTRAST if args.method != "contrastive" else ():
        if (value := getattr(args.distill, name)) != (usual := getattr(StudentConfig, name)):
            mistakes.note(
                f"--distill.{name} {value:g} is of --method contrastive: give that too, or leave it at {usual:g}"
            )
    if args.soft is not None and args.cluster.nearest < 2:
        mistakes.note(
            "--soft needs the distances to several centroids: set --cluster.nearest to more than 1, such as 8"
        )
    for name in sorted(set(EPOCH_SETTINGS) & (given or set())) if args.budget is not None else ():
        mistakes.note(f"--budget chooses the epochs, and --{name} gives them: remove one")
    chosen: dict[str, Any] = {}

    def complete(scale: Scale) -> FitArgs:
        if given is None:
            return args
        chosen.clear()
        completed, more = derive(args, given, scale)
        chosen.update(more if "method" in given else {"method": args.method, **more})
        return completed

    anchored = {"distill": args.distill} if args.distill.anchor else {}
    setup = set_up(
        args,
        "fit",
        lambda args: {"distill": args.student},
        warm=bool(args.warm_start),
        anchored=anchored,
        complete=complete,
        mistakes=mistakes,
    )
    return setup, chosen


def within_budget(plan: "Plan", began: float) -> "Plan":
    """The plan with the epochs that fit into `budget`: those of an earlier call, or as measured now.

    Further trainings, of `more_epochs`, are no part of the budget.
    """
    args, setup = plan.args, plan.setup
    first = replace(plan, args=replace(args, more_epochs=[]))
    assert args.budget is not None  # callers look
    budget = seconds_of(args.budget)
    # Chosen for the same images, networks and batches, the epochs stay when a run is resumed or measured otherwise.
    trained = replace(first, args=with_epochs(first.args, LONGEST))  # so many, as a warm-up must be shorter
    settings = [
        {name: 1 if name == "epochs" else value for name, value in stage.settings.items() if name != "labels"}
        for stage in trained.stages()
        if "epochs" in stage.settings
    ]
    chosen_for = json.loads(json.dumps({"seconds": budget, **setup.inputs, "settings": settings}))
    before, rates = on_main(lambda: chosen_in(plan.out)), None
    if before is not None and serves(before, chosen_for):
        epochs = before["epochs"]
    else:
        if before is not None:  # so that what was changed is told, and not the epochs that it would lead to
            replace(plan, args=with_epochs(args, before["epochs"])).survey()
        print_main(f"measuring a few steps of each training, for the epochs that fit into {args.budget}")
        names = [stage.name for stage in first.stages()]
        work = first.work(dict.fromkeys(names, 0))
        rates = measure(setup, work)
        left = on_main(lambda: MARGIN * (budget - (time.perf_counter() - began)))
        epochs = epochs_within(setup, work, rates, left)
        check_epochs(args, epochs)
        replace(plan, args=with_epochs(args, epochs)).survey()  # a refused call leaves the other run's epochs alone
        keep(plan.out, epochs, chosen_for)
    args = with_epochs(args, epochs)
    return replace(plan, args=args, setup=setup.with_args(args), rates=rates)


@dataclass(frozen=True)
class Plan:
    """The stages of a run, declared, and what each does.

    Attributes:
        args: of the command.
        setup: the images, the networks, and where to run.
        evaluation: what the networks are measured on, where the images are labelled.
        start: the digest of the weights of `args.init`, as `init`, where it is given.
        rates: what was measured already, for --budget.
    """

    args: FitArgs
    setup: Setup
    evaluation: Evaluation | None
    start: dict[str, str]
    rates: Rates | None = None

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.setup.out

    @property
    def extensions(self) -> dict[str, AnchoredConfig | ContrastiveConfig]:
        """The trainings that go on with the distilled network, in turn, by the names of their stages.

        Each is a new cosine from the learning rate of `distill`, without warm-up: the last one had ended at 0. Momentum
        begins anew, and so does what a method has beside the network, such as the predictors of an anchor.
        """
        usual = replace(self.args.student, schedule="cosine", warmup_epochs=0.0, sizes=[])
        return {
            f"more-{number}": replace(usual, epochs=epochs)
            for number, epochs in enumerate(self.args.extensions, start=1)
        }

    @property
    def student(self) -> str:
        """The stage whose network is the result."""
        return ["distill", *self.extensions][-1]

    @property
    def networks(self) -> dict[str, str]:
        """The networks to measure: their titles, and the stages that train them."""
        anchored, contrastive = bool(self.args.distill.anchor), self.args.method == "contrastive"
        trained = {"contrastive SSSD" if contrastive else "anchored SSSD" if anchored else "SSSD": self.student}
        if self.evaluation is not None and self.args.baseline:
            trained[RANDOM] = "baseline"
        return trained

    def describe(self) -> str:
        """The images, the network and the machine, in a line."""
        data, setup = self.setup.data, self.setup
        return (
            f"{len(data)} images of {data.name}, {describe_labelling(data)}; {setup.arch} at {setup.size} px, "
            f"{describe_machine(setup.inputs['precision'])}"
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
                settings={**settings_of(args.student), "warm_start": args.warm_start, **self.start, **soft},
                later=lambda: {"labels": self.labels().identity},
                after=("labels",),
                all_processes=True,
            ),
        ]
        for before, name in pairwise(["distill", *self.extensions]):
            settings = settings_of(self.extensions[name])
            action = partial(self.extend, before, name)
            stages.append(Stage(name=name, action=action, settings=settings, after=(before,), all_processes=True))
        stages.append(
            Stage(
                name="quality",
                action=self.quality,
                settings={"looked_at": IMAGES},
                after=(self.student,),
                measured_on=None if self.evaluation is None else self.evaluation.digest(),
            )
        )
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
        # What measures a network that is trained further is done again without being asked to.
        extended = is_extension(on_main(lambda: more_epochs_there(self.out)), self.args.extensions)
        return [replace(stage, unasked=extended and stage.name in MEASURING) for stage in stages]

    def work(self, begun: dict[str, int]) -> Work:
        """What there is to do, where the stages `begun` are not done."""
        args, setup = self.args, self.setup
        trainings: dict[str, OptimConfig] = {"distill": args.student, **self.extensions}
        if setup.pretext.source is not None:
            trainings = {"pretrain": args.pretrain, **trainings}
        if "baseline" in self.networks.values():
            trainings["baseline"] = SelfDistillationConfig.of(args.distill)
        images = dict.fromkeys(trainings, len(setup.data))
        if setup.pretext.source is not None:
            images["pretrain"] = len(setup.pretext.source)
        probed = 0
        if self.evaluation is not None:
            measured = len(self.evaluation.train_positions) + len(self.evaluation.test_positions)
            probed = measured * (len(self.networks) + 1)  # the clustered features, too
        return Work(trainings, images, begun, probed)

    def survey(self) -> tuple[Stages, Survey]:
        """What is done of the stages in the run folder.

        Raises:
            UserError: if it was done with other settings or data, see `check_earlier`.
        """
        declared, args = self.stages(), self.args
        stages = Stages(
            self.out,
            {**self.setup.inputs, "seed": args.seed},
            overwrite=args.overwrite,
            keep_checkpoints=args.keep_checkpoints,
        )
        survey = stages.survey(declared)
        on_main(lambda: check_earlier(self.out, args, [stage.name for stage in declared], survey))
        return stages, survey

    def run_stages(self, stages: Stages, survey: Survey) -> Stages:
        """Runs all stages that are not done; takes what `survey` gives."""
        args, declared = self.args, self.stages()
        names = [stage.name for stage in declared]
        begin_config(self.out, replace(args, budget=None))
        print_main(f"{len(names)} stages: {', '.join(names)}")
        work = self.work(survey.begun)
        seconds: dict[str, float] = {}
        if work.worth_measuring():
            rates = self.rates if self.rates and not args.extensions else measure(self.setup, work)
            seconds = expected(self.setup, work, rates)
            print_main(f"about {duration(sum(seconds.values()))} from here, by a few measured steps of each training")
        stages.forecast = Forecast(names, seconds)
        for stage in declared:
            stages.run(stage)
        if rank() == 0:
            remove_stages(self.out, names, unfinished=args.overwrite)
        return stages

    def pseudo_labels(self) -> PseudoLabels:
        """What the stage 'labels' made."""
        return PseudoLabels.load(self.out / "labels")

    def labels(self) -> Labels:
        """What the network learns."""
        return pseudo_labels_for(self.setup.data, self.pseudo_labels(), self.args.soft)

    def distill(self, folder: Path) -> dict[str, Any]:
        """Self distillation on the pseudo labels."""
        args, setup = self.args, self.setup
        start = setup.pretext.network(self.out) if args.warm_start else args.init
        return self._distil(args.student, setup.spec(folder, "self distillation"), start)

    def extend(self, before: str, name: str, folder: Path) -> dict[str, Any]:
        """Goes on with the network of the stage `before`."""
        spec = replace(self.setup.spec(folder, name), continues=self.out / before)
        number = list(self.extensions).index(name) + 1
        return self._distil(self.extensions[name], spec, None, number * SEED_STEP)

    def _distil(
        self, config: AnchoredConfig | ContrastiveConfig, spec: RunSpec, start: str | None, more_seed: int = 0
    ) -> dict[str, float]:
        setup = self.setup
        runtime = replace(setup.runtime, seed=setup.runtime.seed + more_seed)
        return distill_network(
            setup.data,
            self.labels(),
            config,
            runtime,
            spec,
            init=start,
            encoder=setup.pretext.network(self.out) if self.args.distill.anchor else None,
            teacher_size=setup.pretext.teacher_size,
        )

    def quality(self, folder: Path) -> dict[str, Any]:
        """Figures without labels, of the distilled network and of the one that was clustered."""
        setup = self.setup
        clustered = setup.pretext.load(self.out)
        distilled = load_network(str(self.out / self.student))
        figures = run_figures(distilled, clustered, setup.data, setup.forward, self.args.seed)
        write_json(folder / "metrics.json", figures)
        return {"label_free": figures}

    def baseline(self, folder: Path) -> dict[str, Any]:
        """From new weights on random labels; without anchor and contrast, which teach what the labels do not say."""
        setup = self.setup
        labels = labels_by_name("random", setup.data, self.args.cluster.k, setup.runtime)
        plain = SelfDistillationConfig.of(self.args.distill)
        return distill_network(setup.data, labels, plain, setup.runtime, setup.spec(folder, RANDOM))

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
            if stage == self.student:
                put_heads(network, probe, setup.data)
                names = setup.data.class_names
                save_model_folder(
                    folder / "network", network, arch=setup.arch, label_names=names, input_size=setup.size
                )
        trunk = setup.pretext.load(self.out)
        features = evaluation_features(trunk, evaluation, setup.forward)
        knn = KNNConfig(neighbours=min(KNNConfig.neighbours, len(features.train_y)))
        measured = {
            "accuracy": accuracy,
            "clustered": {
                "linear probe": probe_features(features, self.args.probe, self.args.seed).exits[-1],
                f"weighted kNN (k = {knn.neighbours})": knn_features(features, knn)[-1],
            },
            "test": evaluation.words,
            "test_images": len(evaluation.test_positions),
        }
        write_json(folder / "metrics.json", measured)
        return measured

    def _probe_of(self, network: Any) -> Probe:
        assert self.evaluation is not None  # else there is no stage that asks
        features = evaluation_features(network, self.evaluation, self.setup.forward)
        return probe_features(features, self.args.probe, self.args.seed)


def write_results(plan: Plan, stages: Stages) -> Results:
    """Writes the figures, the report, metrics.json and the model folder.

    Returns:
        The content of metrics.json.
    """
    args, setup, out = plan.args, plan.setup, plan.out
    pseudo = plan.pseudo_labels()
    probe = stages.results.get("probe", {})
    network = load_network(str(out / "probe" / "network" if probe else out / plan.student))
    macs = multiply_adds(network, (setup.data.channels, setup.size, setup.size))
    results: Results = {
        "model": setup.arch,
        "image_size": setup.size,
        "data": setup.data.name,
        "split": setup.data.split,
        "images": len(setup.data),
        "corrupt": len(setup.data.corrupt),
        "fingerprint": setup.data.fingerprint,
        "seed": args.seed,
        # What trained; probes and reports may be made on another machine.
        "machine": stages.results[plan.student].get("machine") or describe_machine(stages.common["precision"]),
        "k_asked": args.cluster.k,
        "sizes": pseudo.meta["sizes"],
        "quality": pseudo.meta["quality"],
        "label_free": stages.results["quality"]["label_free"],
        "from_scratch": from_scratch(args),
        "verdict": run_verdict(args, setup.arch, len(setup.data), stages.results["quality"]["label_free"]),
        "macs": macs,
        "times": [{"step": name, "seconds": result["seconds"]} for name, result in stages.results.items()],
        "steps": digests(out, [name for name in stages.results if name not in MEASURING]),
        "figures": draw_figures(plan, stages, pseudo, macs),
        "notes": [
            f"**Labels from**: {setup.pretext.description}"
            + ("" if args.soft is None else f"; soft, temperature {args.soft:g}"),
            f"**Method**: {distillation(asdict(args))}" + (", from that network's weights" if args.warm_start else ""),
            *more_epochs_note(args),
        ],
    }
    if setup.pretext.source is None:
        results["encoder"] = short_name(setup.pretext.arch)
    if setup.pretext.source is not None and not setup.pretext.same_data:
        results["pretrain_data"] = setup.pretext.source.name
    measured = {}
    if probe:
        results["test"], results["test_images"] = probe["test"], probe["test_images"]
        results["classes"] = len(setup.data.class_names or [])
        results["accuracy"], results["clustered"] = probe["accuracy"], probe["clustered"]
        ours = probe["accuracy"][0]
        measured = {str(number): value for number, value in enumerate(ours["exits"], start=1)}
        measured["ensemble"] = ours["ensemble"]
    remove_figures(out, results["figures"])
    write_report(out / "report.md", results)
    if (out / "model").is_dir():
        link_network(out)  # before a copy of this network by the run's name differs from it
    save_model_folder(
        out / "model",
        network,
        arch=setup.arch,
        input_size=setup.size,
        label_names=setup.data.class_names if probe else cluster_names(out),
        metrics=measured,
        card_context=results,
    )
    link_network(out)
    save_config(out, replace(args, budget=None))  # whose epochs it has
    save_corrupt(out, setup.data.corrupt)
    write_json(out / "metrics.json", results)  # last, as it says that all the others are of these steps
    return results


def more_epochs_note(args: FitArgs) -> list[str]:
    """How a network was trained further, as a line of Markdown, where it was."""
    if not args.more_epochs:
        return []
    epochs = " and ".join(map(str, args.extensions))
    baseline = "; the baseline was not trained further" if args.baseline else ""
    return [
        f"**More epochs**: {epochs} after the first {args.distill.epochs}, each time by a new cosine schedule from "
        f"learning rate {args.distill.lr:g}{baseline}"
    ]


def draw_figures(plan: Plan, stages: Stages, pseudo: PseudoLabels, macs: dict[str, int]) -> dict[str, str]:
    """Draws the figures of a run; gives their captions by their paths in it."""
    folder, captions = plan.out / "figures", {}
    titles = {"pretrain": "MoCo v2", "distill": "self distillation"}
    titles |= {name: f"self distillation, {config.epochs} epochs more" for name, config in plan.extensions.items()}
    titles |= {"baseline": RANDOM}
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


def nearest_images(data: ImageData, pseudo: PseudoLabels) -> tuple[Any, list[str]]:
    """The images nearest to the centres of some clusters, from the largest cluster to the smallest.

    Returns:
        Uint8 [SHOWN, SHOWN, 3, S, S], clusters by images, of fewer clusters where there are fewer, filled up with
        white; and a title for each cluster.
    """
    sizes = np.array(pseudo.meta["sizes"])
    order = np.argsort(-sizes, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))]
    labels = pseudo.labels_of(data.rows)
    position_of = {row: position for position, row in enumerate(data.rows)}
    images = np.full((len(chosen), SHOWN, 3, data.size, data.size), 255, dtype=np.uint8)
    titles = []
    for place, cluster in enumerate(chosen):
        members = np.flatnonzero(pseudo.labels == cluster)
        nearest = pseudo.rows[members[np.argsort(pseudo.distances[members], kind="stable")]]
        positions = [position_of[row] for row in nearest if row in position_of][:SHOWN]
        images[place, : len(positions)] = data.shown(torch.tensor(positions)).numpy()
        title = f"cluster {cluster}: {plural(sizes[cluster], 'image')}"
        if data.labels is not None and data.class_names is not None:
            truth = np.bincount(data.labels[labels == cluster], minlength=len(data.class_names))
            title += f", {100 * truth.max() / max(1, truth.sum()):.0f} % {data.class_names[int(truth.argmax())]}"
        titles.append(title)
    return images, titles
