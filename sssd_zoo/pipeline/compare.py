"""`sssd compare`: several methods on the same images, with the same probes, side by side with the paper's figures.

OUT/seed-S/ holds, for each seed, the steps of every method (see `METHODS`), each done once and reused by later calls;
OUT/report.md, results.csv, results.json and accuracy.png what they gave.
"""

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from sssd_zoo.configs import (
    AnchoredConfig,
    ClusterConfig,
    CompareArgs,
    MoCoConfig,
    OptimConfig,
    RuntimeConfig,
    SEEDConfig,
    SelfDistillationConfig,
)
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import barrier, print_main, rank
from sssd_zoo.distributed.hardware import describe_machine
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, listed, markdown, plain
from sssd_zoo.evaluation.protocol import Evaluation, evaluation_data, evaluation_features, probe_features
from sssd_zoo.evaluation.reports import figures
from sssd_zoo.evaluation.reports.comparison import (
    METHODS,
    VARIANTS,
    Result,
    Setting,
    changes_table,
    comparison_table,
    mean_of,
    paper_tables,
    results_csv,
)
from sssd_zoo.evaluation.reports.markdown import AccuracyRow
from sssd_zoo.files import atomic_write_text, read_json, write_json
from sssd_zoo.labels.origin import Name, labels_by_name, pseudo_labels_for
from sssd_zoo.labels.protocol import Labels
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.networks import load_network
from sssd_zoo.pipeline.distill import distill_network
from sssd_zoo.pipeline.pretext import Setup, set_up, with_augment
from sssd_zoo.pipeline.seed import seed_network
from sssd_zoo.pipeline.stages import Stage, Stages
from sssd_zoo.training.engine import check_trainable
from sssd_zoo.training.runs import begin_config, save_config, settings_of

LABELLED = {  # the methods that learn pseudo labels, and the stage that makes these
    "sssd": "labels",
    "anchored": "labels",
    "anchored-warm": "labels",
    "contrastive": "labels",
    "sssd-warm": "labels",
    "sssd-redos": "labels-redos",
    "sssd-soft": "labels-soft",
    "clusterfit": "labels",
    "clusterfit-anchored": "labels",
}
ANCHORED = ("anchored", "anchored-warm", "clusterfit-anchored")
EXTENSIONS = ("dense", "cached_views")  # settings of an anchor
WARM = ("sssd-warm", "anchored-warm", "contrastive")  # start from M_ssl's weights
NAMED: dict[str, Name] = {"random": "random", "true": "true", "dacsd": "own"}  # the other methods, and their labels
NEAREST = 8  # centroids that soft labels are over
OWN = {"contrastive": "contrastive", "seed": "seed_method"}  # methods with arguments of their own, and these
TAUGHT = (*LABELLED, "seed", "pretext")  # the methods that need M_ssl; the others start from nothing


def compare(args: CompareArgs) -> None:
    """`sssd compare`."""
    began = time.perf_counter()
    check_arguments(args)
    others = [result for folder in args.also for result in read_results(Path(folder))]
    trained = ["distill", *(own for method, own in OWN.items() if method in args.methods)]
    args = with_augment(args, ("pretrain", "distill", *OWN.values()))
    bases = {*args.methods, *(changes["method"] for changes in args.variants.values())}
    warm, taught = bool(set(WARM) & bases), bool(set(TAUGHT) & bases)
    setup = set_up(
        args,
        "compare",
        lambda args: {name: getattr(args, name) for name in trained},
        warm=warm,
        anchored=anchored_settings(args),
        pretext=taught,
        require_labels=True,
    )
    out = setup.out
    evaluation = evaluation_data(
        setup.data, setup.config, test_split=args.test_split, holdout=args.probe.holdout, seed=args.seeds[0]
    )
    if "true" in args.methods and evaluation.test is evaluation.train:
        with_labels = len(evaluation.train_positions)  # the others are measured on
        check_trainable(args.distill, setup.inputs["processes"], with_labels)
    begin_config(out, args)
    setting = describe_setting(args, setup)
    print_main(f"{setting.images} images of {setting.data}; {setup.arch} at {setup.size} px, {setting.machine}")
    if taught:
        print_main(f"labels from {setup.pretext.description.replace('`', '')}")
    results: list[Result] = []
    plans = [Plan(args, setup, evaluation, seed) for seed in args.seeds]
    for plan in plans:  # before anything is trained
        plan.run().refuse_others(plan.stages())
    for plan in plans:
        stages = plan.run()
        for stage in plan.stages():
            stages.run(stage)
        results += [plan.result(method, stages, setting) for method in plan.methods]
    if rank() == 0:
        _write(
            args,
            results,
            not_among(results, others),
            out,
            pretext=setup.pretext.description if taught else None,
            test=evaluation.describe(),
        )
        save_config(out, args)
        print_main(f"\nDone in {(time.perf_counter() - began) / 60:.1f} minutes. Report: {out / 'report.md'}")
    barrier()


def check_arguments(args: CompareArgs) -> None:
    """Raises `UserError` for arguments of `sssd compare` that exclude one another, or change nothing."""
    folders = [Path(folder).resolve() for folder in (args.out, *args.also)]
    if len(set(folders)) < len(folders):
        raise UserError("--also names --out or a folder twice, whose results would count twice: name each once")
    if unknown := sorted(set(args.epochs) - {*args.methods, *args.variants}):
        raise UserError(f"--epochs names {', '.join(unknown)}, which is not among --methods or --variants")
    check_variants(args)
    if args.distill.anchor == 0 and (anchored := sorted(set(ANCHORED) & set(args.methods))):
        raise UserError(f"--distill.anchor 0 leaves nothing of {', '.join(anchored)}: remove one of them")
    if not anchored_settings(args) and (extensions := [each for each in EXTENSIONS if getattr(args.distill, each)]):
        raise UserError(f"no method here has an anchor, which distill.{extensions[0]} would extend: remove it")
    if "pretext" in args.epochs and args.features is not None:
        raise UserError("--epochs of pretext are those of MoCo, but --features is taken as it is: remove one of them")


def check_variants(args: CompareArgs) -> None:
    """Raises `UserError` for a variant of no method that learns pseudo labels, and for settings that there are not."""
    known = [field.name for field in fields(AnchoredConfig)]
    for name, changes in args.variants.items():
        if name in METHODS or not re.fullmatch(r"(?!pretrain$|steps$|labels|.*-probe$)[A-Za-z0-9][\w.+-]*", name):
            raise UserError(
                f"--variants names {plain(name)!r}, which is a method's name or cannot be that of a folder; give one "
                "such as anchored-mixup"
            )
        if changes.get("method") not in (varied := [method for method in LABELLED if method not in OWN]):
            raise UserError(f"--variants {name} needs a `method`, one of {', '.join(varied)}")
        if unknown := sorted(set(changes) - {"method", *known}):
            raise UserError(f"--variants {name} changes {listed(unknown)}; it may change {', '.join(known)}")
        config = variant(args, name)
        if has_anchor(args, name):
            continue
        if not config.clusters:
            raise UserError(f"--variants {name}: clusters false leaves nothing to learn without an anchor")
        if extensions := [each for each in EXTENSIONS if getattr(config, each)]:
            raise UserError(f"--variants {name} has no anchor, which {listed(extensions)} would extend: remove it")


def has_anchor(args: CompareArgs, name: str) -> bool:
    """Whether a variant's method has an anchor, of another weight than 0."""
    changes = args.variants[name]
    return changes["method"] in ANCHORED and changes.get("anchor", args.distill.anchor) != 0


def anchored_settings(args: CompareArgs) -> dict[str, AnchoredConfig]:
    """The settings of the methods and variants that have an anchor, by their names in the arguments."""
    variants = {f"variants {name}": variant(args, name) for name in args.variants if has_anchor(args, name)}
    return {"distill": args.distill, **variants} if set(ANCHORED) & set(args.methods) else variants


def variant(args: CompareArgs, name: str) -> AnchoredConfig:
    """How a variant's network is trained, before its epochs of `args.epochs`.

    Raises:
        UserError: if its settings contradict one another.
    """
    changes = {key: value for key, value in args.variants[name].items() if key != "method"}
    if not has_anchor(args, name):  # those of `distill` are for methods with one
        changes = {"dense": False, "cached_views": 0, **changes}
    try:
        return replace(args.distill, **changes)
    except ValueError as error:
        raise UserError(f"--variants {name}: {error}") from error


def describe_setting(args: CompareArgs, setup: Setup) -> Setting:
    """What all rows of a comparison have in common."""
    pretext = setup.pretext
    other = None if pretext.same_data else pretext.source
    return Setting(
        data=setup.data.name,
        images=len(setup.data),
        model=setup.arch,
        image_size=setup.size,
        k=args.cluster.k,
        pretext=short_name(pretext.arch),
        pretext_epochs=None if pretext.source is None else args.pretrain.epochs,
        pretext_data=None if other is None else other.name,
        pretext_images=None if other is None else len(other),
        epochs=args.distill.epochs,
        seed_epochs=args.epochs.get("seed", args.seed_method.epochs),
        machine=describe_machine(setup.inputs["precision"]),
        pretrained=digest_of(
            {
                **{key: value for key, value in pretext.inputs().items() if key != "arch"},  # it may be a path
                **(settings_of(args.pretrain) if pretext.after else {}),
            }
        ),
    )


@dataclass(frozen=True)
class Plan:
    """The stages of one seed, declared, and what each does.

    Attributes:
        args: of the command.
        setup: the images, the networks, and where to run.
        evaluation: what the networks are measured on.
        seed: of everything.
    """

    args: CompareArgs
    setup: Setup
    evaluation: Evaluation
    seed: int

    @property
    def out(self) -> Path:
        """The seed's folder."""
        return self.setup.out / f"seed-{self.seed}"

    @property
    def methods(self) -> list[str]:
        """The methods asked for, in the order of `METHODS`, and the variants."""
        return [*(method for method in METHODS if method in self.args.methods), *self.args.variants]

    def base(self, method: str) -> str:
        """The method of which a variant is one; any other is its own."""
        return str(self.args.variants[method]["method"]) if method in self.args.variants else method

    @property
    def runtime(self) -> RuntimeConfig:
        """Where and how to run, with this seed."""
        return replace(self.setup.runtime, seed=self.seed)

    def run(self) -> Stages:
        """What runs the stages in the seed's folder."""
        args = self.args
        inputs = {**self.setup.inputs, "seed": self.seed}
        return Stages(self.out, inputs, overwrite=args.overwrite, keep_checkpoints=args.keep_checkpoints)

    def stages(self) -> list[Stage]:
        """All stages in turn."""
        args, pretext, clusterings = self.args, self.setup.pretext, self.clusterings
        bases = [self.base(method) for method in self.methods]
        clustered = dict.fromkeys(LABELLED[method] for method in bases if method in LABELLED)
        taught = set(TAUGHT) & set(bases) - ({"pretext"} if self.trains_pretext else set())
        stages = [
            *(pretext.pretrain_stages(settings_of(args.pretrain), self.runtime) if taught else ()),
            *(pretext.label_stage(self.setup, clusterings[name], self.out, self.seed, name) for name in clustered),
        ]
        for method in self.methods:
            if method == "seed":
                stages.append(self.seed_stage())
            elif method != "pretext":
                stages.append(self.distill_stage(method))
            elif self.trains_pretext:
                stages.append(self.pretext_stage())
            stages.append(self.probe_stage(method))
        return stages

    @property
    def clusterings(self) -> dict[str, ClusterConfig]:
        """How each stage that makes labels clusters."""
        cluster = self.args.cluster
        return {
            "labels": cluster,
            "labels-redos": replace(cluster, redos=self.args.redos),
            "labels-soft": replace(cluster, nearest=NEAREST),
        }

    @property
    def trains_pretext(self) -> bool:
        """Whether 'pretext' is trained for epochs of its own, and not the network that the others learn from."""
        return "pretext" in self.args.epochs and self.setup.pretext.source is not None

    def epochs(self, method: str) -> int:
        """Epochs of a method's training, 0 where it has none of its own."""
        args = self.args
        if method == "pretext":
            return args.epochs.get(method, 0) if self.trains_pretext else 0
        if method in args.variants:
            usual = variant(args, method).epochs
        else:
            usual = getattr(args, OWN.get(method, "distill")).epochs
        return args.epochs.get(method, usual)

    def config(self, method: str) -> OptimConfig:
        """How a method's network is trained, for its own epochs."""
        args, base = self.args, self.base(method)
        kinds: dict[str, OptimConfig] = {name: getattr(args, own) for name, own in OWN.items()}
        kinds["pretext"] = args.pretrain
        distill = variant(args, method) if method in args.variants else args.distill
        config = kinds.get(method, distill)
        if epochs := self.epochs(method):  # none of its own has M_ssl itself
            config = replace(config, epochs=epochs)
        if not isinstance(config, AnchoredConfig):
            return config
        return config.resolved(encoder=True) if base in ANCHORED else SelfDistillationConfig.of(config)

    def trained(self, method: str) -> str:
        """A digest of what decides a method's numbers, but M_ssl and the seed."""
        base, evaluation = self.base(method), self.evaluation
        return digest_of(
            {
                "base": base,
                "data": [evaluation.train.fingerprint, evaluation.test.fingerprint, asdict(self.args.probe)],
                "training": settings_of(self.config(method)),
                "clusters": asdict(self.clusterings[LABELLED.get(base, "labels")]),
                "soft": self.args.soft if base == "sssd-soft" else None,
            }
        )

    def pretext_stage(self) -> Stage:
        """M_ssl trained by itself, for as long as the other methods take in all."""
        config = cast(MoCoConfig, self.config("pretext"))
        (stage,) = replace(self.setup.pretext, config=config).pretrain_stages(settings_of(config), self.runtime)
        return replace(stage, name="pretext")

    def seed_stage(self) -> Stage:
        """SEED, whose teacher is M_ssl."""
        setup, config = self.setup, cast(SEEDConfig, self.config("seed"))
        teacher = setup.pretext.network(self.out)

        def train(folder: Path) -> dict[str, Any]:
            spec, size = setup.spec(folder, "SEED"), setup.pretext.teacher_size
            return dict(seed_network(setup.data, teacher, config, self.runtime, spec, teacher_size=size))

        settings = settings_of(config)
        if not setup.pretext.after:
            settings |= {"features": setup.pretext.digest}
            settings |= {} if setup.pretext.teacher_size is None else {"teacher_size": setup.pretext.teacher_size}
        return Stage(name="seed", action=train, settings=settings, after=setup.pretext.after, all_processes=True)

    def distill_stage(self, method: str) -> Stage:
        """A method that learns labels; a warm start is from M_ssl's weights."""
        setup, pretext, base = self.setup, self.setup.pretext, self.base(method)
        config, warm = cast(SelfDistillationConfig, self.config(method)), base in WARM

        def train(folder: Path) -> dict[str, Any]:
            return distill_network(
                setup.data,
                self.labels(method),
                config,
                self.runtime,
                setup.spec(folder, METHODS.get(method, method)),
                method="clusterfit" if base.startswith("clusterfit") else "sssd",
                init=pretext.network(self.out) if warm else None,
                encoder=pretext.network(self.out) if base in ANCHORED else None,
                teacher_size=pretext.teacher_size,
                positions=self.positions(method),
            )

        return Stage(
            name=method,
            action=train,
            settings={
                **settings_of(config),
                **({"warm_start": True} if warm else {}),
                # A variant's name does not say of which method it is, and those with exits have the same settings.
                **({"network": "without exits"} if base != method and base.startswith("clusterfit") else {}),
                **({} if self.positions(method) is None else {"held_out": self.evaluation.digest()}),
            },
            later=lambda: {"labels": self.labels(method).identity},
            after=(LABELLED[base],) if base in LABELLED else (),
            all_processes=True,
        )

    def positions(self, method: str) -> Tensor | None:
        """The images to learn from, int64, or None for all: true labels must not be those that are measured."""
        evaluation = self.evaluation
        return evaluation.train_positions if method == "true" and evaluation.test is evaluation.train else None

    def labels(self, method: str) -> Labels:
        """What a method learns."""
        base = self.base(method)
        if base in LABELLED:
            pseudo = PseudoLabels.load(self.out / LABELLED[base])
            return pseudo_labels_for(self.setup.data, pseudo, self.args.soft if base == "sssd-soft" else None)
        return labels_by_name(NAMED[method], self.setup.data, self.args.cluster.k, self.runtime)

    def probe_stage(self, method: str) -> Stage:
        """Accuracy of a method's network."""
        args, size = self.args, self.setup.size

        def measure(folder: Path) -> dict[str, Any]:
            if method == "pretext" and not self.trains_pretext:
                network = self.setup.pretext.load(self.out)
            else:
                network = load_network(str(self.out / method))
            features = evaluation_features(network, self.evaluation, self.setup.forward)
            probe = probe_features(features, args.probe, self.seed)
            macs = {}
            if len(probe.exits) > 1:  # with the probes as its heads, not those of the clusters
                network.reset_classifier(features.classes)
                macs = multiply_adds(network, (self.setup.data.channels, size, size))
            measured = {"exits": probe.exits, "ensemble": probe.ensemble if macs else None, "macs": macs}
            write_json(folder / "metrics.json", measured)
            return measured

        as_it_is = method == "pretext" and not self.trains_pretext
        return Stage(
            name=f"{method}-probe",
            action=measure,
            settings={
                **asdict(args.probe),
                "test": self.evaluation.test.fingerprint,
                **(self.setup.pretext.inputs() if as_it_is and not self.setup.pretext.after else {}),
            },
            after=self.setup.pretext.after if as_it_is else (method,),
            measured_on=self.evaluation.digest(),
        )

    def result(self, method: str, stages: Stages, setting: Setting) -> Result:
        """A method's row."""
        probed = stages.results[f"{method}-probe"]
        base = self.base(method)
        earlier = [LABELLED[base]] if base in LABELLED else []
        if base in TAUGHT and not (method == "pretext" and self.trains_pretext):
            earlier += self.setup.pretext.after
        trained = next((name for name in (method, *earlier) if name in stages.results), f"{method}-probe")
        machine = stages.results[trained].get("machine", setting.machine)  # earlier versions did not record it
        return Result(
            method=method,
            seed=self.seed,
            exits=probed["exits"],
            ensemble=probed["ensemble"],
            seconds=stages.results[method]["seconds"] if method in stages.results else 0.0,
            seconds_before=sum(stages.results[stage]["seconds"] for stage in earlier),
            macs=probed["macs"],
            setting=setting._replace(machine=machine),
            epochs=self.epochs(method),
            trained=self.trained(method),
        )


def not_among(results: list[Result], others: list[Result]) -> list[Result]:
    """The others, each once, less those that are the same method with the same seed as one of `results`.

    A folder may be a copy of the one that is compared with it, and a seed that counts twice would hide the spread.
    """

    def key(run: Result) -> tuple[Any, ...]:
        return run.setting, run.method, run.epochs, run.trained, run.seed

    return list({key(run): run for run in [*results, *others]}.values())[len({key(run) for run in results}) :]


def digest_of(settings: dict[str, Any]) -> str:
    """What tells settings from others: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_results(out: Path) -> list[Result]:
    """What another comparison found.

    Raises:
        UserError: if the folder holds no results, or those of a version without settings.
    """
    content = read_json(out / "results.json", list[dict[str, Any]])
    try:
        return [Result.from_json(entry) for entry in content]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{out / 'results.json'} was not written by this version: run its comparison once more, which reuses what "
            "is there"
        ) from error


def _write(
    args: CompareArgs, results: list[Result], others: list[Result], out: Path, *, pretext: str | None, test: str
) -> None:
    setting = results[0].setting
    machines = list(dict.fromkeys(run.setting.machine for run in results))
    of_which = "this machine" if len(machines) == 1 else "the machines that trained, which the list of runs names"
    lines = [
        "# Methods compared",
        "",
        f"- **Data**: {code(setting.data)}, {setting.images:,} images, whose labels serve the probes and true labels "
        "only",
        f"- **Measured on**: {markdown(test)}",
        f"- **Network**: {code(setting.model)} at {setting.image_size} px",
        f"- **Labels and SEED's teacher from**: {pretext or 'no network'}; K = {setting.k:,}",
        f"- **Training**: {args.distill.epochs} epochs of all that learn labels"
        + (f", {setting.seed_epochs} of SEED" if "seed" in args.methods else "")
        + (
            "; where a row of the table says otherwise, that many"
            if args.epochs or set(OWN) & set(args.methods)
            else ""
        ),
        f"- **Seeds**: {', '.join(map(str, args.seeds))}",
        f"- **Machine**: {markdown('; '.join(machines))}",
        "",
        "Linear-probe accuracy in percent: a linear layer per exit on the frozen network; the ensemble is the mean of "
        "the exits' softmax outputs. Networks without exits answer at the place of exit 4. Of several seeds the mean "
        f"and, in brackets, the lowest and the highest. Times are those of {of_which}, means over the seeds.",
        "",
        *comparison_table(results),
        "",
    ]
    if changes := changes_table(results, others):
        lines += ["## One thing changed", "", "Points over plain SSSD with the same seed.", "", *changes, ""]
    drawn = [run for run in results if run.macs and run.method in METHODS and run.method not in VARIANTS]
    if drawn:
        means: list[AccuracyRow] = []
        without_exits = {}
        for method, title in METHODS.items():
            if method in VARIANTS:
                continue  # they lie on plain SSSD's points
            runs = [run for run in results if run.method == method]
            if runs and runs[0].macs:
                columns = [mean_of(values) for values in zip(*(run.exits for run in runs), strict=True)]
                ensemble = mean_of(run.ensemble for run in runs if run.ensemble is not None)
                means.append({"name": title, "exits": columns, "ensemble": ensemble})
            elif runs:
                without_exits[title] = mean_of(run.exits[0] for run in runs)
        figures.accuracy_cost(means, drawn[0].macs, out / "accuracy.png", plain=without_exits)
        lines += ["![Accuracy against MACs](accuracy.png)", ""]
    lines += paper_tables([*results, *others])
    atomic_write_text(out / "report.md", "\n".join(lines))
    atomic_write_text(out / "results.csv", results_csv([*results, *others]))
    write_json(out / "results.json", [run.as_json() for run in results])
