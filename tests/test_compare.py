"""`sssd compare` on tiny data: what it runs, what it reuses, and what its report says of what was not run."""

import csv
import json

from PIL import Image
from test_cli import one_line, sssd

from sssd_zoo.evaluation.reports.comparison import METHODS, VARIANTS

TINY = [
    *("--model", "sssd_resnet18", "--image_size", "32", "--pretrain.epochs", "1", "--pretrain.batch_size", "16"),
    *("--pretrain.splits", "2", "--pretrain.queue_size", "32", "--cluster.k", "4", "--distill.epochs", "1"),
    *("--distill.batch_size", "16", "--seed_method.epochs", "1", "--seed_method.batch_size", "16"),
    *("--seed_method.queue_size", "32", "--probe.probe_epochs", "5", "--device", "cpu"),
]


def rows_of(out):
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_all_methods_then_more_seeds_reuse_what_is_there(folder_of_images, tmp_path, capsys):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY]
    assert sssd(*words, "--methods", "[sssd, clusterfit]", "--seeds", "[0]") == 0
    methods, paper = (tmp_path / "report.md").read_text().split("## In the paper's tables")
    assert methods.count("not run") == len(METHODS) - len(VARIANTS) - 2
    assert "| paper | CIFAR-10 | SSSD | ResNet-18 | 200 | the same | 78.54 |" in paper
    assert "| ours | CIFAR-10 | SSSD | ResNet-18 | 200 | the same | not run |" in paper
    assert f"| ours | `{folder_of_images.name}` | ClusterFit | sssd_resnet18 | 1 epochs | the same |" in paper
    assert len(rows_of(tmp_path)) == 2

    capsys.readouterr()
    assert sssd(*words, "--seeds", "[0, 1]", "--methods", json.dumps(list(METHODS))) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 6, "pretext, labels, and both methods with their probes"
    assert "[labels-soft] ->" in out
    assert "[labels-redos] ->" in out
    assert "not run" not in (tmp_path / "report.md").read_text().split("## In the paper's tables")[0]
    changes = (tmp_path / "report.md").read_text().split("## One thing changed")[1].split("## In the paper")[0]
    assert [changes.count(METHODS[name]) for name in VARIANTS] == [1, 1, 1]
    rows = rows_of(tmp_path)
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in "01" for m in METHODS]
    for row in rows:
        plain = row["method"] in ("clusterfit", "seed")
        assert [bool(row[name]) for name in ("exit 1", "exit 4", "ensemble")] == [not plain, True, not plain]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["seed"] for row in results} == {0, 1}
    # On so easy data both may be right in all answers: that the seeds are two runs shows in the weights.
    weights = [(tmp_path / f"seed-{seed}/sssd/model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]
    assert Image.open(tmp_path / "accuracy.png").size[0] > 300


def test_mistakes(folder_of_images, tmp_path, capsys):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path / "run", *TINY]
    assert sssd(*words, "--methods", "[sssd, magic]") == 2
    assert "magic" in one_line(capsys)
    assert sssd(*words, "--methods", "[]") == 2
    assert "methods is []" in one_line(capsys)
    assert sssd(*words, "--seed_method.queue_size", "999") == 2
    assert "queue_size 999" in one_line(capsys)
    assert sssd(*words, "--methods", "[sssd-soft]", "--soft", "0") == 2
    assert "soft is 0.0;" in one_line(capsys)
    assert sssd(*words, "--methods", "[sssd-warm]", "--pretrain_model", "sssd_resnet34") == 2
    assert "do not fit" in one_line(capsys)
    assert not (tmp_path / "run").exists()
