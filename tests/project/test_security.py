"""What strangers can do: visitors of the page, authors of a config.json, a Hub that is silent, files that are links."""

import io
import json
import os
import re
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from huggingface_hub.utils import _http
from PIL import Image

from helpers.commands import ROOT
from helpers.pages import served
from hub_server import Fault, Hub
from sssd_zoo.cli import run
from sssd_zoo.errors import UserError
from sssd_zoo.files.untrusted import read_inside, read_yaml
from sssd_zoo.hub.page import Demo
from sssd_zoo.hub.space import assemble, push
from sssd_zoo.models.checks import built_sizes
from sssd_zoo.models.networks import load_network
from sssd_zoo.models.saving import save_network

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
    with served(SHIPPED, tmp_path_factory.mktemp("scratch")) as where:
        yield where


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
    for threshold in ("0.5", None, 2, [0.5]):
        done, said = visitor.look(file_data(path), threshold=threshold)
        assert not done, threshold
        assert "sssd_zoo" not in said


def test_the_page_shows_names_of_strangers_as_text(finished, tmp_path):
    evil = "</title></script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e"
    assemble(str(finished), tmp_path / "page", run_images=False)
    about = json.loads((tmp_path / "page/page.json").read_text())
    (tmp_path / "page/page.json").write_text(json.dumps({**about, "title": evil}))
    config = json.loads((tmp_path / "page/model/config.json").read_text())
    names = [f"{evil}{number}" for number in range(3)]
    config |= {"label_names": names, "label_descriptions": {names[1]: evil}}
    (tmp_path / "page/model/config.json").write_text(json.dumps(config))
    demo = Demo(tmp_path / "page")
    analysis = demo.analyse(picture((3, 2, 1)))
    shown = demo.introduction() + demo.answers(analysis, [0.5] * 3) + demo.verdict(analysis, [1.0] * 3) + demo.title
    assert not re.search("[\x1b\u202e]", shown)
    assert not re.search("<(script|img|/title)", shown.removesuffix(demo.title))


NAMES = ["cat", "dog", "frog"]
SMALL = {"channels": (8, 16, 32, 64), "layers": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `sssd fit` leaves, by hand."""
    run = tmp_path_factory.mktemp("runs") / "run"
    network = timm.create_model("sssd_resnet18", num_classes=3, **SMALL)
    save_network(run / "model", network, "sssd_resnet18", input_size=32, label_names=NAMES)
    for name in ("pretrain", "distill"):
        (run / name).mkdir()
        (run / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "figures").mkdir()
    (run / "figures/accuracy.png").write_bytes(picture((1, 1, 1)))
    recipe = {"data": "owner/animals", "out": str(run), "warm_start": False}
    (run / "config.yaml").write_text(yaml.safe_dump({**recipe, "pretrain": {"epochs": 1}, "distill": {"epochs": 1}}))
    results = {"model": "sssd_resnet18", "data": "owner/animals", "images": 9, "seed": 0, "times": []}
    (run / "metrics.json").write_text(json.dumps(results))
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A run that a test may change, and beside it a folder `outside` with a secret."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/id_rsa").write_text("topsecret")
    (tmp_path / "outside/a.png").write_text("topsecret")
    (tmp_path / "outside/report.md").write_text("topsecret")
    return tmp_path / "run"


def dry_run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> set[str]:
    """The files that `sssd publish` says it would send."""
    run("publish", [*map(str, words), "--repo", "org/name", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    return {line.split("  ", 1)[-1].strip().split("  ")[-1] for line in lines if re.match(r"^ +[\d,]+  ", line)}


def refusal(capsys: pytest.CaptureFixture[str], name: str, *words: str | Path) -> str:
    """The one line with which a command ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(name, list(map(str, words)))
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_what_is_published_is_on_a_list_at_every_depth(copied, capsys):
    plain_list = dry_run(capsys, copied)
    assert {"README.md", "config.json", "figures/accuracy.png"} <= plain_list
    for name in (".env", "model/.env", "figures/.hidden.png", "figures/notes.txt", "figures/more/deep.png"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("topsecret")
    assert dry_run(capsys, copied) == plain_list
    assert "figures/notes.txt" not in dry_run(capsys, copied, "--include", "*"), "it stays within a folder"
    included = dry_run(capsys, copied, "--include", '["*", "*/*", "*/*/*"]')
    assert {"figures/notes.txt", "figures/more/deep.png"} <= included
    assert not [name for name in included if "/." in f"/{name}" and not name.startswith(".eval_results")]
    line = refusal(capsys, "publish", copied, "--repo", "org/name", "--dry_run", "--include", ".env")
    assert "hidden files are never published" in line


def test_a_card_is_published_by_a_list_too(copied, tmp_path, capsys):
    run("card", ["--run", str(copied), "--out", str(tmp_path / "card")])
    capsys.readouterr()
    plain_list = dry_run(capsys, tmp_path / "card")
    (tmp_path / "card/early_exit/more").mkdir(parents=True)
    for name in ("early_exit/.env", "early_exit/notes.txt", "early_exit/more/report.md", ".eval_results/.env.yaml"):
        (tmp_path / "card" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "card" / name).write_text("topsecret")
    assert dry_run(capsys, tmp_path / "card") == plain_list
    (tmp_path / "card/early_exit/report.md").symlink_to(tmp_path / "outside/report.md")
    assert "is a symbolic link" in refusal(capsys, "publish", tmp_path / "card", "--repo", "org/name", "--dry_run")


LINKS = {
    "a file": ("figures/accuracy.png", "outside/a.png"),
    "one more file": ("figures/more.png", "outside/a.png"),
    "a folder": ("figures", "outside"),
    "the network": ("model", "elsewhere/model"),
    "the weights": ("model/model.safetensors", "elsewhere/model/model.safetensors"),
    "a log's folder": ("distill", "elsewhere/distill"),
    "nowhere": ("figures/lost.png", "nowhere"),
}


@pytest.mark.parametrize(("name", "kind"), [*(("publish", kind) for kind in LINKS), ("card", "a folder")])
def test_links_out_of_a_run_are_not_followed(name, kind, copied, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "elsewhere")
    place, target = copied / LINKS[kind][0], tmp_path / LINKS[kind][1]
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(target)
    words = {"publish": [copied, "--repo", "org/name", "--dry_run"], "card": ["--run", copied, "--out", tmp_path / "c"]}
    line = refusal(capsys, name, *words[name])
    assert f"{place}: it is a symbolic link" in line
    assert not (tmp_path / "c").exists()


def test_links_and_pipes_are_not_included(copied, tmp_path, capsys):
    (copied / "keys").symlink_to(tmp_path / "outside")
    (copied / "key.txt").symlink_to(tmp_path / "outside/id_rsa")
    os.mkfifo(copied / "pipe.txt")
    words = ["publish", copied, "--repo", "org/name", "--dry_run", "--include"]
    assert "key.txt: it is a symbolic link" in refusal(capsys, *words, "key.txt")
    assert "not a regular file" in refusal(capsys, *words, "pipe.txt")
    assert "keys: it is a symbolic link" in refusal(capsys, *words, "keys")
    assert "matches no further file" in refusal(capsys, *words, "keys/*")
    assert not [name for name in dry_run(capsys, copied) if "key" in name or "pipe" in name]


def test_a_space_takes_no_links(copied, finished, tmp_path):
    assemble(str(copied), tmp_path / "space", run_images=False)
    shutil.rmtree(copied / "model")
    (copied / "model").symlink_to(finished / "model")
    with pytest.raises(UserError, match="symbolic link"):
        assemble(str(copied), tmp_path / "other", run_images=False)
    (tmp_path / "space/model/.env").symlink_to(tmp_path / "outside/id_rsa")
    with pytest.raises(UserError, match="symbolic link"):
        push(tmp_path / "space", "org/name", private=False, dry_run=True)


def test_a_file_exchanged_for_a_link_is_not_read(tmp_path):
    (tmp_path / "run/figures").mkdir(parents=True)
    (tmp_path / "run/figures/a.png").write_text("mine")
    assert read_inside(tmp_path / "run", "figures/a.png") == b"mine"
    (tmp_path / "run/figures").rename(tmp_path / "moved")
    (tmp_path / "run/figures").symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="symbolic link"):
        read_inside(tmp_path / "run", "figures/a.png")


TOKEN = "hf_" + "Tr0ub4dor" * 4  # no login: the only server that takes it is the one below


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, and a client that waits for it for two seconds instead of thirty."""
    hub = Hub(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        *(("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)),
        *(("ENDPOINT", hub.url), ("HUGGINGFACE_CO_URL_TEMPLATE", files)),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("sssd_zoo.files.hub_client.PATIENCE", 2.0)
    yield hub
    hub.shutdown()
    hub.server_close()


def faults(quick: list[tuple[str, str, str]], more: list[tuple[str, str, str]]) -> list[Any]:
    """Faults as parameters of a test, the latter marked slow: each is waited for."""
    slow = [pytest.param(Fault(*words), id="-".join(words), marks=pytest.mark.slow) for words in more]
    return [*(pytest.param(Fault(*words), id="-".join(words)) for words in quick), *slow]


SILENT = faults(
    [("GET", "/refs$", "silent"), ("PUT", "/lfs/", "silent"), ("POST", "/commit/", "silent")],
    [
        *(("GET", "/api/models/", "silent"), ("POST", "/repos/create", "silent"), ("POST", "/preupload/", "silent")),
        *(("POST", "/objects/batch", "silent"), ("POST", "/validate-yaml", "silent")),
    ],
)
SILENT_PULLS = faults(
    [("HEAD", "/resolve/", "silent"), ("GET", "/resolve/.*safetensors", "stalled")],
    [("GET", "/api/models/", "silent"), ("GET", "/resolve/", "silent")],
)


@pytest.mark.parametrize("fault", SILENT)
def test_publish_gives_up_on_a_silent_hub(fault, hub, finished, capsys):
    began = time.monotonic()
    with hub.faulty(fault):
        line = refusal(capsys, "publish", finished, "--repo", "someone/network")
    assert time.monotonic() - began < 20
    assert "the Hub has not answered for 2 seconds" in line
    assert "nothing was committed" in line
    assert TOKEN not in line


@pytest.mark.parametrize("fault", SILENT_PULLS)
def test_pull_gives_up_on_a_silent_hub(fault, hub, finished, tmp_path, capsys):
    run("publish", [str(finished), "--repo", "someone/network"])
    began = time.monotonic()
    with hub.faulty(fault):
        line = refusal(capsys, "pull", "someone/network", "--out", tmp_path / "out")
    assert time.monotonic() - began < 20
    assert "the Hub has not answered for 2 seconds" in line
    assert not list(tmp_path.iterdir())


def test_a_slow_hub_is_waited_for(hub, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("sssd_zoo.files.hub_client.PATIENCE", 1.5)  # the body takes 3 seconds
    run("publish", [str(finished), "--repo", "someone/network"])
    with hub.faulty(Fault("GET", "/resolve/.*safetensors", "slow")):
        run("pull", ["someone/network", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/model.safetensors").read_bytes() == hub.files("someone/network")["model.safetensors"]


def test_the_client_of_others_is_left_as_it_was(hub, finished):
    before = _http._GLOBAL_CLIENT_FACTORY
    run("publish", [str(finished), "--repo", "someone/network"])
    assert before is _http._GLOBAL_CLIENT_FACTORY


@pytest.mark.long
def test_a_network_of_a_silent_hub_is_one_line(hub, finished):
    run("publish", [str(finished), "--repo", "someone/network"])
    for fault in (Fault("GET", "/resolve/", "silent"), Fault("HEAD", "/resolve/", "silent")):
        began = time.monotonic()
        with hub.faulty(fault), pytest.raises(UserError, match="cannot load the network"):
            load_network("hf-hub:someone/network", cache_dir=finished.parent / f"cache-{fault.method}")
        assert time.monotonic() - began < 10


def test_weights_that_are_neither_on_the_hub_nor_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'resnet18.a1_in1k': the Hugging Face Hub cannot be reached, nor .*: connect"):
        load_network("resnet18.a1_in1k", cache_dir=tmp_path)


HUGE = {
    "classes": {"num_classes": 10**9},
    "channels": {"model_args": {**SMALL, "channels": [8, 16, 32, 10**9]}},
    "many wide channels": {"model_args": {"channels": [2048, 2048, 2048, 2048], "layers": [1, 1, 1, 1]}},
    "layers": {"model_args": {**SMALL, "layers": [1, 1, 1, 10**9]}},
    "width": {"model_args": {**SMALL, "base_width": 10**9}},
    "stem": {"model_args": {**SMALL, "stem_width": 10**12}},
    "images": {"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}},
    "another architecture": {"architecture": "sssd_resnet101", "model_args": {"channels": [512, 1024, 2048, 2048]}},
}
REDIRECTED = {
    "a file of pickles": {"model_args": {**SMALL, "checkpoint_path": "SECRET"}},
    "other weights": {"model_args": {**SMALL, "pretrained_cfg": {"file": "SECRET"}}},
    "an overlay": {"model_args": {**SMALL, "pretrained_cfg_overlay": {"file": "SECRET"}}},
    "an address": {"pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth", "input_size": [3, 32, 32]}},
    "another file": {"pretrained_cfg": {"hf_hub_filename": "../x.bin", "input_size": [3, 32, 32]}},
    "weights of its own kind": {"pretrained_cfg": {"custom_load": True, "input_size": [3, 32, 32]}},
    "a state": {"pretrained_cfg": {"state_dict": {"a": 1}, "input_size": [3, 32, 32]}},
    "another folder": {"architecture": "local-dir:SECRET"},
    "the Hub": {"architecture": "hf-hub:someone/else"},
    "a device": {"model_args": {**SMALL, "device": "meta"}},
}
WRONG = {
    "an unknown argument": {"model_args": {**SMALL, "surprise": 1}},
    "arguments that are none": {"model_args": [1]},
    "an architecture that is none": {"architecture": ["resnet18"]},
    "a fraction of a class": {"num_classes": 2.5},
    "less than no class": {"num_classes": -1},
    "names of more classes": {"label_names": ["a", "b"]},
    "names that are none": {"label_names": [1, 2, 3]},
    "a size that is none": {"pretrained_cfg": {"input_size": ["<b>", 1, 2]}},
    "a mean that is none": {"pretrained_cfg": {"mean": ["a", "b", "c"]}},
    "an infinite std": {"pretrained_cfg": {"std": [float("inf")] * 3}},
    "a std of 0": {"pretrained_cfg": {"std": [0.2, 0, 0.2]}},
}


CONFIGS = {**HUGE, **REDIRECTED, **WRONG}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_asks_for_more_than_its_weights_is_refused(change, finished, tmp_path):
    shutil.copytree(finished / "model", tmp_path / "net")
    config = json.loads((tmp_path / "net/config.json").read_text())
    described = {**config["pretrained_cfg"], **change.get("pretrained_cfg", {})}
    changed = json.dumps({**config, **change, "pretrained_cfg": described}).replace("SECRET", str(tmp_path / "secret"))
    (tmp_path / "net/config.json").write_text(changed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    for name in (str(tmp_path / "net"), f"local-dir:{tmp_path / 'net'}"):
        with pytest.raises(UserError, match="cannot load the network") as refused:
            load_network(name)
        assert len(str(refused.value)) < 1000
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


NO_CONFIGS = ["[" * 100_000, '{"a": ' * 100_000, "1" * 10_000, "[]", "null", '{"architecture": "x"}']


@pytest.mark.parametrize("text", NO_CONFIGS, ids=lambda text: text[:6])
def test_a_config_that_is_none_is_one_line(text, finished, tmp_path):
    shutil.copytree(finished / "model", tmp_path / "net")
    (tmp_path / "net/config.json").write_text(text)
    with pytest.raises(UserError):
        load_network(str(tmp_path / "net"))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "sssd_resnet50"])
def test_networks_of_all_kinds_pass_the_check(name, tmp_path):
    network = timm.create_model(name, num_classes=7, in_chans=1)
    save_network(tmp_path / "net", network, name)
    assert load_network(str(tmp_path / "net")).num_classes == 7
    assert load_network(str(tmp_path / "net"), num_classes=0, in_chans=3).num_classes == 0
    assert built_sizes(name, {})


BOMBS = {
    "laughs": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
    "itself": "data: &a [*a]\n",
    "a chain": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000)),
    "deep": "data: " + "[" * 3000,
    "deep and closed": "data: " + "[" * 3000 + "]" * 3000,
    "deep blocks": "\n".join("  " * depth + "a:" for depth in range(1500)),
    "large": "data: " + "x" * 2_000_000,
    "wide": "data: [" + "1," * 400_000 + "]",
    "no YAML": "data: [1, 2\nb: }",
    "no text": "data: \xff\xfe\x00",
    "an object": "data: !!python/object/apply:os.system [echo owned]",
    "a number": "seed: " + "9" * 100_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_recipes_that_grow_are_refused(kind, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(BOMBS[kind], encoding="latin-1")
    began = time.monotonic()
    line = refusal(capsys, "fit", "--config", recipe, "--out", tmp_path / "out")
    assert len(line) < 3000
    assert time.monotonic() - began < 20
    if kind != "a number":
        with pytest.raises(UserError):
            read_yaml(recipe)


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/dev/urandom"])
def test_a_recipe_that_never_ends_is_refused(path, tmp_path, capsys):
    assert "is not a file" in refusal(capsys, "fit", "--config", path, "--out", tmp_path / "out")


def test_recipes_may_have_aliases(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rates: &rates [0.1, 0.2]\nother: *rates\nbase: &base {a: 1}\nmore: {<<: *base, b: 2}\n")
    assert read_yaml(recipe) == {"rates": [0.1, 0.2], "other": [0.1, 0.2], "base": {"a": 1}, "more": {"a": 1, "b": 2}}
    for path in sorted(ROOT.glob("train/recipes/**/*.yaml")):
        assert read_yaml(path)
