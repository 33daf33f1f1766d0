"""The commands of `sssd`: their names, the dataclasses of their arguments, and a line of help for each.

A command's code is the function of its name in the module of its name: `sssd pseudo-label` is
`sssd_zoo.pipeline.pseudo_label.pseudo_label`.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """One command.

    Attributes:
        arguments: name of a dataclass in `sssd_zoo.configs`.
        summary: a line for `sssd --help`.
        positional: positional arguments, and argparse's `nargs` of each.
        network: the argument that names the network, which may be given by its flag or as the first word.
    """

    arguments: str
    summary: str
    positional: tuple[tuple[str, str | None], ...] = ()
    network: str | None = None


MODEL = (("model", None),)
RUN = (("run", None),)
COMMANDS = {
    "fit": Command("FitArgs", "the whole pipeline: images in, a trained four-exit network and a report out"),
    "pretrain": Command("PretrainArgs", "pretrain a network without labels by MoCo v2"),
    "pseudo-label": Command(
        "PseudoLabelArgs", "cluster the pretrained network's features by k-means into pseudo labels"
    ),
    "distill": Command("DistillArgs", "train a four-exit network on pseudo labels by self distillation"),
    "seed": Command("SEEDArgs", "distil a frozen teacher into a small network by SEED, a baseline"),
    "linear": Command("LinearArgs", "measure every exit and their ensemble by linear probes", network="model"),
    "knn": Command("KNNArgs", "measure every exit by k-nearest-neighbour classification", network="model"),
    "quality": Command("QualityArgs", "measure without labels how good a network is for your images", MODEL),
    "compare": Command("CompareArgs", "compare several methods on the same images, beside the paper's results"),
    "early-exit": Command(
        "EarlyExitArgs", "calibrate early exit to a budget of accuracy, MACs or latency, and measure it", MODEL
    ),
    "export": Command(
        "ExportArgs",
        "export a network, an exit or early-exit stages: ONNX, torch.export, safetensors, timm, transformers",
        MODEL,
    ),
    "predict": Command(
        "PredictArgs", "classify image files or folders, and report which exit answered", (*MODEL, ("images", "+"))
    ),
    "report": Command(
        "ReportArgs", "write report.html of a run: its results, and its clusters to look at and name", RUN
    ),
    "rename": Command(
        "RenameArgs", "name the clusters that a network predicts, and merge them", (*MODEL, ("names", None))
    ),
    "embed": Command("EmbedArgs", "write the features of images into a parquet, CSV or .npy file", MODEL),
    "search": Command(
        "SearchArgs",
        "find the images nearest to a query in a file of `sssd embed`",
        (*MODEL, ("index", None), ("images", "+")),
    ),
    "clusters": Command("ClustersArgs", "copy or link a run's images into a folder per cluster", (("run", None),)),
    "finetune": Command("FinetuneArgs", "fine-tune networks on a few labels, over several label fractions and seeds"),
    "detect": Command("DetectArgs", "train Faster R-CNN on a trained trunk, on boxes from VOC, COCO or `datasets`"),
    "detect-eval": Command("DetectEvalArgs", "measure the average precision of a trained detector", network="model"),
    "space": Command("SpaceArgs", "serve a page to try a network on, or publish it as a Space", (("run", None),)),
    "card": Command(
        "CardArgs",
        "collect a trained network's card, metrics, logs and half-precision weights in a folder",
        network="run",
    ),
    "publish": Command(
        "PublishArgs", "publish a trained network with its card on the Hub, and verify it", (("run", None),)
    ),
    "publish-labels": Command(
        "PublishLabelsArgs", "publish pseudo labels as a data set on the Hub", (("labels", None),)
    ),
    "pull": Command(
        "PullArgs", "download a published network or pseudo labels, and verify their sha256", (("name", None),)
    ),
    "clean": Command(
        "CleanArgs", "remove the checkpoints and caches that a finished run no longer needs", (("run", None),)
    ),
    "models": Command("ModelsArgs", "list the networks of this package with parameters and MACs of every exit"),
}

# Commands that choose settings by the data: they are told which were given.
COMPLETED = ("fit",)

# Commands that resume when they are run again; others do with --resume, or have nothing to resume.
RESUMING = ("fit", "compare", "finetune", "embed")
