"""Collects the mistakes of a user, so that all are told at once: told one after another, each would cost a start."""

from collections.abc import Iterator
from contextlib import contextmanager

from sssd_zoo.configs import SettingsError
from sssd_zoo.errors import UserError
from sssd_zoo.labels.pseudo_labels import OtherData


@contextmanager
def images_of_a_run(data: str | list[str] | None) -> Iterator[None]:
    """Adds to a mistake about a run's images what to do if they have moved, unless `data` says already where they are.

    Raises:
        UserError: that.
    """
    try:
        yield
    except UserError as error:
        if data is not None or isinstance(error, OtherData):
            raise
        raise UserError(
            f"the run's images cannot be read; if they have moved, say where they are by --data: {error}"
        ) from error


class Mistakes:
    """Mistakes that were noted and are still to be told.

    Attributes:
        messages: of the mistakes so far, in their order.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def noted(self, where: str = "") -> Iterator[None]:
        """Notes a mistake that the block raises, and goes on after the block; `where` goes before its message."""
        try:
            yield
        except (UserError, SettingsError) as error:
            self.note(f"{where}: {error}" if where else str(error))

    def note(self, message: str) -> None:
        """Notes a mistake, once."""
        if message not in self.messages:
            self.messages.append(message)

    def tell(self) -> None:
        """Raises `UserError` with all mistakes, if there are any."""
        if len(self.messages) > 1:
            numbered = "; ".join(f"({number}) {message}" for number, message in enumerate(self.messages, start=1))
            raise UserError(f"{len(self.messages)} mistakes: {numbered}")
        if self.messages:
            raise UserError(self.messages[0])
