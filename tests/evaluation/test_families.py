"""Networks at the same training time: the Pareto front, the report, its figure, and `eval/families.py` itself."""

import json
import runpy

import pytest
import yaml

from helpers.commands import ROOT, command
from helpers.markdown import tables
from sssd_zoo.evaluation.reports.families import Point, families_report, pareto_front, points_of
from sssd_zoo.evaluation.reports.figures import families_cost

TINY_RECIPE = {
    "data": "cifar10-sample",
    "split": "train[:64]",
    "test_split": "test[:64]",
    "image_size": 32,
    "device": "cpu",
    "baseline": False,
    "quality_every": 0,
    "pretrain": {"batch_size": 16, "splits": 2, "queue_size": 32, "symmetric": False},
    "cluster": {"k": 4},
    "distill": {"batch_size": 16},
    "probe": {"probe_weight_decay": 0.01},
}
NAMES = ["sssd_mobilenetv3_small_100_cifar", "sssd_resnet18"]


def family(name, macs, exits, ensemble):
    answers = ("1", "2", "3", "4", "ensemble")
    return {
        "name": name,
        "parameters": 1_500_000,
        "macs": dict(zip(answers, macs, strict=True)),
        "exits": exits,
        "ensemble": ensemble,
        "epochs": {"pretrain": 3, "distill": 2},
        "planned": 60.0,
        "seconds": {"pretrain": 40.0, "distill": 22.0},
    }


CHEAP = family("sssd_cheap", [10**6, 2 * 10**6, 3 * 10**6, 4 * 10**6, 5 * 10**6], [30.0, 29.0, 33.0, 34.0], 34.5)
DEAR = family("sssd_dear", [3 * 10**6, 10**7, 2 * 10**7, 3 * 10**7, 4 * 10**7], [32.0, 36.0, 36.0, 35.0], 38.0)
FRONT = [
    ("sssd_cheap", "exit 1"),
    ("sssd_cheap", "exit 3"),
    ("sssd_cheap", "exit 4"),
    ("sssd_cheap", "ensemble"),
    ("sssd_dear", "exit 2"),
    ("sssd_dear", "ensemble"),
]


def comparison(**changed):
    return {
        "data": "cifar10, split train",
        "images": 20_000,
        "image_size": 32,
        "k": 200,
        "seed": 0,
        "minutes": 1,
        "moco": 2 / 3,
        "test": "10,000 images, split test",
        "machine": "a machine",
        "families": [CHEAP, DEAR],
        "left_out": {},
        "to_come": [],
        **changed,
    }


def test_the_front_has_what_nothing_beats_and_no_ties():
    points = [*points_of(CHEAP), *points_of(DEAR)]
    assert [(point.name, point.words) for point in pareto_front(points)] == FRONT
    twice = [Point("a", "1", 5, 50.0), Point("b", "1", 5, 50.0), Point("c", "1", 5, 49.0), Point("d", "1", 6, 50.0)]
    assert [point.name for point in pareto_front(twice)] == ["a"]


def test_the_report_has_the_front_and_every_network():
    text = families_report(comparison(left_out={"sssd_slow": 700.0}, to_come=["sssd_next"]))
    front, accuracies, macs = (rows[1:] for rows in tables(text))
    assert [(row[2], row[3]) for row in front] == FRONT
    assert accuracies[1][:4] == ["sssd_dear", "1.5 M", "40.0", "32.00"]
    assert accuracies[1][-5:] == ["3", "2", "1 min 00 s", "1 min 02 s", "exit 2, ensemble"]
    assert macs[0] == ["sssd_cheap", "1.0", "2.0", "3.0", "4.0", "5.0"]
    assert "`sssd_slow` (11 min 40 s)" in text
    assert "Not trained yet: `sssd_next`." in text


def test_the_figure_has_room_for_many_networks(tmp_path):
    families = [{**CHEAP, "name": f"sssd_network_{number}"} for number in range(14)]
    families_cost(families, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("pretrain", "distill", "seconds", "epochs"),
    [
        (50, 50, 600, (8, 4)),  # two thirds of it MoCo v2
        (40, 100, 600, (10, 2)),
        (280, 300, 600, (1, 1)),  # not quite as long, but one epoch more of either is too long
        (400, 240, 600, (1, 1)),  # a little longer
        (400, 300, 600, None),
        (275, 292, 720, (1, 1)),  # far less, but two of MoCo v2 are too long
    ],
)
def test_epochs_fill_the_time(pretrain, distill, seconds, epochs):
    chosen = runpy.run_path(str(ROOT / "eval" / "families.py"))["choose_epochs"](pretrain, distill, seconds)
    assert (chosen and chosen[:2]) == epochs


@pytest.mark.slow
def test_two_networks_are_trained_for_the_same_time_and_a_second_call_resumes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY_RECIPE))
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]
    words = ["eval/families.py", "--config", str(recipe), *folders, "--rounds", "1", "--names", *NAMES, "--minutes"]

    short = command(*words, "0.0001")
    assert (short.returncode, short.stderr.count("error: --minutes 0.0001 is too short")) == (2, 1)

    done = command(*words, "0.5", timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert [entry["name"] for entry in found["families"]] == NAMES
    assert all(sum(entry["seconds"].values()) > 0 for entry in found["families"])
    assert (tmp_path / "report" / "accuracy.png").is_file()
    report = (tmp_path / "report" / "report.md").read_text()

    again = command(*words, "0.5")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("[pretrain] done before") == 2
    assert (tmp_path / "report" / "report.md").read_text() == report


@pytest.mark.long
def test_the_report_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "report.md").write_text("mine")
    done = command("eval/families.py", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "holds report.md, which this script did not write" in done.stderr
    assert (tmp_path / "report.md").read_text() == "mine"
