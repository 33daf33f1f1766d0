"""Settings that `sssd fit` chooses by the number of images: they train at any size, and are the paper's at its own."""

import pytest
import yaml

from helpers.commands import one_line, sssd
from sssd_zoo.configs import AnchoredConfig, ClusterConfig, FitArgs, MoCoConfig
from sssd_zoo.pipeline.defaults import advice, derive
from sssd_zoo.pipeline.fit import describe_results
from sssd_zoo.training.engine import check_trainable
from sssd_zoo.training.runs import check_queue

ARGS = FitArgs(data="images", out="run")


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("images", [20, 50, 300, 5_000, 20_000, 500_000, 1_281_167])
def test_what_is_chosen_can_train(images, device, processes):
    args, _ = derive(ARGS, frozenset(), images, device=device, processes=processes)
    check_trainable(args.pretrain, processes, images)
    check_trainable(args.distill, processes, images)
    check_queue(args.pretrain.queue_size, images)
    assert args.pretrain.splits % processes == 0
    assert args.pretrain.batch_size % args.pretrain.splits == 0
    assert 2 <= args.cluster.k <= images // 2
    assert args.pretrain.batch_size * 3 <= max(images, 48)


def test_at_the_papers_size_on_a_gpu_nothing_is_chosen_that_is_not_the_papers():
    args, lines = derive(ARGS, frozenset(), 50_000, device="cuda", processes=1)
    assert not lines
    assert (args.pretrain, args.cluster, args.distill) == (MoCoConfig(), ClusterConfig(), AnchoredConfig())
    assert derive(ARGS, frozenset(), 1_281_167, device="cuda", processes=1)[0].cluster.k == 5124  # the paper: 5000


def test_what_is_given_is_taken():
    given = FitArgs(data="images", out="run", cluster=ClusterConfig(k=7), pretrain=MoCoConfig(batch_size=64, lr=0.5))
    names = frozenset({"cluster.k", "pretrain.batch_size", "pretrain.lr"})
    args, lines = derive(given, names, 300, device="cpu", processes=1)
    assert (args.cluster.k, args.pretrain.batch_size) == (7, 64)
    assert args.pretrain.queue_size == 128
    assert not [line for line in lines if line.startswith(("cluster.k", "pretrain.batch_size"))]


def test_the_learning_rate_follows_the_batch_size_unless_the_optimiser_is_given():
    args, _ = derive(ARGS, frozenset(), 1_000, device="cpu", processes=1)
    assert args.pretrain.lr == pytest.approx(0.06 * args.pretrain.batch_size / 512, rel=1e-2)
    assert args.distill.lr == pytest.approx(0.1 * args.distill.batch_size / 128, rel=1e-2)
    other, _ = derive(ARGS, frozenset({"pretrain.optimizer"}), 1_000, device="cpu", processes=1)
    assert other.pretrain.lr == ARGS.pretrain.lr


def test_few_images_get_advice_and_those_that_took_it_do_not():
    assert "--pretrain.init NAME" in advice(300, ARGS)
    assert advice(50_000, ARGS) is None
    assert advice(300, FitArgs(data="images", out="run", features="resnet18")) is None


def test_a_folder_of_few_images_runs_without_a_flag_about_sizes(folder_of_images, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["fit", "--data", folder_of_images, "--out", out, "--model", "sssd_resnet18", "--image_size", "32"]
    words += ["--device", "cpu", "--pretrain.epochs", "2", "--distill.epochs", "2", "--baseline", "false"]
    assert sssd(*words) == 0
    said = capsys.readouterr().out
    assert "chosen for 48 images" in said
    assert "pretrain.batch_size 16" in said
    assert "cluster.k 10" in said
    assert "48 images are few" in said
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["cluster"]["k"], saved["pretrain"]["batch_size"], saved["pretrain"]["epochs"]) == (10, 16, 2)
    assert sssd(*words) == 0
    assert "[distill] done before" in capsys.readouterr().out
    assert sssd(*words, "--cluster.k", "100") != 0
    assert "K = 100 clusters of 48 images" in one_line(capsys)


def test_what_the_terminal_says_of_results():
    row = {"name": "SSSD", "exits": [1.0, 22.5, 33.333, 100.0], "ensemble": 50.0}
    lines = describe_results({"accuracy": [row], "test": "split test"}).split("\n")
    assert lines[0] == "linear-probe accuracy in percent, split test:"
    assert lines[1].split() == ["exit", "1", "exit", "2", "exit", "3", "exit", "4", "ensemble"]
    assert lines[2].split() == ["SSSD", "1.00", "22.50", "33.33", "100.00", "50.00"]
    assert len(lines[1]) == len(lines[2])
    assert describe_results({"sizes": [3, 9]}) == "2 clusters of 3 to 9 images; no labels, so no accuracy was measured"
