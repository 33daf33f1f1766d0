"""The page of `sssd space`, served on this machine as a user would serve it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.commands import ROOT


@contextmanager
def served(network: str | Path, scratch: Path) -> Iterator[str]:
    """The address of a network's page, whose temporary files lie in `scratch`; it ends with status 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "sssd_zoo.cli", "space", str(network), "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        assert any("the page is at" in line for line in server.stdout)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()  # not as by Ctrl-C: where the tests run in the background, shells have SIGINT ignored
        server.stdout.close()
        assert server.wait(timeout=60) == 0
