"""Settings that `sssd fit` chooses by the images and the device: they train at any size, as in the paper at its own."""

import re
from dataclasses import replace

import pytest
import yaml

from helpers.commands import one_line, sssd
from sssd_zoo.configs import ClusterConfig, ContrastiveConfig, FitArgs, MoCoConfig, StudentConfig
from sssd_zoo.errors import UserError
from sssd_zoo.pipeline.budget import chosen_in
from sssd_zoo.pipeline.defaults import DERIVED, Scale, advice, derive, describe_chosen
from sssd_zoo.pipeline.preflight import size_note
from sssd_zoo.pipeline.pretrain import check_splits
from sssd_zoo.training.engine import check_trainable
from sssd_zoo.training.runs import check_queue

WEIGHTS = "sssd_resnet18.dist_tiny_imagenet_32"
ARGS = FitArgs(data="images", out="run")
MACS = {32: 556_000_000, 224: 1_820_000_000}  # of the default networks


def scale(images, *, device="cpu", processes=1, size=32, pretrain_images=None):
    return Scale(images, pretrain_images or images, MACS[size], device, processes)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("images", [20, 50, 300, 5_000, 20_000, 500_000, 1_281_167])
def test_what_is_chosen_can_train(images, size, device, processes):
    args, _ = derive(ARGS, frozenset(), scale(images, size=size, device=device, processes=processes))
    check_trainable(args.pretrain, processes, images)
    check_trainable(args.distill, processes, images)
    check_queue(args.pretrain.queue_size, images)
    assert args.pretrain.splits % processes == 0
    assert args.pretrain.batch_size % args.pretrain.splits == 0
    assert 2 <= args.cluster.k <= images // 2
    assert args.pretrain.batch_size * 3 <= max(images, 48)
    assert args.checkpoint_epochs * (images // args.distill.batch_size) >= 25


def test_at_the_papers_size_on_a_gpu_all_is_the_papers():
    args, _ = derive(ARGS, frozenset(), scale(50_000, device="cuda"))
    assert (args.pretrain, args.cluster, args.distill) == (MoCoConfig(), ClusterConfig(), StudentConfig())
    large = derive(ARGS, frozenset(), scale(1_281_167, device="cuda", size=224))[0]
    assert large.cluster.k == 5124  # the paper: 5000


def test_epochs_follow_the_number_of_images_their_size_and_the_device():
    def epochs(images, **of):
        return derive(ARGS, frozenset(), scale(images, **of))[0].distill.epochs

    assert [epochs(images, size=224) for images in (60, 300, 5_000)] == [53, 10, 10]
    assert [epochs(images, size=32) for images in (20, 60, 300, 5_000)] == [400, 173, 34, 10]
    assert [epochs(images, size=224, device="cuda") for images in (300, 30_000, 1_281_167)] == [400, 200, 78]


def test_the_pretext_s_settings_follow_its_own_images():
    args, _ = derive(ARGS, frozenset(), scale(300, pretrain_images=50_000, device="cuda"))
    assert (args.pretrain.batch_size, args.pretrain.epochs) == (512, 200)
    assert (args.distill.batch_size, args.distill.epochs) == (16, 400)


def test_what_is_given_is_taken():
    given = FitArgs(data="images", out="run", cluster=ClusterConfig(k=7), pretrain=MoCoConfig(batch_size=64, lr=0.5))
    names = frozenset({"cluster.k", "pretrain.batch_size", "pretrain.lr", "checkpoint_epochs"})
    args, chosen = derive(given, names, scale(300))
    assert (args.cluster.k, args.pretrain.batch_size, args.checkpoint_epochs) == (7, 64, 1)
    assert args.pretrain.queue_size == 128
    assert not names & chosen.keys()


@pytest.mark.parametrize(
    ("batch", "accumulate", "splits"), [(512, 1, 8), (512, 8, 4), (100, 1, 5), (96, 1, 6), (97, 1, 1), (20, 1, 1)]
)
def test_splits_divide_the_batch_that_is_given(batch, accumulate, splits):
    pretrain = MoCoConfig(batch_size=batch, accumulate=accumulate)
    names = frozenset({"pretrain.batch_size", "pretrain.accumulate"})
    args, _ = derive(FitArgs(data="images", out="run", pretrain=pretrain), names, scale(5_000))
    assert args.pretrain.splits == splits
    check_splits(args.pretrain, 1)


def test_each_choice_is_a_line_that_is_the_flag_that_changes_it(tmp_path):
    _, chosen = derive(ARGS, frozenset(), scale(300))
    assert set(chosen) == set(DERIVED), "what the help marks"
    lines = describe_chosen(chosen, 300).split("\n")
    assert lines[0].startswith("chosen for 300 images")
    assert "  --pretrain.batch_size 16" in lines
    assert "  --pretrain.lr 0.001" in lines
    assert "  --pretrain.symmetric false" in lines
    gpu = describe_chosen(derive(ARGS, frozenset(), scale(300, device="cuda"))[1], 300).split("\n")
    assert "  --pretrain.lr 0.00187" in gpu
    assert len(lines) == 1 + len(chosen)


def test_the_learning_rate_follows_the_batch_size_unless_the_optimiser_is_given():
    args, _ = derive(ARGS, frozenset(), scale(1_000, device="cuda"))
    assert args.pretrain.lr == pytest.approx(0.06 * args.pretrain.batch_size / 512, rel=1e-2)
    assert args.distill.lr == pytest.approx(0.1 * args.distill.batch_size / 128, rel=1e-2)
    for device in ("cpu", "cuda"):
        other, _ = derive(ARGS, frozenset({"pretrain.optimizer"}), scale(1_000, device=device))
        assert other.pretrain.lr == ARGS.pretrain.lr


def test_moco_on_a_cpu_has_settings_of_short_trainings():
    args, _ = derive(ARGS, frozenset(), scale(5_000, size=224))
    assert (args.pretrain.optimizer, args.pretrain.lr, args.pretrain.weight_decay) == ("adamw", 0.001, 0.05)
    assert (args.pretrain.temperature, args.pretrain.symmetric) == (0.2, False)
    assert (args.pretrain.batch_size, args.pretrain.queue_size) == (128, 256)
    assert args.pretrain.epochs == 2 * args.distill.epochs, "each costs half of a symmetric one"
    given = replace(ARGS, pretrain=MoCoConfig(optimizer="sgd", symmetric=True, temperature=0.1))
    names = frozenset({"pretrain.optimizer", "pretrain.symmetric", "pretrain.temperature"})
    args, chosen = derive(given, names, scale(5_000, size=224))
    kept = {"optimizer": "sgd", "symmetric": True, "temperature": 0.1, "lr": 0.06, "weight_decay": 5e-4}
    assert {name: getattr(args.pretrain, name) for name in kept} == kept
    assert args.pretrain.epochs == args.distill.epochs
    assert not {"pretrain.lr", "pretrain.weight_decay"} & chosen.keys()


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("images", [20, 300, 20_000, 500_000])
def test_the_contrastive_method_has_defaults_of_its_own(images, processes):
    args, chosen = derive(replace(ARGS, method="contrastive"), frozenset(), scale(images, processes=processes))
    config, usual = args.student, ContrastiveConfig()
    assert isinstance(config, ContrastiveConfig)
    names = ("optimizer", "lr", "weight_decay", "crop", "crop_scale", "contrast", "contrast_temperature")
    assert {name: getattr(config, name) for name in names} == {name: getattr(usual, name) for name in names}
    check_trainable(config, processes, images)
    check_queue(config.queue_size, images)
    check_splits(config, processes)
    assert config.splits <= max(processes, 4)
    assert "  --distill.crop_scale '[0.2,1]'" in describe_chosen(chosen, images).split("\n")


def test_what_is_given_to_the_contrastive_method_is_taken():
    given = replace(ARGS, method="contrastive", distill=StudentConfig(optimizer="sgd", lr=0.3, crop="pad", splits=2))
    args, chosen = derive(given, frozenset({"distill.optimizer", "distill.crop", "distill.splits"}), scale(5_000))
    chosen_too = {"epochs": 10, "batch_size": 128, "queue_size": 1024, "crop_scale": (0.2, 1.0)}
    assert args.distill == replace(given.distill, **chosen_too)
    assert not {"distill.lr", "distill.weight_decay"} & chosen.keys()


def test_a_budget_chooses_the_epochs():
    args, chosen = derive(replace(ARGS, budget="5h", pretrain=MoCoConfig(warmup_epochs=50)), frozenset(), scale(5_000))
    assert not {"pretrain.epochs", "distill.epochs"} & chosen.keys()
    assert args.pretrain.warmup_epochs == 50


def test_a_damaged_budget_says_where_its_epochs_are(tmp_path):
    (tmp_path / "budget.json").write_text("")
    where = re.escape(str(tmp_path / "config.yaml"))
    with pytest.raises(UserError, match=f"in {where}: give them .* by --pretrain.epochs and --distill.epochs$"):
        chosen_in(tmp_path)


def test_few_images_get_advice_and_those_that_took_it_do_not():
    assert "--init NAME --features ENCODER" in advice(300, ARGS)
    assert advice(20_000, ARGS) is not None
    assert advice(20_001, ARGS) is None
    taken = ({"features": "resnet18"}, {"init": "old"}, {"pretrain": MoCoConfig(init="old")}, {"pretrain_data": "more"})
    for given in taken:
        assert advice(300, FitArgs(data="images", out="run", **given)) is None


def test_very_few_images_are_told_to_be_weak():
    assert "the verdict will be 'weak'" in advice(999, ARGS)
    assert "weak" not in advice(1_000, ARGS)


@pytest.mark.parametrize("given", [{"init": WEIGHTS}, {"pretrain": MoCoConfig(init=WEIGHTS)}])
def test_weights_of_another_image_size_are_pointed_out(given):
    args = FitArgs(data="images", out="run", **given)
    assert "224 px" in (said := size_note(args, 224))
    assert "trained at 64 px: --image_size 64" in said
    assert size_note(args, 64) is None
    assert size_note(replace(args, image_size=224), 224) is None
    assert size_note(ARGS, 224) is None


@pytest.mark.slow
def test_a_folder_of_few_images_runs_without_a_flag_about_sizes(folder_of_images, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["fit", "--data", folder_of_images, "--out", out, "--model", "sssd_resnet18", "--image_size", "32"]
    words += ["--device", "cpu", "--pretrain.epochs", "2", "--distill.epochs", "2", "--baseline", "false"]
    assert sssd(*words) == 0
    said = capsys.readouterr().out
    assert "chosen for 48 images" in said
    assert "\n  --pretrain.batch_size 16\n" in said
    assert "\n  --cluster.k 10\n" in said
    assert "48 images are few" in said
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["cluster"]["k"], saved["pretrain"]["batch_size"], saved["pretrain"]["epochs"]) == (10, 16, 2)
    assert sssd(*words) == 0
    assert "[distill] done before: step 3 of 5" in capsys.readouterr().out
    assert sssd(*words, "--cluster.k", "100") != 0
    assert "K = 100 clusters of 48 images" in one_line(capsys)
