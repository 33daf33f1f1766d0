"""The `sssd` command, and the scripts under train/ and eval/, which are its subcommands for `accelerate launch`.

What is imported here is small: torch and timm take seconds, and the help and mistakes are to be told at once.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from sssd_zoo.cli.commands import COMMANDS, COMPLETED, RESUMING
from sssd_zoo.cli.guard import guarded
from sssd_zoo.cpus import set_up_openmp
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import safe_terminal


@safe_terminal()
def run(name: str, arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Parses the arguments of one command and runs it; see `guarded` for how that ends.

    Args:
        name: a key of `COMMANDS`.
        arguments: without the program's name; by default those of the process.
        prog: the program's name in its help.
    """
    with guarded() as guard:
        set_up_openmp()
        from sssd_zoo.cli.arguments import read_arguments

        words = sys.argv[1:] if arguments is None else arguments
        config, given = read_arguments(name, words, prog or Path(sys.argv[0]).name)
        guard.out = Path(config.out) if getattr(config, "out", None) else None
        if name in RESUMING or hasattr(config, "resume"):
            guard.again += " to resume" if name in RESUMING else " with --resume to resume"

        from sssd_zoo.distributed.launch import end_other_processes, others_tell_first, start_other_processes
        from sssd_zoo.files.run_folder import release_all

        function = name.replace("-", "_")
        command: Any = getattr(import_module(f"sssd_zoo.pipeline.{function}"), function)
        others = start_other_processes()
        try:
            with guard.told(), others_tell_first():
                command(config, given) if name in COMPLETED else command(config)
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
        if arguments and arguments[0] in ("-V", "--version"):
            from sssd_zoo import __version__

            print(f"sssd-zoo {__version__}")
        elif arguments and arguments[0] not in ("-h", "--help"):
            from sssd_zoo.cli.arguments import did_you_mean

            meant = did_you_mean([arguments[0]], list(COMMANDS))
            raise UserError(
                f"'{arguments[0]}' is not a command of sssd{meant or '; its commands: ' + ', '.join(COMMANDS)}"
            )
        else:
            print_help()


def print_help() -> None:
    """What `sssd --help` says."""
    width = max(map(len, COMMANDS))
    print("usage: sssd COMMAND [ARGUMENTS]    (sssd COMMAND --help lists the arguments)\n")
    print("Turns unlabelled images into a small, fast multi-exit network by self-supervised self distillation.\n")
    for name, command in COMMANDS.items():
        print(f"  {name:{width}}  {command.summary}")
    print("\nQuick start: sssd fit --data FOLDER --out RUN")
