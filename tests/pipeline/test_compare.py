"""`sssd compare` on tiny data: what it runs, what it reuses, and what its report says of what was not run."""

import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.commands import TINY_COMPARE as TINY
from helpers.commands import one_line, sssd
from helpers.markdown import by_name, sections, table
from helpers.runs import rows_of
from sssd_zoo.evaluation.reports.comparison import METHODS, PAPER, VARIANTS
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.models import multiply_adds
from sssd_zoo.models.saving import save_network


def report(out):
    """Of report.md the rows of the methods and of the variants by their names, and all rows of the paper's tables."""
    parts = sections((out / "report.md").read_text())
    methods, changes = parts["Methods compared"], parts.get("One thing changed", "")
    paper = [row for title, text in parts.items() if title.startswith("Table ") for row in table(text)]
    return by_name(table(methods)), by_name(table(changes)) if changes else {}, paper


@pytest.mark.slow
def test_all_methods_then_more_seeds_reuse_what_is_there(folder_of_images, tmp_path, capsys):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY]
    assert sssd(*words, "--methods", "[sssd, clusterfit]", "--seeds", "[0]") == 0
    methods, changes, paper = report(tmp_path)
    assert set(methods) == {METHODS[name] for name in PAPER}
    assert not changes
    assert {title for title, cells in methods.items() if cells[0] != "not run"} == {"SSSD", "ClusterFit"}
    assert ["paper", "CIFAR-10", "SSSD", "ResNet-18", "200", "the same", "78.54"] in [row[:7] for row in paper]
    assert ["ours", "CIFAR-10", "SSSD", "ResNet-18", "200", "the same", "not run"] in [row[:7] for row in paper]
    other = ["ours", folder_of_images.name, "ClusterFit", "sssd_resnet18", "1 epochs", "the same"]
    assert other in [row[:6] for row in paper]
    assert len(rows_of(tmp_path)) == 2

    capsys.readouterr()
    assert sssd(*words, "--seeds", "[0, 1]", "--methods", json.dumps(list(METHODS))) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 6, "pretext, labels, and both methods with their probes"
    assert "[labels-soft] ->" in out
    assert "[labels-redos] ->" in out
    methods, changes, _ = report(tmp_path)
    assert set(methods) == set(METHODS.values())
    assert not [title for title, cells in methods.items() if "not run" in cells]
    assert set(changes) == {METHODS[name] for name in VARIANTS}
    rows = rows_of(tmp_path)
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in "01" for m in METHODS]
    for row in rows:
        plain = row["method"] in ("clusterfit", "clusterfit-anchored", "seed", "pretext")
        assert [bool(row[name]) for name in ("exit 1", "exit 4", "ensemble")] == [not plain, True, not plain]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["seed"] for row in results} == {0, 1}
    # On so easy data both may be right in all answers: that the seeds are two runs shows in the weights.
    weights = [(tmp_path / f"seed-{seed}/sssd/model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]
    assert Image.open(tmp_path / "accuracy.png").size[0] > 300


@pytest.mark.slow
def test_true_labels_are_not_learnt_of_the_images_that_are_measured(folder_of_images, tmp_path):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY, "--probe.holdout", "0.5"]
    words += ["--pretrain.batch_size", "512"]  # more than there are images, which does not matter here
    assert sssd(*words, "--seeds", "[0]", "--methods", '["true", random]') == 0
    steps = {
        name: read_metrics(tmp_path / "seed-0" / name / "metrics.jsonl")[-1]["step"] for name in ("true", "random")
    }
    assert not (tmp_path / "seed-0" / "pretrain").exists(), "nothing learns from M_ssl"
    assert steps["true"] == steps["random"] // 2, "half of the images are measured"
    assert "held out from the probes only" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_seeds_teacher_sees_its_images_at_teacher_size_and_macs_are_of_the_probes(folder_of_images, tmp_path):
    teacher = tmp_path / "teacher"
    save_network(teacher, timm.create_model("resnet18", num_classes=0), "resnet18", input_size=32)
    words = ["compare", "--data", folder_of_images, "--out", tmp_path / "out", *TINY, "--seeds", "[0]"]
    words += ["--features", teacher, "--teacher_size", "40", "--methods", "[sssd, seed]", "--keep_checkpoints", "true"]
    assert sssd(*words) == 0
    checkpoints = tmp_path / "out" / "seed-0" / "seed" / "checkpoints"
    identity = json.loads(next(checkpoints.glob("step-*/*.json")).read_text())["identity"]
    assert identity["teacher_size"] == 40
    network = timm.create_model("sssd_resnet18", num_classes=3)
    results = {row["method"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert results["sssd"]["macs"] == multiply_adds(network, (3, 32, 32))


@pytest.mark.long
def test_epochs_of_single_methods_and_the_pretext_itself(folder_of_images, tmp_path, capsys):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY, "--seeds", "[0]"]
    assert sssd(*words, "--methods", "[sssd, clusterfit, pretext]") == 0
    assert table(sections((tmp_path / "report.md").read_text())["Methods compared"])
    before = by_name(table(sections((tmp_path / "report.md").read_text())["Methods compared"]))
    assert before["M_ssl itself"][-2:] == ["", "0.0 s"], "nothing is trained for it"
    longer = "{clusterfit: 2, pretext: 3}"
    capsys.readouterr()
    assert sssd(*words, "--methods", "[sssd, clusterfit, pretext]", "--epochs", longer) != 0
    assert "seed-0 was made with other settings or data (clusterfit.epochs: 1 there, 2 now" in one_line(capsys)
    assert sssd(*words, "--methods", "[sssd, clusterfit, pretext]", "--epochs", longer, "--overwrite", "true") == 0
    assert "[sssd] done before" in capsys.readouterr().out
    after = by_name(table(sections((tmp_path / "report.md").read_text())["Methods compared"]))
    assert [after[name][-2] for name in ("SSSD", "ClusterFit", "M_ssl itself")] == ["1", "2", "3"]
    assert len(read_metrics(tmp_path / "seed-0" / "pretext" / "metrics.jsonl")) == 3 * 1


@pytest.mark.long
def test_a_pretext_with_epochs_of_its_own_is_all_that_it_trains(folder_of_images, tmp_path):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY, "--seeds", "[0]"]
    assert sssd(*words, "--methods", "[pretext]", "--epochs", "{pretext: 2}") == 0
    assert {path.stem for path in (tmp_path / "seed-0" / "steps").iterdir()} == {"pretext", "pretext-probe"}
    assert report(tmp_path)[0]["M_ssl itself"][-2] == "2"


def test_other_settings_are_told_before_anything_is_trained(folder_of_images, tmp_path, capsys):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY, "--seeds", "[0]"]
    assert sssd(*words, "--methods", '["true"]') == 0
    capsys.readouterr()
    assert sssd(*words, "--methods", '[random, "true"]', "--epochs", '{"true": 2}') == 2
    assert "(true.epochs: 1 there, 2 now)" in one_line(capsys)
    assert not (tmp_path / "seed-0" / "random").exists()
    assert sssd(*words, "--methods", '["true"]') == 0
    assert "[true] done before" in capsys.readouterr().out


@pytest.mark.long
def test_contrastive_starts_from_the_pretext(folder_of_images, tmp_path, capsys):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY, "--seeds", "[0]"]
    assert sssd(*words, "--methods", "[contrastive]", "--contrastive.lr", "1e-12") == 0
    record = json.loads((tmp_path / "seed-0" / "steps" / "contrastive.json").read_text())
    assert record["inputs"]["warm_start"] is True
    assert record["inputs"]["contrast"] == 3
    trunk, trained = (
        load_file(tmp_path / "seed-0" / name / "model.safetensors") for name in ("pretrain", "contrastive")
    )
    for name in ("layer1.0.conv1.weight", "layer4.1.conv2.weight"):
        torch.testing.assert_close(trained[name], trunk[name])
    methods, *_ = report(tmp_path)
    assert methods[METHODS["contrastive"]][0] != "not run"
    capsys.readouterr()
    assert sssd(*words, "--methods", "[contrastive]", "--contrastive.contrast", "2", "--contrastive.lr", "1e-12") == 2
    assert "contrastive.contrast: 3.0 there, 2.0 now" in one_line(capsys)


@pytest.mark.long
def test_variants_are_methods_with_settings_changed(folder_of_images, tmp_path, capsys):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY, "--seeds", "[0]"]
    variants = "{mixed: {method: anchored-warm, mix: mixup}, twice: {method: clusterfit, epochs: 2}}"
    assert sssd(*words, "--methods", "[anchored-warm]", "--variants", variants, "--epochs", "{mixed: 2}") == 0
    rows = by_name(table(sections((tmp_path / "report.md").read_text())["Methods compared"]))
    names = (METHODS["anchored-warm"], "mixed", "twice")
    assert [rows[name][-2] for name in names] == ["1", "2", "2"]
    assert [bool(rows[name][0]) for name in names] == [True, True, False], "ClusterFit has no exit 1"
    record = json.loads((tmp_path / "seed-0" / "steps" / "mixed.json").read_text())
    assert record["inputs"]["mix"] == "mixup"
    assert record["inputs"]["warm_start"] is True
    # Its name does not say of which method a variant is, and methods may have the same settings.
    other = "{twice: {method: sssd, epochs: 2}}"
    assert sssd(*words, "--methods", "[anchored-warm]", "--variants", other) == 2
    assert "twice.network: 'without exits' there, None now" in one_line(capsys)
    # The results of a copy are the same, and count once.
    copy = shutil.copytree(tmp_path, tmp_path.parent / "copy")
    again = [*words, "--methods", "[anchored-warm]", "--variants", variants, "--epochs", "{mixed: 2}"]
    assert sssd(*again, "--also", f"[{copy}]") == 0
    assert len(rows_of(tmp_path)) == 3


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (("--methods", "[sssd]", "--epochs", "{clusterfit: 2}"), "--epochs names clusterfit"),
        (("--methods", "[anchored]", "--distill.anchor", "0"), "leaves nothing of anchored"),
        (("--variants", "{sssd: {method: sssd}}"), "'sssd', which is a method's name"),
        (("--variants", "{../up: {method: sssd}}"), "cannot be that of a folder"),
        (("--variants", "{a: {mix: mixup}}"), "a needs a `method`, one of"),
        (("--variants", "{a: {method: clusterfit, dense: true}}"), "a has no anchor, which dense would extend"),
        (("--variants", "{a: {method: anchored, anchor: 0, dense: true}}"), "a has no anchor, which dense would"),
        (("--variants", "{a: {method: anchored, anchor: 0, clusters: false}}"), "a: clusters false leaves nothing"),
        (
            ("--variants", "{a: {method: anchored, dense: true}}"),
            "variants a: dense needs feature maps of at least 2 x 2 positions, and the student has one at 32 px: give",
        ),
        (("--methods", "[sssd]", "--distill.dense", "true"), "no method here has an anchor, which distill.dense would"),
        (("--methods", "[sssd]", "--distill.cached_views", "2"), "which distill.cached_views would extend: remove it"),
        (("--variants", "{a: {method: seed}}"), "a needs a `method`, one of"),
        (("--variants", "{a: {method: sssd, mixx: mixup}}"), "changes mixx; it may change"),
        (("--variants", "{a: {method: sssd, mix: blend}}"), "a: mix is 'blend'"),
        (("--methods", "[pretext]", "--epochs", "{pretext: 2}", "--features", "resnet18"), "is taken as it is"),
        (("--methods", "[sssd]", "--epochs", "{sssd: 0}"), "epochs"),
        (("--methods", "[sssd, magic]"), "magic"),
        (("--also", "[a, ./a]"), "a folder twice, whose results would count twice"),
        (("--methods", "[]"), "methods is []"),
        (("--seed_method.queue_size", "999"), "queue_size 999"),
        (("--methods", "[contrastive]", "--contrastive.queue_size", "999"), "queue_size 999"),
        (("--methods", "[contrastive]", "--contrastive.splits", "3"), "splits 3 must divide"),
        (
            ("--methods", "[contrastive]", "--contrastive.mix", "mixup"),
            "no other view of mixed images: remove mix mixup",
        ),
        (("--variants", "{a: {method: contrastive}}"), "a needs a `method`, one of"),
        (("--methods", "[sssd-soft]", "--soft", "0"), "soft is 0.0;"),
        (("--methods", "[sssd-warm]", "--pretrain_model", "sssd_resnet34"), "do not fit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes(mistake, message, folder_of_images, tmp_path, capsys):
    assert sssd("compare", "--data", folder_of_images, "--out", tmp_path / "run", *TINY, *mistake) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_true_labels_need_a_batch_of_the_images_that_are_not_measured(folder_of_images, tmp_path, capsys):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY, "--seeds", "[0]"]
    assert sssd(*words, "--methods", '[sssd, "true"]', "--distill.batch_size", "40") == 2
    assert "batch_size 40 is larger than the data set of 38 images" in one_line(capsys)
    assert not (tmp_path / "seed-0").exists(), "nothing was trained"


@pytest.mark.long
def test_a_result_keeps_the_machine_that_trained_it(folder_of_images, tmp_path):
    words = ["compare", "--data", folder_of_images, "--out", tmp_path, *TINY, "--seeds", "[0]", "--methods"]
    assert sssd(*words, "[sssd]") == 0
    record = tmp_path / "seed-0" / "steps" / "sssd.json"
    content = json.loads(record.read_text())
    here = content["result"]["machine"]
    content["result"]["machine"] = "a faster one"
    record.write_text(json.dumps(content))
    assert sssd(*words, "[sssd, clusterfit]") == 0
    assert f"- **Machine**: a faster one; {here}" in (tmp_path / "report.md").read_text()
    machines = {row["method"]: row["machine"] for row in rows_of(tmp_path)}
    assert machines == {"sssd": "a faster one", "clusterfit": here}
