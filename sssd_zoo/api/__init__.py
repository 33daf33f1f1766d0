"""The commands as functions of Python: `import sssd_zoo; run = sssd_zoo.fit("FOLDER", out="RUN")`.

`sssd_zoo` itself has the functions, and imports them when they are first named. Each runs what the command of its name
runs, with the same defaults, numbers and errors, and returns an object that says what was written and measured.

- the main arguments have names of their own; None stands for the command's default
- every other one of `sssd COMMAND --help` is a keyword, nested ones as mappings or with dots: `pretrain={"epochs": 5}`,
  `**{"pretrain.epochs": 5}`
- a mistake raises `sssd_zoo.errors.UserError`, a ValueError, of one line; a misspelt name is answered by the nearest
- data are a folder, a Hub id or whatever else the commands take, several of them in a list, or an object: a
  `datasets.Dataset`, a torch `Dataset` or a list of images (`sssd_zoo.data.objects`)
- what a function returns may be given to the next, as its path: `sssd_zoo.embed(run, data, out="features.parquet")`
- Ctrl-C (in a notebook, interrupting the kernel) leaves a run that the same call resumes
"""

from sssd_zoo.api.functions import (
    distill,
    early_exit,
    embed,
    export,
    finetune,
    fit,
    knn,
    linear,
    predict,
    pretrain,
    pseudo_label,
)
from sssd_zoo.api.results import (
    Accuracy,
    EarlyExit,
    Embeddings,
    Export,
    FineTuning,
    Prediction,
    PseudoLabels,
    Result,
    Run,
    Training,
)

__all__ = [
    "Accuracy",
    "EarlyExit",
    "Embeddings",
    "Export",
    "FineTuning",
    "Prediction",
    "PseudoLabels",
    "Result",
    "Run",
    "Training",
    "distill",
    "early_exit",
    "embed",
    "export",
    "finetune",
    "fit",
    "knn",
    "linear",
    "predict",
    "pretrain",
    "pseudo_label",
]
