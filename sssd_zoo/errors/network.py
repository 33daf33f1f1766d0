"""Tells errors of a lost connection from others: every HTTP client has types of its own."""

from typing import Any

from sssd_zoo.errors import causes

_CLIENTS = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}


def lost_connection(error: BaseException) -> str | None:
    """What an error, or one behind it, says of a lost connection, in at most 200 characters; None for all others."""
    cause = next(filter(_of_connection, causes(error)), None)
    return None if cause is None else (" ".join(str(cause).split()) or type(cause).__name__)[:200]


def _of_connection(error: BaseException) -> bool:
    """Whether it is an error of a connection; a server's refusal, such as of an expired login, is none."""
    response: Any = getattr(error, "response", None)
    status = getattr(error, "status", None) if response is None else response.status_code  # aiohttp's has its own
    if isinstance(status, int):
        return status == 429 or status >= 500
    clients = {kind.__module__.partition(".")[0] for kind in type(error).__mro__} & _CLIENTS
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(clients)
