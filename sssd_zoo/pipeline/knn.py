"""`sssd knn`: nearest-neighbour accuracy of every exit of a frozen network."""

from dataclasses import replace
from typing import Any

from sssd_zoo.configs import KNNArgs
from sssd_zoo.distributed.hardware import tune_cpu
from sssd_zoo.evaluation.protocol import knn_features
from sssd_zoo.pipeline.linear import accuracy_table, evaluate_frozen


def knn(args: KNNArgs) -> dict[str, Any]:
    """`sssd knn`.

    Returns:
        The name of the data, in words what was measured on, and the accuracies in percent.
    """
    tune_cpu()
    _, evaluation, features = evaluate_frozen(args)
    if args.neighbours == KNNArgs.neighbours:
        args = replace(args, neighbours=min(args.neighbours, len(features.train_y)))
    accuracies = knn_features(features, args)
    print(
        f"weighted {args.neighbours}-nearest-neighbour accuracy of {args.model} in percent on {evaluation.describe()}:"
    )
    print(accuracy_table(accuracies, None))
    return {"data": evaluation.train.name, "test": evaluation.words, "exits": accuracies}
