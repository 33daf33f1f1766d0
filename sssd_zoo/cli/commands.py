"""The commands of `sssd`: what each is called, the dataclass of its arguments, and a line for the help.

A command's code is the function of its name in the module of its name: `sssd pseudo-label` is
`sssd_zoo.pipeline.pseudo_label.pseudo_label`.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """One command.

    Attributes:
        arguments: name of a dataclass in `sssd_zoo.configs`.
        summary: a line for `sssd --help`.
        positional: arguments that are given by their place, and how many words each takes.
    """

    arguments: str
    summary: str
    positional: tuple[tuple[str, str | None], ...] = ()


MODEL = (("model", None),)
COMMANDS = {
    "fit": Command("FitArgs", "images in, a trained four-exit network and a report out: all steps below in turn"),
    "pretrain": Command("PretrainArgs", "MoCo v2 without labels"),
    "pseudo-label": Command("PseudoLabelArgs", "k-means on the pretrained network's features"),
    "distill": Command("DistillArgs", "self distillation of a four-exit network on pseudo labels"),
    "seed": Command("SEEDArgs", "SEED, a baseline: a small network learns a frozen teacher's similarities"),
    "linear": Command("LinearArgs", "linear probes on every exit, and their ensemble"),
    "knn": Command("KNNArgs", "nearest-neighbour accuracy of every exit"),
    "compare": Command("CompareArgs", "several methods on the same images, reported beside the paper's tables"),
    "early-exit": Command("EarlyExitArgs", "calibrate a network's early exit to a budget, and measure it", MODEL),
    "export": Command(
        "ExportArgs", "one exit, all exits or the stages of early exit as ONNX, torch.export or safetensors", MODEL
    ),
    "predict": Command(
        "PredictArgs", "classify image files or folders, and say which exit answered", (*MODEL, ("images", "+"))
    ),
    "finetune": Command("FinetuneArgs", "fine-tuning on a few labels, over several networks, fractions and seeds"),
    "detect": Command("DetectArgs", "Faster R-CNN on a trained trunk: boxes of VOC, COCO or `datasets`"),
    "detect-eval": Command("DetectEvalArgs", "average precision of a trained detector"),
    "space": Command(
        "SpaceArgs", "a page to try a network on: on this machine, or published as a Space", (("run", None),)
    ),
    "card": Command("CardArgs", "a trained network's card, metrics, logs and half-precision weights in one folder"),
    "publish": Command(
        "PublishArgs", "a trained network, its card and figures on the Hub, loaded back to compare", (("run", None),)
    ),
    "publish-labels": Command("PublishLabelsArgs", "pseudo labels as a data set on the Hub", (("labels", None),)),
    "pull": Command("PullArgs", "a published network or labels in a folder, their sha256 checked", (("name", None),)),
    "models": Command("ModelsArgs", "the networks of this package: parameters and MACs of every exit"),
}
