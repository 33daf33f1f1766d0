"""`sssd linear`: linear probes on every exit of a frozen network."""

from typing import Any

from sssd_zoo.configs import DataConfig, ForwardConfig, KNNArgs, LinearArgs, ProbeConfig
from sssd_zoo.data.inputs import input_spec, storage_default
from sssd_zoo.data.loading import load_images
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.evaluation.protocol import (
    Evaluation,
    Features,
    evaluation_data,
    evaluation_features,
    probe_features,
    put_heads,
)
from sssd_zoo.files import write_json
from sssd_zoo.files.run_folder import atomic_dir, open_out
from sssd_zoo.models.backbones import architecture_of
from sssd_zoo.models.networks import config_for, load_network
from sssd_zoo.models.saving import save_network
from sssd_zoo.training.runs import save_config


def accuracy_table(exits: list[float], ensemble: float | None) -> str:
    """Accuracies in percent, as lines for a terminal."""
    names = [f"exit {number}" for number in range(1, len(exits) + 1)] if len(exits) > 1 else ["accuracy"]
    lines = [f"  {name:9} {value:6.2f}" for name, value in zip(names, exits, strict=True)]
    if ensemble is not None and len(exits) > 1:
        lines.append(f"  {'ensemble':9} {ensemble:6.2f}")
    return "\n".join(lines)


def evaluate_frozen(args: LinearArgs | KNNArgs) -> tuple[Any, Evaluation, Features]:
    """The network to measure, what it is measured on, and its features of those images."""
    model = load_network(args.model)
    config = config_for(args.model, model, DataConfig.of(args))
    data = load_images(config, default_size=storage_default(input_spec(model).size), require_labels=True)
    evaluation = evaluation_data(data, config, test_split=args.test_split, holdout=args.holdout, seed=args.seed)
    return model, evaluation, evaluation_features(model, evaluation, ForwardConfig.of(args))


def linear(args: LinearArgs) -> dict[str, Any]:
    """`sssd linear`.

    Returns:
        What metrics.json has.
    """
    tune_cpu()
    out = None if args.out is None else open_out(args, "probe")
    model, evaluation, features = evaluate_frozen(args)
    probe = probe_features(features, ProbeConfig.of(args), args.seed)
    print(f"linear probes on {args.model}, accuracy in percent on {evaluation.describe()}:")
    print(accuracy_table(probe.exits, probe.ensemble))
    metrics = {
        "data": evaluation.train.name,
        "test": evaluation.words,
        "seed": args.seed,
        "exits": probe.exits,
        "ensemble": probe.ensemble,
    }
    if out is not None:
        put_heads(model, probe, evaluation.train)
        with atomic_dir(out, "probe") as temporary:
            save_config(temporary, args)
            save_network(temporary, model, architecture_of(model), label_names=evaluation.train.class_names)
            write_json(temporary / "metrics.json", metrics)
        print(f"the network with the probes as its heads is in {out}")
    return metrics
