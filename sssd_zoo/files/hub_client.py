"""Gives up on a Hub that does not answer: huggingface_hub itself has no time limit for most requests.

Where it has one, it is per attempt, of up to six, which takes more than a minute in all. Here the waiting times of the
attempts add up until the Hub answers. Slow or long transfers are never cut off: only time in which not a single byte
arrives counts.
"""

import importlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import _http  # the current factory has no public name

PATIENCE = 30.0  # seconds of silence
CONNECT = 5.0  # seconds to connect to one address; a host has several
# The same for transfers by Xet, whose client is not written in Python and reads these variables.
XET = {
    "HF_XET_CLIENT_READ_TIMEOUT": "10s",
    "HF_XET_CLIENT_CONNECT_TIMEOUT": "5s",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "30s",
}
http: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])  # httpx or httpx2, as huggingface_hub's


class SilentHubError(RuntimeError):
    """The Hub has not answered for `PATIENCE` seconds. huggingface_hub does not retry after this type of error."""


class _Silence(threading.local):
    seconds = 0.0  # of the attempts of this thread, since the Hub last said something


_silence = _Silence()


@contextmanager
def limited_waiting() -> Iterator[None]:
    """Makes huggingface_hub give up on an unresponsive Hub within the block.

    Raises:
        SilentHubError: from any request to the Hub within the block.
    """
    before = _http._GLOBAL_CLIENT_FACTORY
    if getattr(before, "limited", False):
        yield
        return

    def factory() -> Any:
        return _limited(before())

    factory.limited = True  # type: ignore[attr-defined]
    for name, value in XET.items():
        os.environ.setdefault(name, value)
    _silence.seconds = 0
    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)


def _limited(client: Any) -> Any:
    """The client, with time limits for every request that it sends."""
    send = client.send

    def limited(request: Any, **kwargs: Any) -> Any:
        asked, left = request.extensions.get("timeout") or {}, PATIENCE - _silence.seconds
        limits = {kind: min(left, asked.get(kind) or left) for kind in ("connect", "read", "write", "pool")}
        limits["connect"] = min(limits["connect"], CONNECT)
        request.extensions["timeout"] = limits
        began = time.monotonic()
        try:
            response = send(request, **kwargs)
        except http.TimeoutException as error:
            # Each of several addresses has its own time; a stalled upload counts only from when it stalled.
            _waited(error, time.monotonic() - began if isinstance(error, http.ConnectTimeout) else None, limits)
            raise
        if kwargs.get("stream") and response.is_success:
            response.stream = _Listened(response.stream, limits)  # headers alone do not count as progress
        else:
            _silence.seconds = 0
        return response

    client.send = limited
    return client


def _waited(error: Exception, seconds: float | None, limits: dict[str, float]) -> None:
    """Adds a time-out to the time without an answer, and raises `SilentHubError` if that is too long."""
    kind = type(error).__name__.removesuffix("Timeout").lower()
    _silence.seconds += limits.get(kind, PATIENCE) if seconds is None else seconds
    if _silence.seconds > 0.9 * PATIENCE:
        _silence.seconds = 0
        raise SilentHubError(f"the Hub has not answered for {PATIENCE:.0f} seconds") from error


class _Listened(http.SyncByteStream):  # type: ignore[misc]
    """A response body that resets the time without an answer with every chunk."""

    def __init__(self, stream: Any, limits: dict[str, float]) -> None:
        self.stream, self.limits = stream, limits

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self.stream:
                _silence.seconds = 0
                yield chunk
        except http.TimeoutException as error:
            _waited(error, None, self.limits)
            raise

    def close(self) -> None:
        self.stream.close()
