"""`sssd compare`: several methods on the same images, with the same probes, side by side with the paper's figures.

OUT/seed-S/ holds, for each seed, the steps of every method (see `METHODS`), each done once and reused by later calls;
OUT/report.md, results.csv, results.json and accuracy.png what they gave.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sssd_zoo.configs import CompareArgs, OptimConfig, RuntimeConfig
from sssd_zoo.data.sources import short_name
from sssd_zoo.distributed import barrier, rank
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import code, markdown
from sssd_zoo.evaluation.protocol import evaluation_data, evaluation_features, probe_features
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
from sssd_zoo.labels.pseudo_labels import PseudoLabels, random_labels
from sssd_zoo.labels.soft import SoftLabels
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.networks import load_network
from sssd_zoo.pipeline.distill import distill_network
from sssd_zoo.pipeline.pretext import set_up
from sssd_zoo.pipeline.seed import seed_network
from sssd_zoo.pipeline.stages import Stages, machine_words, say
from sssd_zoo.training.runs import check_queue, digest, save_config, settings_of

LABELLED = {  # the methods that learn pseudo labels, and the stage that makes these
    "sssd": "labels",
    "sssd-warm": "labels",
    "sssd-redos": "labels-redos",
    "sssd-soft": "labels-soft",
    "clusterfit": "labels",
}
NEAREST = 8  # centroids that soft labels are over
TAUGHT = (*LABELLED, "seed")  # the methods that need M_ssl; the others start from nothing


def compare(args: CompareArgs) -> None:
    """`sssd compare`."""
    began = time.perf_counter()
    others = [result for folder in args.also for result in read_results(Path(folder))]
    trained: list[OptimConfig] = [args.distill]
    trained += [args.seed_method] if "seed" in args.methods else []
    setup = set_up(args, "compare", trained, warm="sssd-warm" in args.methods, require_labels=True)
    out, runtime, forward = setup.out, setup.runtime, setup.forward
    data, size, arch, pretext = setup.data, setup.size, setup.arch, setup.pretext
    if "seed" in args.methods:
        check_queue(args.seed_method.queue_size, len(data))
    evaluation = evaluation_data(
        data, setup.config, test_split=args.test_split, holdout=args.probe.holdout, seed=args.seeds[0]
    )
    if rank() == 0 and not (out / "config.yaml").exists():  # an older one describes what is there until the end
        save_config(out, args)
    machine = machine_words(setup.inputs["precision"])
    say(f"{len(data)} images of {data.name}; {arch} at {size} px, {machine}")
    say(f"labels from {pretext.words.replace('`', '')}")
    setting = Setting(
        data=data.name,
        images=len(data),
        model=arch,
        image_size=size,
        k=args.cluster.k,
        pretext=short_name(pretext.arch),
        pretext_epochs=None if pretext.source is None else args.pretrain.epochs,
        pretext_data=None if pretext.same_data or pretext.source is None else pretext.source.name,
        pretext_images=None if pretext.same_data or pretext.source is None else len(pretext.source),
        epochs=args.distill.epochs,
        seed_epochs=args.seed_method.epochs,
        machine=machine,
    )

    results: list[Result] = []
    for seed in args.seeds:
        runtime.seed = seed
        stages = Stages(out / f"seed-{seed}", {**setup.inputs, "seed": seed}, overwrite=args.overwrite)
        folder = stages.out
        if set(TAUGHT) & set(args.methods):
            pretext.pretrain(stages, settings_of(args.pretrain), runtime)
        clusterings = {
            "labels": args.cluster,
            "labels-redos": replace(args.cluster, redos=args.redos),
            "labels-soft": replace(args.cluster, nearest=NEAREST),
        }
        for name in dict.fromkeys(LABELLED[method] for method in args.methods if method in LABELLED):
            pretext.label(stages, data, clusterings[name], forward, seed, stage=name)

        for method in METHODS:
            if method not in args.methods:
                continue
            train, settings = _training(args, method, data, folder, runtime, arch, size, pretext.network(folder))
            settings |= {"features": pretext.digest} if method == "seed" and not pretext.after else {}
            labels = LABELLED.get(method)
            after = (labels,) if labels else pretext.after if method == "seed" else ()
            stages.run(method, train, settings, after=after, all_processes=True)

            def measure(target: Path, method: str = method, folder: Path = folder, seed: int = seed) -> dict[str, Any]:
                network = load_network(str(folder / method))
                probe = probe_features(evaluation_features(network, evaluation, forward), args.probe, seed)
                macs = multiply_adds(network, (3, size, size)) if len(probe.exits) > 1 else {}
                found = {"exits": probe.exits, "ensemble": probe.ensemble if macs else None, "macs": macs}
                write_json(target / "metrics.json", found)
                return found

            probed = stages.run(
                f"{method}-probe",
                measure,
                {**asdict(args.probe), "test": evaluation.test.fingerprint},
                after=(method,),
                measured_on=evaluation.digest(),
            )
            earlier = [*((labels,) if labels else ()), *(pretext.after if method in TAUGHT else ())]
            results.append(
                Result(
                    method=method,
                    seed=seed,
                    exits=probed["exits"],
                    ensemble=probed["ensemble"],
                    seconds=stages.results[method]["seconds"],
                    seconds_before=sum(stages.results[step]["seconds"] for step in earlier),
                    macs=probed["macs"],
                    setting=setting,
                )
            )
    if rank() == 0:
        _write(args, results, others, out, pretext=pretext.words, test=evaluation.describe())
        save_config(out, args)
        say(f"\nDone in {(time.perf_counter() - began) / 60:.1f} minutes. Report: {out / 'report.md'}")
    barrier()


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


def _training(
    args: CompareArgs,
    method: str,
    data: Any,
    folder: Path,
    runtime: RuntimeConfig,
    arch: str,
    size: int,
    teacher: str,
) -> tuple[Callable[[Path], dict[str, Any]], dict[str, Any]]:
    """What trains a method's network into a folder, and the settings that decide its numbers.

    `teacher` is what M_ssl is loaded by: SEED's teacher, and the weights that a warm start starts from.
    """
    if method == "seed":
        return (
            lambda target: seed_network(data, teacher, args.seed_method, runtime, arch=arch, size=size, out=target),
            asdict(args.seed_method),
        )
    labels: Any
    soft = None
    if method in LABELLED:
        pseudo = PseudoLabels.load(folder / LABELLED[method])
        pseudo.check(data.fingerprint)
        labels = pseudo.labels_of(data.rows)
        soft = SoftLabels(pseudo, data.rows, args.soft) if method == "sssd-soft" else None
    elif method == "random":
        labels = random_labels(len(data), args.cluster.k, runtime.seed)
    elif method == "true":
        labels = data.labels
    else:
        labels = args.cluster.k
    own = isinstance(labels, int)
    identity = f"own, K = {labels}" if own else digest(labels, args.soft if soft else None)
    warm = method == "sssd-warm"
    return (
        lambda target: distill_network(
            data,
            labels,
            args.distill,
            runtime,
            arch=arch,
            size=size,
            out=target,
            labels_digest=identity,
            soft=soft,
            init=teacher if warm else None,
            title=METHODS[method],
            method="clusterfit" if method == "clusterfit" else "sssd",
        ),
        {**settings_of(args.distill), "labels": identity, **({"warm_start": True} if warm else {})},
    )


def _write(
    args: CompareArgs, results: list[Result], others: list[Result], out: Path, *, pretext: str, test: str
) -> None:
    setting = results[0].setting
    lines = [
        "# Methods compared",
        "",
        f"- **Data**: {code(setting.data)}, {setting.images:,} images, whose labels serve the probes and true labels "
        "only",
        f"- **Measured on**: {markdown(test)}",
        f"- **Network**: {code(setting.model)} at {setting.image_size} px",
        f"- **Labels and SEED's teacher from**: {pretext}; K = {setting.k:,}",
        f"- **Training**: {args.distill.epochs} epochs of all that learn labels"
        + (f", {args.seed_method.epochs} of SEED" if "seed" in args.methods else ""),
        f"- **Seeds**: {', '.join(map(str, args.seeds))}",
        f"- **Machine**: {markdown(setting.machine)}",
        "",
        "Linear-probe accuracy in percent: a linear layer per exit on the frozen network; the ensemble is the mean of "
        "the exits' softmax outputs. Networks without exits answer at the place of exit 4. Of several seeds the mean "
        "and, in brackets, the lowest and the highest. Times are those of this machine, means over the seeds.",
        "",
        *comparison_table(results),
        "",
    ]
    if changes := changes_table(results, others):
        lines += ["## One thing changed", "", "Points over plain SSSD with the same seed.", "", *changes, ""]
    drawn = [run for run in results if run.macs and run.method not in VARIANTS]
    if drawn:
        means: list[AccuracyRow] = []
        plain = {}
        for method, title in METHODS.items():
            if method in VARIANTS:
                continue  # they lie on plain SSSD's points
            runs = [run for run in results if run.method == method]
            if runs and runs[0].macs:
                columns = [mean_of(values) for values in zip(*(run.exits for run in runs), strict=True)]
                ensemble = mean_of(run.ensemble for run in runs if run.ensemble is not None)
                means.append({"name": title, "exits": columns, "ensemble": ensemble})
            elif runs:
                plain[title] = mean_of(run.exits[0] for run in runs)
        figures.accuracy_cost(means, drawn[0].macs, out / "accuracy.png", plain=plain)
        lines += ["![Accuracy against multiply-adds](accuracy.png)", ""]
    lines += paper_tables([*results, *others])
    atomic_write_text(out / "report.md", "\n".join(lines))
    atomic_write_text(out / "results.csv", results_csv([*results, *others]))
    write_json(out / "results.json", [run.as_json() for run in results])
