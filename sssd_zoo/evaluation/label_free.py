"""How good embeddings are, without labels: figures of features that a subset of the images gives.

Features [N, D] are pooled ones, before any projector. How far each figure goes with the accuracy of linear probes was
measured: see hub_cards/reports/label-free-cifar10.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from sssd_zoo.evaluation.knn import knn
from sssd_zoo.models import ensemble_logits

AMONG = 500  # images that an image's other view is looked for among
ROWS = 512  # compared with all others in one go
NEIGHBOURS = 20  # of the vote where there are labels
CLUSTERS = 40  # of k-means, or fewer, so that they have
MEMBERS = 20  # images on average
COLLAPSED = 0.1  # `std` below which embeddings have collapsed: those of new weights have more


def effective_rank(features: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values, which are made to sum to 1.

    Garrido et al. 2023, arXiv:2210.02885, equation 1.

    Args:
        features: float32 [N, D].

    Returns:
        1 (all on one line through the origin) to min(N, D); 1 also for features that are all zero.
    """
    rows = features.double()
    gram = rows.T @ rows if rows.shape[1] <= rows.shape[0] else rows @ rows.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    fractions = values / values.sum().clamp_min(1e-300) + 1e-7
    return float(torch.exp(-(fractions * fractions.log()).sum()).clamp_min(1))


def embedding_std(features: Tensor) -> float:
    """The mean std of the dimensions of embeddings of unit length, times sqrt(D).

    Chen and He 2021 (SimSiam, arXiv:2011.10566, section 4.1) watch it for collapse.

    Args:
        features: float32 [N, D].

    Returns:
        0 if all embeddings are the same, about 1 if they point anywhere.
    """
    return float(unit(features).std(0, correction=0).mean() * features.shape[1] ** 0.5)


def uniformity(features: Tensor) -> float:
    """The log of the mean of exp(-2 ||x - y||^2) over pairs of different embeddings of unit length.

    Wang and Isola 2020, arXiv:2005.10242, equation 2 with t = 2.

    Args:
        features: float32 [N, D], N at least 2.

    Returns:
        0 if all embeddings are the same; the lower, the more evenly they are spread, about -4 at the lowest.
    """
    rows = unit(features)
    squares = rows.square().sum(1)  # 1, but 0 of an embedding that is all zeros
    total = 0.0
    for part, own in zip(rows.split(ROWS), squares.split(ROWS), strict=True):
        distances = own[:, None] + squares - 2 * part @ rows.T  # squared
        total += float((-2 * distances).exp().double().sum())
    pairs = len(rows) * (len(rows) - 1)
    same = len(rows)  # of each with itself
    return float(torch.tensor((total - same) / pairs, dtype=torch.float64).log())


def alignment(first: Tensor, second: Tensor) -> float:
    """The mean squared distance of the embeddings, of unit length, of two views of an image.

    Wang and Isola 2020, arXiv:2005.10242, equation 1 with alpha = 2.

    Args:
        first: float32 [N, D].
        second: float32 [N, D], of the same images.

    Returns:
        0 if the views have the same embedding, up to 4.
    """
    return float((unit(first) - unit(second)).square().sum(1).mean())


def two_view_consistency(first: Tensor, second: Tensor) -> float:
    """How often an image finds its own other view: the fraction whose nearest one among `AMONG` images is its own.

    Args:
        first: float32 [N, D]: what looks.
        second: float32 [N, D]: what is looked among, in runs of `AMONG` images; a last run that is shorter is left out
            unless it is the only one, so that the figure does not depend on N.

    Returns:
        0..1; by chance 1 / `AMONG`.
    """
    hits = count = 0
    for queries, views in zip(unit(first).split(AMONG), unit(second).split(AMONG), strict=True):
        if count and len(queries) < AMONG:
            break
        # Embeddings that are all the same find nothing: the nearest must be nearer than the others.
        similarity = queries @ views.T
        own = similarity.diagonal().clone()
        similarity.fill_diagonal_(-torch.inf)
        hits += int((own > similarity.amax(1)).sum())
        count += len(queries)
    return hits / count


def exit_agreement(logits: Tensor) -> dict[str, float]:
    """How often exits answer alike.

    Args:
        logits: float32 [E, N, C].

    Returns:
        Fractions of the images in 0..1: `exit_agreement_1` and so on, for which that exit gives the ensemble's answer;
        and `exits_unanimous`, for which all exits give the same.
    """
    answers, ensemble = logits.argmax(2), ensemble_logits(list(logits)).argmax(1)
    agreement = (answers == ensemble).double().mean(1).tolist()
    figures = {f"exit_agreement_{number}": value for number, value in enumerate(agreement, start=1)}
    return {**figures, "exits_unanimous": float((answers == answers[:1]).all(0).double().mean())}


def cluster_stability(features: Tensor, seed: int) -> dict[str, float]:
    """How far k-means of two seeds agrees on the clusters of features of unit length.

    Args:
        features: float32 [N, D], N at least 2.
        seed: of the first run; the second takes the next.

    Returns:
        `cluster_stability`, the adjusted Rand index of the two clusterings (1 if they are the same, about 0 by chance),
        and `cluster_stability_nmi`, their normalised mutual information (0..1); nothing where there are fewer different
        features than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    rows = unit(features).cpu().numpy()
    clusters = max(2, min(CLUSTERS, len(rows) // MEMBERS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            first, second = (
                KMeans(clusters, n_init=1, max_iter=50, random_state=(seed + run) % 2**32).fit(rows).labels_
                for run in range(2)
            )
        except ConvergenceWarning:
            return {}
    return {
        "cluster_stability": float(adjusted_rand_score(first, second)),
        "cluster_stability_nmi": float(normalized_mutual_info_score(first, second)),
    }


def neighbour_accuracy(features: Tensor, labels: Tensor) -> float | None:
    """Weighted kNN accuracy in percent on a fifth of the rows by the others, of the classes that the others have.

    Args:
        features: float32 [N, D].
        labels: int64 [N].

    Returns:
        0..100, or None where the fifth has no row of such a class.
    """
    test = max(1, len(features) // 5)
    classes, train_y = labels[test:].unique(return_inverse=True)
    known = torch.isin(labels[:test], classes)
    if not known.any():
        return None
    return knn(
        features[test:],
        train_y,
        features[:test][known],
        torch.searchsorted(classes, labels[:test][known]),
        num_classes=len(classes),
        neighbours=min(NEIGHBOURS, len(train_y)),
        temperature=0.1,
    )


def unit(features: Tensor) -> Tensor:
    """Rows of unit length; a row of zeros stays zero."""
    return F.normalize(features.float(), dim=1)


def embedding_figures(plain: Tensor, first: Tensor, second: Tensor) -> dict[str, float]:
    """All figures of the features of one exit, each float32 [N, D].

    Args:
        plain: of the images as they are.
        first: of a view of each image.
        second: of another view of each.
    """
    return {
        "rank_me": effective_rank(plain),
        "std": embedding_std(plain),
        "uniformity": uniformity(plain),
        "alignment": alignment(first, second),
        "two_view_consistency": two_view_consistency(first, second),
    }


def collapse_warning(figures: dict[str, float], what: str) -> str | None:
    """A line of warning where embeddings have collapsed, or None."""
    if figures["std"] >= COLLAPSED:
        return None
    return (
        f"warning: the embeddings of {what} have collapsed (std {figures['std']:.3f}, where 0 means that all images "
        "look the same to it): train with a lower lr or another seed"
    )
