"""What the figures of quality without labels mean, for reports, curves and terminals."""

from typing import NamedTuple

TOO_FEW = 1_000  # images that a network may learn by heart, so that figures of the same images flatter it: a guess


class Meaning(NamedTuple):
    """Of one figure.

    Attributes:
        title: what it is called.
        words: what it says.
        better: which direction is good.
        digits: after the point.
    """

    title: str
    words: str
    better: str
    digits: int = 3


MEANINGS = {
    "two_view_consistency": Meaning(
        "two-view consistency",
        "how often an image, cropped and coloured at random, finds its own other view among at most 500, 0 to 1",
        "higher is better",
    ),
    "rank_me": Meaning(
        "effective rank (RankMe)",
        "how many dimensions the features use, from 1 to their number; compare networks of one width only, and "
        "not with new weights, which use many",
        "higher is better",
        1,
    ),
    "std": Meaning(
        "std of the embeddings",
        "0 if all images look the same to the network (collapse), about 1 if embeddings point anywhere",
        "near 0 is bad, more says little",
    ),
    "uniformity": Meaning(
        "uniformity", "how evenly embeddings are spread: 0 if all are the same, down to about -4", "lower is better"
    ),
    "alignment": Meaning(
        "alignment",
        "how far the embeddings of two views of an image are apart, 0 to 4; also low after a collapse",
        "lower is better",
    ),
    "cluster_stability": Meaning(
        "cluster stability (ARI)",
        "how far two runs of k-means from different seeds find the same clusters: 1 the same, 0 chance",
        "higher means clusters to rely on, not better features: poor ones, which cluster by colour, had more",
    ),
    "cluster_stability_nmi": Meaning(
        "cluster stability (NMI)", "the same by normalised mutual information, 0 to 1", "as for the ARI"
    ),
    "knn": Meaning("weighted kNN", "accuracy in percent by the labels of the 20 nearest images", "higher is better", 2),
}
AGREEMENT = {
    **{
        f"exit_agreement_{number}": Meaning(
            f"agreement of exit {number}",
            "fraction of images for which it answers as the ensemble does",
            "higher is better",
        )
        for number in range(1, 5)
    },
    "exits_unanimous": Meaning(
        "unanimous exits", "fraction of images for which all exits give the same answer", "higher is better"
    ),
}
