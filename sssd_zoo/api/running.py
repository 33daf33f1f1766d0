"""Runs a command within somebody's program: nothing of that is changed, and no error ends it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from sssd_zoo.api.settings import settings_of
from sssd_zoo.cli.commands import COMPLETED
from sssd_zoo.configs.ranges import SettingsError
from sssd_zoo.cpus import set_up_openmp
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import safe_terminal

SOURCES = ("data", "pretrain_data")  # arguments that may be objects


def run(command: str, main: Mapping[str, Any], settings: Mapping[str, Any], *, function: str | None = None) -> Any:
    """Runs a command.

    Args:
        command: its name, a key of `COMMANDS`.
        main: its arguments that the function names; those that are None or False are as by default.
        settings: the other ones.
        function: of the command's module, where it is not that of its name.

    Returns:
        Its arguments, and what its function returned.

    Raises:
        UserError: for what the user can fix.
    """
    given = {name: value for name, value in main.items() if value is not None and value is not False}
    if twice := sorted(given.keys() & settings.keys()):
        raise UserError(f"sssd_zoo.{command.replace('-', '_')}: {twice[0]} is given twice: give it once")
    with in_process():
        values = {**given, **settings}
        for name in SOURCES:
            if name in values:
                values[name] = source(values[name])
        args, names = settings_of(command, values)
        module = command.replace("-", "_")
        action: Any = getattr(import_module(f"sssd_zoo.pipeline.{module}"), function or module)
        with kept_torch():
            return args, (action(args, names) if command in COMPLETED else action(args))


@contextmanager
def in_process() -> Iterator[None]:
    """The block's mistakes are `UserError`, and at its end, however that comes, no folder is locked."""
    set_up_openmp()
    from sssd_zoo.files.run_folder import release_all

    with safe_terminal():
        try:
            yield
        except SettingsError as error:
            raise UserError(str(error)) from error
        finally:
            release_all()


@contextmanager
def kept_torch() -> Iterator[None]:
    """What a command sets for its whole process is afterwards as before: random numbers, threads and precision."""
    import torch

    threads, precision, state = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        torch.set_float32_matmul_precision(precision)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def is_name(value: Any) -> bool:
    """Whether a value names data, rather than being it."""
    return isinstance(value, (str, os.PathLike))


def source(data: Any) -> Any:
    """Data as the commands take them: names as text, an object or a list of images as the folder that it is stored in.

    Raises:
        UserError: if it is no data.
    """
    if is_name(data):
        return os.fspath(data)
    from sssd_zoo.data.objects import stored
    from sssd_zoo.data.sources import holds_images

    if isinstance(data, (list, tuple)) and data and all(map(is_name, data)):
        names = [os.fspath(name) for name in data]
        if any(map(holds_images, names)):
            return names
    return stored(data)
