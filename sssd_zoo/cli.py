"""The `sssd` command, and the scripts under train/ and eval/, which are its subcommands for `accelerate launch`."""

import importlib
import re
import sys
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from sssd_zoo.errors import UserError, quiet_start
from sssd_zoo.guard import fail, guarded
from sssd_zoo.ranges import problems, refuse

with quiet_start():
    from docstring_parser import parse as parse_docstring  # what jsonargparse reads the other arguments' help with
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from sssd_zoo.distributed import end_other_processes, others_tell_first, start_other_processes
    from sssd_zoo.files import expand_home
    from sssd_zoo.text import safe_terminal
    from sssd_zoo.untrusted import check_recipe

# Subcommand: the dataclass of its arguments in sssd_zoo.config, its module and function, a line for --help.
COMMANDS = {
    "fit": ("FitArgs", "fit.fit", "images in, a trained four-exit network and a report out: all steps below in turn"),
    "pretrain": ("PretrainArgs", "steps.pretrain", "MoCo v2 without labels"),
    "pseudo-label": ("PseudoLabelArgs", "steps.pseudo_label", "k-means on the pretrained network's features"),
    "distill": ("DistillArgs", "steps.distill", "a four-exit network that teaches itself on pseudo labels"),
    "seed": ("SEEDArgs", "steps.seed", "SEED, to compare with: a small network learns a frozen teacher's similarities"),
    "linear": ("LinearArgs", "evaluate.linear", "linear probes on every exit, and their ensemble"),
    "knn": ("KNNArgs", "evaluate.knn", "nearest-neighbour accuracy of every exit"),
    "compare": (
        "CompareArgs",
        "compare.compare",
        "several methods on the same images, reported beside the paper's tables",
    ),
    "early-exit": (
        "EarlyExitArgs",
        "early_exit.early_exit",
        "calibrate a network's early exit to a budget, and measure it",
    ),
    "export": (
        "ExportArgs",
        "export.export",
        "one exit, all exits or early exit's stages as ONNX, torch.export or safetensors",
    ),
    "predict": ("PredictArgs", "predict.predict", "classify image files or folders, and say which exit answered"),
    "finetune": (
        "FinetuneArgs",
        "finetune.finetune",
        "fine-tuning on a few labels: networks and fractions over several seeds, with the paper's curve",
    ),
    "detect": ("DetectArgs", "detection.detect", "Faster R-CNN on a trained trunk: boxes of VOC, COCO or `datasets`"),
    "detect-eval": ("DetectEvalArgs", "detection.detect_eval", "average precision of a trained detector"),
    "space": ("SpaceArgs", "space.space", "a page to try a network on: on this machine, or published as a Space"),
    "card": (
        "CardArgs",
        "cards.card",
        "a trained network's card, metrics, logs and half-precision weights in one folder",
    ),
    "publish": (
        "PublishArgs",
        "publish.publish",
        "a trained network, its card and figures on the Hub, loaded back to compare",
    ),
    "publish-labels": ("PublishLabelsArgs", "publish.publish_labels", "pseudo labels as a data set on the Hub"),
    "pull": ("PullArgs", "publish.pull", "a published network or labels in a folder, their sha256 checked"),
    "models": (
        "ModelsArgs",
        "networks.models",
        "the networks of this package: parameters and multiply-adds of every exit",
    ),
}
# Arguments that are given by their place after the subcommand, and how many words they take.
POSITIONAL: dict[str, dict[str, str | None]] = {
    "early-exit": {"model": None},
    "export": {"model": None},
    "predict": {"model": None, "images": "+"},
    "publish": {"run": None},
    "publish-labels": {"labels": None},
    "pull": {"name": None},
    "space": {"run": None},
}
# Arguments that are paths, or may be: a `~` in front of them is expanded, wherever they were given.
PATHS = (
    *("data", "pretrain_data", "test_data", "image_folder", "images", "out", "weights", "run", "calibrated", "also"),
    *("model", "models", "features", "teacher", "encoder", "init", "labels"),
)


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help, with ranges in words."""

    def _expand_help(self, action: Any) -> str:
        return readable(super()._expand_help(action))


def readable(text: str) -> str:
    """What jsonargparse says, with ranges in words, "int of at least 1", and without hundreds of digits."""
    text, found = re.sub(r"(\d{20})\d{20,}", r"\1...", text).replace("typing.Annotated", "Annotated"), 1
    while found:  # the innermost first
        text, found = re.subn(r"Annotated\[((?:[^][]|\[[^][]*\])*), ([^][,]*)\]", r"\1 \2", text)
    return text


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints `message` on one line and exits with status 2."""
        fail(f"{readable(message)} (see {self.prog} --help)")


def _parser(name: str, prog: str) -> Parser:
    config = importlib.import_module("sssd_zoo.config")
    parser = Parser(prog=prog, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument(
        "--config", action="config", help="Recipe: a YAML file of these arguments; later ones override it."
    )
    arguments, places = getattr(config, COMMANDS[name][0]), POSITIONAL.get(name, {})
    described = {part.arg_name: part.description for part in parse_docstring(arguments.__doc__).params}
    for place, words in places.items():
        parser.add_argument(place, nargs=words, metavar=place.upper(), help=described[place])
    parser.add_class_arguments(arguments, skip=set(places))
    return parser


def switches(config: Any, prefix: str = "--") -> set[str]:
    """The options of a dataclass, and of the dataclasses in it, that are true or false."""
    found: set[str] = set()
    for name, kind in get_type_hints(config).items():
        if is_dataclass(kind):
            found |= switches(kind, f"{prefix}{name}.")
        elif bool in (kind, *get_args(kind)):
            found.add(prefix + name)
    return found


def spell_out(arguments: list[str], config: Any) -> list[str]:
    """Writes `--resume` as `--resume true`, which is what jsonargparse understands, and `--dry-run` as `--dry_run`."""
    names, words = switches(config), []
    arguments = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in arguments]
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        words.append(word)
        if word in names and following.lower() not in ("true", "false", "yes", "no", "null"):
            words.append("true")
    return words


def expand_paths(config: Any) -> Any:
    """Expands `~` in the paths of a dataclass, and of the dataclasses in it; raises `UserError` if it is nobody's."""
    for place in fields(config):
        value = getattr(config, place.name)
        if is_dataclass(value):
            expand_paths(value)
        elif place.name in PATHS and isinstance(value, str):
            setattr(config, place.name, expand_home(value))
        elif place.name in PATHS and isinstance(value, list):
            setattr(config, place.name, [expand_home(path) for path in value])
    return config


def check_recipes(words: list[str]) -> None:
    """Raises `UserError` where `--config` is given what is large, or becomes so when it is parsed."""
    pairs = (word.split("=", 1) if "=" in word else [word, after] for word, after in pairwise([*words, ""]))
    for recipe in (value for name, value in pairs if name == "--config"):
        check_recipe(recipe)


def read_arguments(name: str, words: list[str], prog: str) -> Any:
    """The arguments of one subcommand, as its dataclass.

    Raises:
        UserError: that names all values out of their ranges.
        SystemExit: for words that are no arguments, and after the help.
    """
    config = getattr(importlib.import_module("sssd_zoo.config"), COMMANDS[name][0])
    parser = _parser(name, prog)
    words = spell_out(words, config)
    check_recipes(words)
    try:
        parsed = parser.parse_args(words)
    except (ArithmeticError, RecursionError, ValueError) as error:  # of numbers and YAML that no parser copes with
        raise UserError(f"cannot read the arguments: {error} (see {prog} --help)") from error
    refuse(problems(parsed.as_dict(), config))
    values = dict(vars(parser.instantiate(parsed)))
    values.pop("config", None)
    return expand_paths(config(**values))


@safe_terminal()
def run(name: str, arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Parses the arguments of one subcommand and runs its step; see `guarded` for how that ends.

    Args:
        name: a key of `COMMANDS`.
        arguments: without the program's name; by default those of the process.
        prog: the program's name in its help.
    """
    with guarded() as guard:
        words = sys.argv[1:] if arguments is None else arguments
        config = read_arguments(name, words, prog or Path(sys.argv[0]).name)
        guard.out = Path(config.out) if getattr(config, "out", None) else None
        module, function = COMMANDS[name][1].split(".")
        from sssd_zoo.run_folder import release_all

        step: Any = getattr(importlib.import_module(f"sssd_zoo.{module}"), function)
        others = start_other_processes()
        try:
            with guard.told(), others_tell_first():
                step(config)
        finally:
            release_all()
            end_other_processes(others, sys.exception())


@safe_terminal()
def main() -> None:
    """Entry point of the `sssd` command."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        run(arguments[0], arguments[1:], prog=f"sssd {arguments[0]}")
        return
    with guarded():
        if arguments and arguments[0] not in ("-h", "--help"):
            raise UserError(f"'{arguments[0]}' is no command of sssd; it has {', '.join(COMMANDS)}")
        width = max(map(len, COMMANDS))
        print("usage: sssd COMMAND [ARGUMENTS]    (sssd COMMAND --help lists the arguments)\n")
        print("Self-supervised self distillation: unlabelled images in, a small multi-exit network out.\n")
        for name, (_, _, line) in COMMANDS.items():
            print(f"  {name:{width}}  {line}")
        print("\nQuick start: sssd fit --data FOLDER --out RUN")


if __name__ == "__main__":
    main()
