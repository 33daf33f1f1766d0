"""What strangers can do: visitors of the page, authors of a config.json, a Hub that is silent, files that are links."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image

SHIPPED = "sssd_resnet18_cifar.cifar10"


def picture(colour: tuple[int, int, int], side: int = 32) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Visitor:
    """One who speaks to the page as a browser does, over HTTP.

    Args:
        address: of the page.
        session: as a browser makes one up.
    """

    def __init__(self, address: str, session: str) -> None:
        httpx = pytest.importorskip("httpx", reason="gradio is not installed")
        self.client = httpx.Client(base_url=address, timeout=60, trust_env=False)
        self.session = session
        self.config = self.client.get("/config").json()
        self.functions = {each.get("api_name"): each["id"] for each in self.config["dependencies"]}

    def upload(self, content: bytes, name: str = "image.png") -> str:
        answer = self.client.post("/gradio_api/upload", files={"files": (name, content)})
        assert answer.status_code == 200, answer.text
        [path] = answer.json()
        return str(path)

    def ask(self, data: list[Any], function: str = "look_1") -> dict[str, Any]:
        """What the page answers, as the event 'process_completed' has it."""
        body = {"data": data, "fn_index": self.functions[function], "session_hash": self.session, "trigger_id": 5}
        joined = self.client.post("/gradio_api/queue/join", json={**body, "event_data": None})
        assert joined.status_code == 200, joined.text
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:") and '"process_completed"' in line:
                    done: dict[str, Any] = json.loads(line[5:])
                    return done
        raise AssertionError("the page closed the stream")

    def look(self, file: Any, use_own: Any = False, threshold: Any = 0.5) -> tuple[bool, str]:
        """Whether the page analysed a file, and all that it said."""
        answer = self.ask([file, use_own, threshold])
        return bool(answer["success"]), json.dumps(answer)


def file_data(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `sssd space` shows the page of the bundled weights."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    scratch = tmp_path_factory.mktemp("scratch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "sssd_zoo.cli", "space", SHIPPED, "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        assert any("the page is at" in line for line in server.stdout)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.stdout.close()
        server.wait(timeout=60)


def test_the_page_analyses_what_its_visitor_uploaded(address):
    visitor = Visitor(address, "mine")
    path = visitor.upload(picture((9, 200, 9)))
    for file in (file_data(path), {"path": path}, file_data(path)):
        done, said = visitor.look(file)
        assert done, said
        assert "Leaves at" in said or "Goes to" in said
    initial = next(each for each in visitor.config["components"] if each["type"] == "image")["props"]["value"]
    assert visitor.look(initial)[0]
    assert visitor.client.get(f"/gradio_api/file={initial['path']}").status_code == 200


@pytest.mark.parametrize("meta", [True, False], ids=["with meta", "without meta"])
def test_the_page_opens_no_other_file(meta, address, tmp_path):
    visitor = Visitor(address, f"curious-{meta}")
    mine = visitor.upload(picture((1, 2, 3)))
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture((200, 9, 9)))
    link = Path(mine).parent / f"link-{meta}.png"
    link.symlink_to(secret)
    beside = Path(mine).parent / f"beside-{meta}.png"
    beside.write_bytes(picture((5, 5, 5)))
    wanted = [secret, "/etc/passwd", "/dev/zero", link, beside, Path(mine).parent, f"{mine}/../link-{meta}.png"]
    wanted += ["http://127.0.0.1:9/x.png", f"file://{secret}", "", "\0", ".", None]
    for path in map(str, wanted):
        done, said = visitor.look(file_data(path) if meta else {"path": path})
        assert not done, path
        assert str(tmp_path) not in said
        assert "Traceback" not in said
    for file in ("/etc/passwd", [mine], 5, {}, {"path": [mine]}, {"path": None}):
        assert not visitor.look(file)[0], file
    assert visitor.look(file_data(mine))[0]


def test_the_page_keeps_visitors_apart(address):
    first, second = Visitor(address, "first"), Visitor(address, "second")
    image = picture((77, 7, 7))
    path = first.upload(image)
    assert first.look(file_data(path))[0]
    assert not second.look(file_data(path))[0]
    assert second.upload(image) == path  # the same bytes
    assert second.look(file_data(path))[0]
    assert not Visitor(address, "third").look(file_data(path))[0]


def test_the_page_serves_no_file_of_the_server(address):
    visitor = Visitor(address, "reader")
    paths = ["/etc/passwd", str(ROOT / "pyproject.toml"), *map(str, Path("/proc/self").glob("environ"))]
    for path in paths:
        assert visitor.client.get(f"/gradio_api/file={path}").status_code in (403, 404), path
    text = json.dumps(visitor.config)
    assert "sssd-space-" not in text  # where the page's folder lies


def test_what_is_posted_to_the_page_has_limits(address):
    visitor = Visitor(address, "large")
    big = os.urandom(21_000_000)
    assert visitor.client.post("/gradio_api/upload", files={"files": ("a.png", big)}).status_code == 413
    many = [("files", (f"{number}.png", big[:3_000_000])) for number in range(9)]
    assert visitor.client.post("/gradio_api/upload", files=many).status_code == 413
    body = {"data": [{"path": "x" * 21_000_000}, False, 0.5], "fn_index": 0, "session_hash": "large"}
    assert visitor.client.post("/gradio_api/queue/join", json=body).status_code == 413

    def chunks() -> Iterator[bytes]:  # of no announced length
        for _ in range(30):
            yield b"x" * 1_000_000

    assert visitor.client.post("/gradio_api/queue/join", content=chunks()).status_code == 413


def test_the_page_refuses_large_pictures_and_says_so(address):
    visitor = Visitor(address, "bomb")
    buffer = io.BytesIO()
    Image.new("1", (8_000, 8_000)).save(buffer, "PNG")
    done, said = visitor.look(file_data(visitor.upload(buffer.getvalue())))
    assert done
    assert "8000 x 8000 pixels" in said
    done, said = visitor.look(file_data(visitor.upload(b"<script>alert(1)</script>", "a<b>.png")))
    assert done
    assert "cannot be read as an image" in said
    assert "<script>" not in said


def test_the_page_refuses_thresholds_that_are_none(address):
    visitor = Visitor(address, "numbers")
    path = visitor.upload(picture((4, 4, 4)))
    for threshold in ("0.5", None, 2, -1, [0.5], {"a": 1}):
        done, said = visitor.look(file_data(path), threshold=threshold)
        assert not done, threshold
        assert "sssd_zoo" not in said
