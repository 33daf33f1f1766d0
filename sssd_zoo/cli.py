"""The `sssd` command, and the scripts under train/ and eval/, which are its subcommands for `accelerate launch`."""

import importlib
import os
import socket
import subprocess
import sys
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from jsonargparse import ArgumentParser

from sssd_zoo.errors import UserError

# Subcommand: the dataclass of its arguments in sssd_zoo.config, its function, a line for --help.
COMMANDS = {
    "fit": ("FitArgs", "fit", "images in, a trained four-exit network and a report out: all steps below in turn"),
    "pretrain": ("PretrainArgs", "pretrain", "MoCo v2 without labels"),
    "pseudo-label": ("PseudoLabelArgs", "pseudo_label", "k-means on the pretrained network's features"),
    "distill": ("DistillArgs", "distill", "a four-exit network that teaches itself on pseudo labels"),
    "seed": ("SEEDArgs", "seed", "SEED, to compare with: a small network learns a frozen teacher's similarities"),
    "linear": ("LinearArgs", "linear", "linear probes on every exit, and their ensemble"),
    "knn": ("KNNArgs", "knn", "nearest-neighbour accuracy of every exit"),
    "compare": (
        "CompareArgs",
        "compare",
        "several methods on the same images, reported beside the paper's tables",
    ),
    "card": ("CardArgs", "card", "a trained network's card, metrics, logs and half-precision weights in one folder"),
    "space": ("SpaceArgs", "space", "a page to try a network on: on this machine, or published as a Space"),
    "models": ("ModelsArgs", "models", "the networks of this package: parameters and multiply-adds of every exit"),
}
# Arguments that may stand first, without their names.
FIRST = {"space": "run"}


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints `message` on one line and exits with status 2."""
        fail(f"{message} (see {self.prog} --help)")


def fail(message: str) -> NoReturn:
    """Prints `error: message` on one line of stderr and exits with status 2."""
    rank = os.environ.get("RANK", "0")
    print(("" if rank == "0" else f"[process {rank}] ") + "error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def _parser(name: str, prog: str) -> Parser:
    config = importlib.import_module("sssd_zoo.config")
    parser = Parser(prog=prog, allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="Recipe: a YAML file of these arguments; later ones override it."
    )
    parser.add_class_arguments(getattr(config, COMMANDS[name][0]))
    return parser


def start_other_processes() -> list[subprocess.Popen[bytes]]:
    """Starts the processes that `accelerate launch --cpu --num_processes N` was asked for; this one is the first.

    Without MPI, Accelerate's launcher (seen in 1.15) starts a single process for `--cpu`, whatever N, which would then
    train on alone without a word. It leaves MASTER_PORT in the environment, but no rank; N stands on its command line.
    Other launchers (torchrun, MPI, Accelerate's own for GPUs) set the ranks themselves and are left alone.
    """
    ranked = {"RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & os.environ.keys()
    if ranked or "MASTER_PORT" not in os.environ or "ACCELERATE_USE_CPU" not in os.environ:
        return []
    import psutil

    words = [part for word in psutil.Process().parent().cmdline() for part in word.split("=", 1)]
    names = ("--num_processes", "--num-processes")
    asked = next((int(value) for name, value in pairwise(words) if name in names), 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(asked), "LOCAL_WORLD_SIZE": str(asked), "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(asked)]
    os.environ.update(ranks[0])
    return [subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **own}) for own in ranks[1:]]


def switches(config: Any, prefix: str = "--") -> set[str]:
    """The options of a dataclass, and of the dataclasses in it, that are true or false."""
    found: set[str] = set()
    for name, kind in get_type_hints(config).items():
        if is_dataclass(kind):
            found |= switches(kind, f"{prefix}{name}.")
        elif bool in (kind, *get_args(kind)):
            found.add(prefix + name)
    return found


def spell_out(arguments: list[str], config: Any, first: str | None = None) -> list[str]:
    """Writes `--resume` as `--resume true`, which is what jsonargparse understands, and `--dry-run` as `--dry_run`.

    Args:
        arguments: of the command line.
        config: dataclass of the options.
        first: option that a first word without a name is the value of.
    """
    names, words = switches(config), []
    if first is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    options = [word.partition("=") for word in arguments]
    arguments = [
        name.replace("-", "_").replace("__", "--", 1) + sign + value if name.startswith("--") else name + sign + value
        for name, sign, value in options
    ]
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        words.append(word)
        if word in names and following.startswith("--"):
            words.append("true")
    return words


def run(name: str, arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Parses the arguments of one subcommand and runs its step; what a user can mend exits with status 2 and a line.

    Args:
        name: a key of `COMMANDS`.
        arguments: without the program's name; by default those of the process.
        prog: the program's name in its help.
    """
    parser = _parser(name, prog or Path(sys.argv[0]).name)
    config = getattr(importlib.import_module("sssd_zoo.config"), COMMANDS[name][0])
    words = spell_out(sys.argv[1:] if arguments is None else arguments, config, FIRST.get(name))
    values = dict(vars(parser.instantiate(parser.parse_args(words))))
    values.pop("config", None)
    modules = {"fit": "sssd_zoo.fit", "card": "sssd_zoo.cards", "compare": "sssd_zoo.compare"}
    modules["space"] = "sssd_zoo.space"
    module = importlib.import_module(modules.get(name, "sssd_zoo.steps"))
    step: Any = getattr(module, COMMANDS[name][1])
    others = start_other_processes()
    try:
        step(config(**values))
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(
            "\nstopped; run the command again to go on from the last checkpoint (scripts: with --resume)",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    finally:
        for process in others:
            process.wait()


def main() -> None:
    """Entry point of the `sssd` command."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        run(arguments[0], arguments[1:], prog=f"sssd {arguments[0]}")
        return
    if arguments and arguments[0] not in ("-h", "--help"):
        fail(f"'{arguments[0]}' is no command of sssd; it has {', '.join(COMMANDS)}")
    width = max(map(len, COMMANDS))
    print("usage: sssd COMMAND [ARGUMENTS]    (sssd COMMAND --help lists the arguments)\n")
    print("Self-supervised self distillation: unlabelled images in, a small multi-exit network out.\n")
    for name, (_, _, line) in COMMANDS.items():
        print(f"  {name:{width}}  {line}")
    print("\nQuick start: sssd fit --data FOLDER --out RUN")


if __name__ == "__main__":
    main()
