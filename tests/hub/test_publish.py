"""To the Hub and back by the real client, over HTTP on loopback: whole, compared, and safe under faults."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load

import sssd_zoo  # noqa: F401  registers the models
from helpers.commands import ROOT
from helpers.labels import pseudo_labels
from helpers.runs import made_run
from hub_server import Fault, Hub
from sssd_zoo.configs import PullArgs
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.calibration import fold
from sssd_zoo.files import RUN_MARK, read_json, write_json
from sssd_zoo.files.run_folder import mark, release_all
from sssd_zoo.hub.cards import calibration_note
from sssd_zoo.hub.model_card import save_model_folder
from sssd_zoo.hub.publish import copy_card
from sssd_zoo.labels.kmeans import Clustering
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline.pull import pull

TOKEN = "hf_" + "Tr0ub4dor" * 4  # no login: the only server that takes it is the one below
NAMES = ["cat", "dog", "frog"]
SMALL = {"channels": (8, 16, 32, 64), "layers": (1, 1, 1, 1)}  # so that a publish takes a part of a second
REPO = "someone/network"
FILES = {
    *("README.md", "config.json", "metrics.json", "recipe.yaml", "pretrain.jsonl", "distill.jsonl"),
    *("model.safetensors", "figures/accuracy.png", ".gitattributes"),
    *(f".eval_results/{name}.yaml" for name in ("exit_1", "exit_2", "exit_3", "exit_4", "ensemble")),
}
# A process of its own that runs one command after another: to start one takes longer than a command does.
WORKER = """
import contextlib, io, json, sys, time
from sssd_zoo.cli import main
answers = sys.stdout
for line in sys.stdin:
    sys.argv = ["sssd", *json.loads(line)]
    began, status, out, err = time.monotonic(), 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        except Exception:
            import traceback
            traceback.print_exc()
            status = 1
    answer = [status, out.getvalue(), err.getvalue(), time.monotonic() - began]
    print(json.dumps(answer), file=answers, flush=True)
"""


class Done(NamedTuple):
    """What a command said and did."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def error(self) -> str:
        """Its error line: exactly one, no traceback, and the status that goes with it."""
        assert self.status == 2, self
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


class Client:
    """The `sssd` command in a process that talks to a Hub at `url`."""

    def __init__(self, url: str, home: Path, **environment: str) -> None:
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            **{"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"},
            **environment,
        }
        self.process: subprocess.Popen[str] | None = None
        self.said = ""

    def __call__(self, *words: str | Path) -> Done:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                cwd=ROOT,
                env=self.environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([str(word) for word in words]), file=self.process.stdin, flush=True)
        done = Done(*json.loads(self.process.stdout.readline()))
        self.said += done.out + done.err
        return done

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    hub = Hub(TOKEN)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def sssd(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub.url, tmp_path_factory.mktemp("home"), HF_TOKEN=TOKEN)
    yield client
    client.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `sssd fit` leaves, by hand: it takes a minute, this a second."""
    run = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    network = timm.create_model("sssd_resnet18", num_classes=3, **SMALL)
    network(torch.randn(4, 3, 32, 32))  # so that the BatchNorm statistics are not those of a new network
    save_model_folder(run / "model", network, arch="sssd_resnet18", input_size=32, label_names=NAMES)
    for step in ("pretrain", "distill"):
        (run / step).mkdir()
        (run / step / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "figures").mkdir()
    for name in ("accuracy", "early_exit"):  # the second is of an earlier run: metrics.json does not name it
        Image.new("RGB", (8, 8)).save(run / "figures" / f"{name}.png")
    epochs = {"pretrain": {"epochs": 1}, "distill": {"epochs": 2}}
    recipe = {"data": "owner/animals", "out": str(run), "seed": 5, "warm_start": False, **epochs}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    results = {
        **{"model": "sssd_resnet18", "image_size": 32, "data": "owner/animals", "split": "train", "images": 48},
        **{"test": "split test", "test_images": 12, "classes": 3, "seed": 5, "machine": "a CPU, 1 threads"},
        "times": [{"step": "pretrain", "seconds": 61.0}],
        "accuracy": [{"name": "SSSD", "exits": [41.5, 42.25, 43.0, 44.0], "ensemble": 46.5}],
        "figures": {"figures/accuracy.png": "Accuracy against cost."},
    }
    write_json(run / "metrics.json", results)
    # What has no business on the Hub.
    (run / ".env").write_text("PASSWORD=hunter2\n")
    (run / "figures" / "notes.txt").write_text("private\n")
    torch.save({}, run / "model" / "optimizer.pt")
    return run


@pytest.fixture
def published(hub: Hub, sssd: Client, run: Path) -> Hub:
    """A Hub with the run on it, and nothing else."""
    hub.repos.clear()
    done = sssd("publish", run, "--repo", REPO)
    assert done.status == 0, done
    hub.log.clear()
    return hub


@pytest.fixture
def empty(hub: Hub) -> Hub:
    """A Hub with nothing on it."""
    hub.repos.clear()
    hub.blobs.clear()
    hub.log.clear()
    return hub


def writes(hub: Hub) -> list[str]:
    """The requests that change a repository."""
    return [line for line in hub.log if "/commit/" in line or line.startswith("PUT") or "create" in line]


@pytest.mark.long
def test_dry_run_lists_the_files_and_asks_nothing(empty, sssd, run):
    for option in ("--dry-run", "--dry_run"):
        done = sssd("publish", run, "--repo", REPO, option)
        assert done.status == 0, done
        listed = {line.split()[-1]: line.split()[0] for line in done.out.splitlines() if line.startswith(" ")}
        assert set(listed) == FILES - {".gitattributes"}
        assert int(listed["model.safetensors"].replace(",", "")) > 200_000
        assert "left out without --include" in done.out
        assert ".env" in done.out
    assert not empty.log


def test_publish_sends_the_network_and_nothing_else(empty, sssd, run):
    done = sssd("publish", run, "--repo", REPO, "--private", "--tag", "v1", "--commit_message", "First weights")
    assert done.status == 0, done
    assert "done: " in done.out.splitlines()[-1]
    repo = empty.repos["models", REPO]
    assert repo.private
    assert repo.messages == ["initial commit", "First weights"]
    assert repo.tags["v1"] == repo.refs["main"]
    files = empty.files(REPO)
    assert set(files) == FILES
    sent = timm.create_model("sssd_resnet18", num_classes=3, **SMALL).eval()
    sent.load_state_dict(load(files["model.safetensors"]))
    original = load((run / "model" / "model.safetensors").read_bytes())
    for name, tensor in sent.state_dict().items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-3, atol=1e-4)
    assert all(b"PASSWORD" not in data and str(run).encode() not in data for data in files.values())


def test_the_card_says_what_the_run_measured_and_no_more(published):
    files = published.files(REPO)
    card = ModelCard(files["README.md"].decode())
    about = card.data.to_dict()
    assert "license" not in about  # nobody gave one
    assert "transformers" in about["tags"]
    assert (about["library_name"], about["pipeline_tag"], about["datasets"]) == (
        "timm",
        "image-classification",
        ["owner/animals"],
    )
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert list(values.values()) == [41.5, 42.25, 43.0, 44.0, 46.5]
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    entry = yaml.safe_load(files[".eval_results/exit_2.yaml"])[0]
    assert entry["dataset"] == {"id": "owner/animals", "task_id": "default"}
    assert entry["value"] == 42.25
    text = card.text
    for words in (
        f'timm.create_model("hf-hub:{REPO}", pretrained=True)',
        f'pipeline("image-classification", model="{REPO}")',
        "output=2",
        "forward_early",
        "features_only=True",
        "![Accuracy against cost.](figures/accuracy.png)",
        "## Limits",
        "@InProceedings",
    ):
        assert words in text
    assert "license" not in files["README.md"].decode().split("---")[1]
    assert re.search(r"^\| exit 1 \|.* M \|.* M \|$", text, re.MULTILINE)  # MACs, activations
    assert "num_classes=0" in text  # embeddings
    assert "openaccess.thecvf.com" in text
    for words in ("NMI", "JPEG", "None", "random labels", "pip install sssd-zoo"):
        assert words not in text, words


def test_thumbnails_in_a_card_of_an_earlier_version_are_not_copied(tmp_path):
    card = tmp_path / "card"
    (card / "figures").mkdir(parents=True)
    for name in ("README.md", "model.safetensors", "figures/clusters.png", "figures/accuracy.png"):
        (card / name).write_bytes(b"x")
    copy_card(card, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy" / "figures").iterdir()] == ["accuracy.png"]
    assert (card / "figures" / "clusters.png").exists()


def test_a_user_s_files_in_a_card_s_folders_are_not_copied(tmp_path):
    card = tmp_path / "card"
    ours = {"figures/accuracy.png", ".eval_results/exit_4.yaml", ".eval_results/ensemble.yaml", "README.md"}
    for name in (*ours, "model.safetensors", "figures/private_photo.png", ".eval_results/mine.yaml"):
        (card / name).parent.mkdir(parents=True, exist_ok=True)
        (card / name).write_bytes(b"x")
    copy_card(card, tmp_path / "copy")
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*")}
    assert copied - {"model.safetensors", ".eval_results"} == ours


def test_a_calibrated_network_is_published_with_its_thresholds(empty, sssd, run, tmp_path):
    calibrated = tmp_path / "calibrated"  # as `sssd early-exit` leaves it
    network = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    network.thresholds = [0.5, 0.25, 0.75]
    fold(network, [2.0, 1.0, 1.0, 0.5])
    save_network(calibrated, network, "sssd_resnet18", input_size=32, label_names=NAMES)
    done = sssd("publish", run, "--repo", REPO, "--calibrated", calibrated)
    assert "was not written by `sssd early-exit`" in done.error
    (calibrated / "early_exit").mkdir()
    (calibrated / "early_exit" / "report.md").write_text("# Early exit\n")
    Image.new("RGB", (8, 8)).save(calibrated / "early_exit" / "figure.png")
    done = sssd("publish", run, "--repo", REPO, "--calibrated", calibrated)
    assert done.status == 0, done
    files = empty.files(REPO)
    assert set(files) == FILES | {"early_exit/report.md", "early_exit/figure.png", "figures/early_exit.png"}
    assert "(figures/early_exit.png)" in files["README.md"].decode()
    assert json.loads(files["config.json"])["model_args"]["thresholds"] == [0.5, 0.25, 0.75]
    torch.testing.assert_close(
        load(files["model.safetensors"])["fc.weight"].float(), network.fc.weight, atol=1e-3, rtol=0
    )
    assert "temperatures are folded into the classifiers; `early_exit/report.md`" in files["README.md"].decode()
    assert sssd("pull", REPO, "--out", tmp_path / "pulled").status == 0
    pulled = timm.create_model(f"local-dir:{tmp_path / 'pulled'}", pretrained=True).eval()
    assert pulled.forward_early(torch.randn(2, 3, 32, 32)).exit.shape == (2,)

    torch.nn.init.ones_(network.conv1.weight)
    save_network(calibrated, network, "sssd_resnet18", input_size=32, label_names=NAMES)
    assert "was not made from" in sssd("publish", run, "--repo", REPO, "--calibrated", calibrated).error


def test_the_card_says_where_no_temperature_stayed(run, tmp_path):
    network = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    save_network(tmp_path / "same", network, "sssd_resnet18", input_size=32, label_names=NAMES)
    fold(network, [2.0, 1.0, 1.0, 1.0])
    save_network(tmp_path / "scaled", network, "sssd_resnet18", input_size=32, label_names=NAMES)
    notes = [calibration_note(run, folder) for folder in (None, tmp_path / "same", tmp_path / "scaled")]
    assert notes[0] == []
    assert "none of the fitted temperatures stayed" in notes[1][0]
    assert "temperatures are folded into the classifiers" in notes[2][0]


def test_an_unchanged_run_uploads_nothing(published, sssd, run):
    commits = len(published.repos["models", REPO].commits)
    done = sssd("publish", run, "--repo", REPO)
    assert done.status == 0, done
    assert "unchanged, nothing was uploaded" in done.out
    assert not writes(published)
    assert len(published.repos["models", REPO].commits) == commits


def test_a_branch_a_pull_request_and_a_tag_that_stays(published, sssd, run, tmp_path):
    repo = published.repos["models", REPO]
    first = repo.refs["main"]
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    (changed / "report.md").write_text("# Report\n")
    done = sssd("publish", changed, "--repo", REPO, "--include", "report.md", "--pull_request")
    assert done.status == 0, done
    assert "/discussions/1" in done.out
    assert repo.refs["main"] == first
    assert "report.md" in repo.commits[repo.refs["refs/pr/1"]]

    done = sssd("publish", changed, "--repo", REPO, "--include", "[report.md]", "--revision", "next", "--tag", "v2")
    assert done.status == 0, done
    assert repo.refs["main"] == first
    assert repo.tags["v2"] == repo.refs["next"] != first
    assert "tag v2 on another commit" in sssd("publish", run, "--repo", REPO, "--tag", "v2").error
    assert "drop --private" in sssd("publish", run, "--repo", REPO, "--private").error
    assert "drop --revision" in sssd("publish", run, "--repo", REPO, "--pull_request", "--revision", "x").error
    assert repo.refs["main"] == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"publish {{tmp_path}}/none --repo {REPO}", "no folder"),
        (f"publish --repo {REPO} --private {{tmp_path}}/none", "no folder"),
        (f"publish --repo {REPO}", "required: run"),
        (f"publish {{tmp_path}} --repo {REPO}", "not a finished run"),
        ("publish {run} --repo network", "ORG/NAME"),
        ("publish {run} --repo a/b/c", "ORG/NAME"),
        (f"publish {{run}} --repo {REPO} --include *.gif", "matches no further file"),
        ("pull resnet --out {tmp_path}/x", "no bundled weights 'resnet'"),
        ("pull sssd_resnet18_cifar.cifar10 --labels --out {tmp_path}/x", "give ORG/NAME, or remove --labels"),
        ("pull sssd_resnet18_cifar.cifar10 --revision v1 --out {tmp_path}/x", "is bundled: remove it"),
        (
            f"publish {ROOT}/hub_cards/sssd_resnet18_cifar.cifar10 --repo {REPO} --license mit",
            "has a card, which states its licence: give --license to `sssd card`",
        ),
        (f"pull {REPO} --out {{tmp_path}} --overwrite", "holds mine;"),
    ],
)
def test_mistakes_are_one_line(words, message, empty, sssd, run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert message in sssd(*(word.format(run=run, tmp_path=tmp_path) for word in words.split())).error
    assert not writes(empty)
    assert not (tmp_path / "x").exists()


def test_a_token_is_never_uploaded_or_said(published, sssd, run, tmp_path):
    leaky = tmp_path / "run"
    shutil.copytree(run, leaky)
    (leaky / "notes.md").write_text(f"login with {TOKEN}\n")
    assert "contains your Hub token" in sssd("publish", leaky, "--repo", REPO, "--include", "notes.md").error
    assert not writes(published)
    sssd("publish", run, "--repo", "someone/else")
    with published.faulty(Fault("POST", "/preupload/", 403)):
        assert "403" in sssd("publish", run, "--repo", REPO).error
    assert TOKEN not in sssd.said
    assert all(TOKEN.encode() not in data for repo in ("someone/else", REPO) for data in published.files(repo).values())
    home = Path(sssd.environment["HF_HOME"])
    for folder in (run, home):
        assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


FAILS = [
    (Fault("GET", "/api/models/", "reset"), "cannot be reached"),
    (Fault("POST", "/repos/create", 401), "401"),
    (Fault("POST", "/repos/create", 403), "403"),
    (Fault("POST", "/repos/create", 500), "500"),
    (Fault("POST", "/repos/create", "cut"), "cannot be reached"),
    (Fault("POST", "/validate-yaml", 500), "500"),
    (Fault("POST", "/preupload/", 401), "401"),
    (Fault("POST", "/preupload/", 403), "403"),
    (Fault("POST", "/objects/batch", 403), "403"),
    (Fault("PUT", "/lfs/", 403), "403"),
    (Fault("POST", "/commit/", 401), "401"),
    (Fault("POST", "/commit/", 403), "403"),
    (Fault("POST", "/commit/", 412), "412"),
    (Fault("POST", "/commit/", 429, retry_after=1), "429"),
    (Fault("POST", "/commit/", 500), "500"),
    (Fault("POST", "/commit/", "cut"), "cannot be reached"),
    (Fault("POST", "/commit/", "reset"), "cannot be reached"),
]
RETRIED = [
    Fault("POST", "/preupload/", 429, times=1),
    Fault("POST", "/preupload/", 500, times=1),
    Fault("POST", "/preupload/", "cut", times=1),
    Fault("PUT", "/lfs/", 500, times=1),
    Fault("PUT", "/lfs/", "cut", times=1),
    Fault("POST", "/commit/", "cut", times=1),
    Fault("POST", "/commit/", "lost", times=1),
    Fault("GET", "/resolve/.*safetensors", "short", times=1),
]
GIVEN_UP = [
    (Fault("POST", "/preupload/", 500), "500"),
    (Fault("POST", "/preupload/", "cut"), "cannot be reached"),
    (Fault("PUT", "/lfs/", 500), "500"),
    (Fault("PUT", "/lfs/", "cut"), "cannot be reached"),
]


def name_of(value: Any) -> str:
    return f"{value.method}-{value.path.strip('/')}-{value.kind}" if isinstance(value, Fault) else "-"


def check_failure(hub: Hub, sssd: Client, run: Path, fault: Fault, words: str) -> None:
    """The command fails with one line, the Hub is as before, and the same command then does it."""
    with hub.faulty(fault):
        line = sssd("publish", run, "--repo", REPO).error
    assert words in line
    assert "nothing was committed" in line
    assert set(hub.files(REPO)) <= {".gitattributes"}
    done = sssd("publish", run, "--repo", REPO)
    assert done.status == 0, done
    assert set(hub.files(REPO)) == FILES


@pytest.mark.parametrize(("fault", "words"), FAILS, ids=name_of)
def test_a_fault_leaves_the_repository_as_it_was(fault, words, empty, sssd, run):
    check_failure(empty, sssd, run, fault, words)


@pytest.mark.slow  # the client tries for 23 seconds
@pytest.mark.parametrize(("fault", "words"), GIVEN_UP, ids=name_of)
def test_a_fault_that_stays_leaves_the_repository_as_it_was(fault, words, empty, sssd, run):
    check_failure(empty, sssd, run, fault, words)


@pytest.mark.parametrize("fault", RETRIED, ids=name_of)
def test_a_passing_fault_is_outlasted(fault, empty, sssd, run):
    with empty.faulty(fault):
        done = sssd("publish", run, "--repo", REPO)
    assert done.status == 0, done
    assert fault.times == 0
    assert set(empty.files(REPO)) == FILES
    assert empty.repos["models", REPO].messages == ["initial commit", "Publish by sssd-zoo"]


@pytest.mark.slow
def test_publish_by_xet(empty, sssd, run, tmp_path):
    pytest.importorskip("hf_xet")
    assert sssd("publish", run, "--repo", "someone/else").status == 0  # the server then knows the bytes
    empty.log.clear()
    empty.cas = str(tmp_path / "cas")
    client = Client(empty.url, tmp_path / "home", HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="0")
    done = client("publish", run, "--repo", REPO)
    assert done.status == 0, done
    client.close()
    assert set(empty.files(REPO)) == FILES
    assert not [line for line in empty.log if line.startswith("PUT") or "/objects/batch" in line]
    stored = sum(path.stat().st_size for path in Path(empty.cas).rglob("*") if path.is_file())
    assert stored > 200_000


def test_a_file_whose_name_is_a_pattern_comes_back(empty, sssd, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "notes[1].md").write_text("mine\n")
    done = sssd("publish", copy, "--repo", REPO, "--include", "notes*")
    assert done.status == 0, done
    fetched = {unquote(line.rsplit("/", 1)[1]) for line in empty.log if re.match("GET .*/resolve/", line)}
    assert {"notes[1].md", "model.safetensors"} <= fetched & set(empty.files(REPO))


def test_pictures_of_the_run_go_only_when_they_are_named(empty, sssd, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shown = {"figures/clusters.png", "distill/views.png", "report.html", "seen/detections.png"}
    for name in (*shown, "own.png", "figures/own.png", "distill/own.png"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"pixels")

    def sent(pattern: str) -> tuple[set[str], str]:
        done = sssd("publish", copy, "--repo", REPO, "--include", pattern, "--dry_run")
        assert done.status == 0, done
        return {line.split()[-1] for line in done.out.splitlines() if line.startswith(" ")}, done.out

    usual = FILES - {".gitattributes"}
    assert sent("*.png")[0] == usual | {"own.png"}, "'*' stays in its folder"
    for pattern, others, left in (
        ("*/*.png", {"figures/own.png", "figures/early_exit.png", "distill/own.png"}, shown - {"report.html"}),
        ("figures/clusters*", set(), {"figures/clusters.png"}),
        ("report.*", set(), {"report.html"}),
    ):
        files, said = sent(pattern)
        assert files == usual | others
        assert f"{', '.join(sorted(left))}: shows images of the run, so --include {pattern} leaves it out" in said
    for name in shown:
        files, said = sent(name)
        assert files == usual | {name}
        assert "shows images" not in said


def test_files_that_name_images_or_folders_go_only_when_they_are_named(empty, sssd, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    named = {"report.md", "corrupt.tsv", "traceback.txt", "traceback-1.txt", "steps/labels.json", "distill/corrupt.tsv"}
    named |= {
        "labels/labels.parquet",
        "labels/pseudo_labels.json",
        "distill/tensorboard/events.1",
        "probe/metrics.json",
    }
    for name in (*named, "distill/own.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(f"{tmp_path}/alice.png\n")
    named.add("config.yaml")

    def sent(*patterns: str) -> set[str]:
        done = sssd("publish", copy, "--repo", REPO, "--include", f"[{', '.join(patterns)}]", "--dry_run")
        assert done.status == 0, done
        return {line.split()[-1] for line in done.out.splitlines() if line.startswith(" ")} - FILES

    unasked = sent("'*'", "'*/*'", "'*/*/*'")
    assert "distill/own.txt" in unasked
    assert not named & unasked
    assert sent(*named) == named


def test_copies_of_images_and_lists_of_them_go_only_when_they_are_named(empty, sssd, run, folder_of_images, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    sorted_images = sssd("clusters", made_run(tmp_path / "made", folder_of_images), "--out", copy / "sorted")
    assert sorted_images.status == 0, sorted_images
    for name in ("e.npy", "e.csv", "e.parquet"):
        done = sssd("embed", copy, "--data", folder_of_images, "--out", copy / name, "--workers", "0")
        assert done.status == 0, done
    image = next((copy / "sorted").glob("*/*.png"))
    words = [copy, copy / "e.npy", image, "--out", copy / "found.csv"]
    assert sssd("search", *words).status == 0
    (copy / "own.csv").write_text("query,mine\n")

    def sent(*patterns: str) -> tuple[set[str], str]:
        done = sssd("publish", copy, "--repo", REPO, "--include", f"[{', '.join(patterns)}]", "--dry_run")
        assert done.status == 0, done
        return {line.split()[-1] for line in done.out.splitlines() if line.startswith(" ")} - FILES, done.out

    files, said = sent("'*.csv'", "'*.json'", "'*.npy'", "'*.parquet'", "'sorted/*'", "'sorted/*/*'")
    assert files == {"own.csv"}
    assert "shows images of the run, so --include sorted/*/* leaves it out" in said
    named = {"sorted/clusters.csv", image.relative_to(copy).as_posix(), "e.npy", "e.npy.csv", "found.csv"}
    assert sent(*named)[0] == named


def test_publish_says_when_what_came_back_is_damaged(empty, sssd, run):
    with empty.faulty(Fault("GET", "/resolve/.*safetensors", "corrupt")):
        line = sssd("publish", run, "--repo", REPO).error
    assert "model.safetensors" in line
    assert "damaged" in line
    assert REPO in line


@pytest.mark.slow
def test_a_publish_that_is_killed_is_repeated_safely(empty, sssd, run, tmp_path):
    words = [sys.executable, "-m", "sssd_zoo.cli", "publish", str(run), "--repo", REPO]
    for path in ("/preupload/", "/lfs/", "/commit/"):
        empty.log.clear()
        with empty.faulty(Fault("POST" if path != "/lfs/" else "PUT", path, 500)):
            process = subprocess.Popen(words, cwd=ROOT, env=sssd.environment, stdout=subprocess.PIPE, text=True)
            while not any(path in line for line in empty.log):
                assert process.poll() is None or path == "/commit/"
                time.sleep(0.05)
            process.kill()
            process.communicate()
        assert set(empty.files(REPO)) <= {".gitattributes"}
    done = subprocess.run(words, cwd=ROOT, env=sssd.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(empty.files(REPO)) == FILES
    assert TOKEN not in done.stdout + done.stderr


def test_pull_gives_what_was_published(published, sssd, tmp_path):
    published.repos["models", REPO].commit("main", {**published.files(REPO), "evil.pt": b"pickle"}, "a pickle")
    done = sssd("pull", REPO, "--out", tmp_path / "net")
    assert done.status == 0, done
    files = published.files(REPO)
    found = {path.relative_to(tmp_path / "net").as_posix() for path in (tmp_path / "net").rglob("*") if path.is_file()}
    assert found == FILES - {".gitattributes"} | {".sssd-zoo.json"}
    assert all((tmp_path / "net" / name).read_bytes() == files[name] for name in found - {".sssd-zoo.json"})
    assert "--overwrite" in sssd("pull", REPO, "--out", tmp_path / "net").error
    model = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, output=2)
    assert model.pretrained_cfg["label_names"] == NAMES
    assert next(model.parameters()).dtype == torch.float32


PULL_FAULTS = [
    (Fault("GET", "/resolve/.*safetensors", "corrupt"), "damaged"),
    (Fault("GET", "/resolve/.*metrics.json", 401), "401"),
    (Fault("GET", "/resolve/.*safetensors", 403), "403"),
    (Fault("GET", "/resolve/.*safetensors", 404), "404"),
    (Fault("HEAD", "/resolve/.*safetensors", 403), "403"),
    (Fault("GET", "/api/models/", 500), "500"),
    (Fault("GET", "/api/models/", 401), "401"),
    (Fault("GET", "/api/models/", "reset"), "cannot be reached"),
]


@pytest.mark.parametrize(("fault", "words"), PULL_FAULTS, ids=name_of)
def test_pull_hands_over_nothing_damaged(fault, words, published, sssd, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for name, content in published.files(REPO).items():
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_bytes(content)
    mark(old, "card")
    (old / "keep").write_text("this")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with published.faulty(fault):
        for out, more in (("new", ()), ("old", ("--overwrite",))):
            done = sssd("pull", REPO, "--out", tmp_path / out, *more)
            assert words in done.error
            assert done.seconds < 10
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.slow  # the client tries for a while
@pytest.mark.parametrize("kind", ["short", "reset", 500])
def test_pull_of_a_download_that_never_ends_well(kind, published, sssd, tmp_path):
    with published.faulty(Fault("GET", "/resolve/.*safetensors", kind)):
        sssd("pull", REPO, "--out", tmp_path / "net").error  # noqa: B018  asserts that it is one line
    assert not list(tmp_path.iterdir())


def test_pull_goes_on_where_a_download_was_cut(published, sssd, tmp_path):
    with published.faulty(Fault("GET", "/resolve/.*safetensors", "short", times=1)):
        done = sssd("pull", REPO, "--out", tmp_path / "net")
    assert done.status == 0, done
    assert (tmp_path / "net" / "model.safetensors").read_bytes() == published.files(REPO)["model.safetensors"]


def test_weights_that_are_not_those_of_the_card_are_refused(published, sssd, tmp_path):
    repo, files = published.repos["models", REPO], published.files(REPO)
    repo.commit("main", {**files, "model.safetensors": files["model.safetensors"][:-2] + b"\0\1"}, "other weights")
    assert "sha256" in sssd("pull", REPO, "--out", tmp_path / "net").error
    repo.commit("main", {name: data for name, data in files.items() if name != "metrics.json"}, "no manifest")
    assert "metrics.json missing" in sssd("pull", REPO, "--out", tmp_path / "net").error
    assert "404" in sssd("pull", "someone/nobody", "--out", tmp_path / "net").error
    assert "404" in sssd("pull", REPO, "--revision", "v9", "--out", tmp_path / "net").error
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_machine_without_a_network_is_told_within_seconds(run, tmp_path, monkeypatch):
    down = Client("http://127.0.0.1:9", tmp_path / "home")
    done = down("pull", REPO, "--out", tmp_path / "net")
    assert "cannot be reached at http://127.0.0.1:9" in done.error
    assert done.seconds < 10
    assert "hf auth login" in down("publish", run, "--repo", REPO).error
    done = down("pull", "sssd_resnet18_cifar", "--out", tmp_path / "shipped")
    assert done.status == 0, done
    down.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        pull(PullArgs(name=REPO, out=str(tmp_path / "net")))
    release_all()  # what the end of a command does
    assert not (tmp_path / "net").exists()
    card = read_json(tmp_path / "shipped" / "metrics.json")
    assert (tmp_path / "shipped" / "model.safetensors").stat().st_size == card["weights"]["bytes"]
    ours = timm.create_model(f"local-dir:{tmp_path / 'shipped'}", pretrained=True).state_dict()
    theirs = timm.create_model("sssd_resnet18_cifar", pretrained=True).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_card_of_weights_that_ship_is_published(empty, sssd):
    card = ROOT / "hub_cards" / "sssd_resnet18_cifar.cifar10"
    done = sssd("publish", card, "--repo", REPO)
    assert done.status == 0, done
    files = empty.files(REPO)
    assert len(files["model.safetensors"]) == read_json(card / "metrics.json")["weights"]["bytes"]
    assert files["README.md"] == (card / "README.md").read_bytes()


READ = """
import sssd_zoo, timm, torch, sys, json
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
torch.manual_seed(0)
batch = torch.randn(2, 3, 32, 32)
image = Image.effect_noise((32, 32), 60).convert("RGB")
answers = {}
for source in sys.argv[1:]:
    prefix = "local-dir:" if source.startswith("/") else "hf-hub:"
    model = timm.create_model(prefix + source, pretrained=True).eval()
    theirs = AutoModelForImageClassification.from_pretrained(source).eval()
    classify = pipeline("image-classification", model=source)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        own, other = model(batch), theirs(batch).logits
        probabilities = model(transform(image)[None]).softmax(1)[0].tolist()
    answers[source] = {
        "dtype": str(theirs.dtype),
        "difference": float((own.log_softmax(1) - other.log_softmax(1)).abs().max()),
        "ours": dict(zip(model.pretrained_cfg["label_names"], probabilities)),
        "theirs": {own["label"]: own["score"] for own in classify(image, top_k=3)},
        "labels": list(theirs.config.id2label.values()),
    }
print(json.dumps(answers))
"""


@pytest.mark.long
def test_timm_and_transformers_load_it_from_a_folder_and_from_the_hub(published, sssd, tmp_path):
    pytest.importorskip("transformers")
    assert sssd("pull", REPO, "--out", tmp_path / "net").status == 0
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "net"), REPO],
        cwd=ROOT,
        env=sssd.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for answer in json.loads(done.stdout.splitlines()[-1]).values():
        assert answer["dtype"] == "torch.float32"
        assert answer["labels"] == NAMES
        assert answer["difference"] < 1e-5
        assert answer["theirs"] == pytest.approx(answer["ours"], abs=1e-3)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Pseudo labels of 12 images in 3 clusters."""
    random = np.random.default_rng(0)
    clustering = Clustering(
        np.arange(12) % 3, random.random((3, 4), np.float32), random.random(12, np.float32), inertia=1.0, k_asked=4
    )
    pseudo_labels(
        clustering,
        np.arange(12),
        truth=np.arange(12) % 3,
        near=(np.stack([np.arange(12) % 3, np.arange(1, 13) % 3], 1), random.random((12, 2), np.float32)),
        model=str(tmp_path / "run" / "pretrain"),
        **{"name": "owner/animals", "split": "train[:12]", "fingerprint": "ab" * 32},
    ).save(tmp_path / "labels")
    return tmp_path / "labels"


def test_labels_go_to_the_hub_and_back(empty, sssd, labels, tmp_path):
    repo = "someone/labels"
    done = sssd("publish-labels", labels, "--repo", repo)
    assert done.status == 0, done
    files = empty.files(repo, kind="datasets")
    assert set(files) == {
        "README.md",
        "labels.parquet",
        "centroids.safetensors",
        "pseudo_labels.json",
        ".gitattributes",
    }
    assert all(str(tmp_path).encode() not in data for data in files.values())
    card = files["README.md"].decode()
    assert "source_datasets:\n- owner/animals" in card
    assert "ab" * 32 in card
    assert "--data owner/animals --split 'train[:12]' --labels LABELS" in card
    assert "the 2 nearest centroids" in card
    assert "unchanged" in sssd("publish-labels", labels, "--repo", repo).out

    done = sssd("pull", repo, "--labels", "--out", tmp_path / "pulled")
    assert done.status == 0, done
    ours, theirs = PseudoLabels.load(labels), PseudoLabels.load(tmp_path / "pulled")
    for name in ("rows", "labels", "distances", "centroids", "near", "near_distances"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    theirs.check("ab" * 32, 12)
    with pytest.raises(UserError, match="other data"):
        theirs.check("cd" * 32, 12)

    with empty.faulty(Fault("GET", "/resolve/.*parquet", "corrupt")):
        assert "labels.parquet" in sssd("pull", repo, "--labels", "--out", tmp_path / "damaged").error
    assert not (tmp_path / "damaged").exists()
    assert "folder of pseudo labels" in sssd("publish-labels", tmp_path, "--repo", repo).error
    (tmp_path / RUN_MARK).write_text('{"kind": "fit"}')
    assert "unchanged" in sssd("publish-labels", tmp_path, "--repo", repo).out, "of a run its labels"
