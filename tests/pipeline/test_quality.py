"""`sssd quality`, and the stage, the report and the verdict of `sssd fit`, whose next commands work as printed."""

import json
import shlex

import pytest
import timm

from helpers.commands import TINY, one_line, sssd
from helpers.images import picture, write
from helpers.markdown import by_name, sections, tables
from helpers.networks import save_tiny
from sssd_zoo.cli.arguments import read_arguments
from sssd_zoo.configs import FitArgs, MoCoConfig, QualityArgs
from sssd_zoo.evaluation.reports.markdown import read_results
from sssd_zoo.files import write_json
from sssd_zoo.files.run_folder import mark
from sssd_zoo.pipeline.quality import (
    data_words,
    embed_command,
    from_scratch,
    image_of,
    quality_commands,
    run_verdict,
)
from sssd_zoo.training.runs import save_config


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 images of several sizes without labels, in a folder whose name a shell would split."""
    folder = tmp_path_factory.mktemp("data") / "my photos"
    for number in range(40):
        write(folder / f"{number:02}.jpg", picture(number, 40 + number, 50))
    return folder


@pytest.mark.long
def test_fit_says_what_the_figures_say_and_what_to_do_next(photos, tmp_path, capsys):
    out = tmp_path / "run"
    assert sssd("fit", "--data", photos, "--out", out, *TINY) == 0
    results = read_results(out)
    figures = results["label_free"]
    assert figures["images"] == 40
    assert {"rank_me", "rank_me_exit_1", "clustered_rank_me", "exit_agreement_3", "exits_unanimous"} <= figures.keys()
    assert not any(name.startswith("knn") for name in figures), "there are no labels"
    verdict = results["verdict"]
    assert verdict["level"] == "weak"
    assert "learned from 40 images alone, which are too few" in verdict["sentence"]

    text = (out / "report.md").read_text()
    assert verdict["sentence"] in text, "it is not cut"
    assert text.index("Verdict: weak") < text.index("**Data**")
    assert all(line in text for line in verdict["next"])
    quality = sections(text)["Quality without labels"]
    rows = by_name(tables(quality)[0][1:])
    assert rows["effective rank (RankMe)"][0] == f"{figures['clustered_rank_me']:.1f}"
    assert rows["effective rank (RankMe)"][-1] == f"{figures['rank_me']:.1f}"
    for name in rows:
        assert f"- {name}: " in quality

    commands = [shlex.split(line) for line in verdict["next"]]
    weights = "sssd_resnet18.dist_tiny_imagenet_32"
    assert commands[0][:3] == ["sssd", "embed", weights]
    encoder = ["--features", "tf_efficientnet_lite0.in1k", "--init", weights, "--out", f"{out}-encoder"]
    assert commands[1][-6:] == encoder
    for words in commands:
        if words[1] == "fit":
            settings, _ = read_arguments("fit", words[2:], "sssd fit")
            assert (settings.data, settings.image_size, settings.model) == (str(photos), 32, "sssd_resnet18")
    (predict,) = [words[1:] for words in commands if words[1] == "predict"]
    capsys.readouterr()
    assert sssd(*predict) == 0
    assert "00.jpg" in capsys.readouterr().out
    for network in (out, out / "model"):
        assert sssd("quality", network, "--data", photos, "--format", "json") == 0
        again = json.loads(capsys.readouterr().out)["verdict"]
        assert "learned from 40 images alone" in again["sentence"], "the same images, so the same verdict"


def test_features_and_weights_of_a_run_on_few_images_know_no_more(tmp_path):
    for name, results in (
        ("few", {"from_scratch": True, "images": 300}),
        ("many", {"from_scratch": True, "images": 50_000}),
        ("other", {"from_scratch": False, "images": 300}),
    ):
        mark(tmp_path / name, "fit")
        (tmp_path / name / "model").mkdir()
        write_json(
            tmp_path / name / "metrics.json",
            {**results, **{"data": "x", "split": "train", "model": "sssd_resnet18", "image_size": 32}},
        )

    def alone(**settings):
        return from_scratch(FitArgs(data="x", out="y", **settings))

    few, many, other = (str(tmp_path / name) for name in ("few", "many", "other"))
    assert alone()
    assert alone(features=few, init=f"{few}/model")
    assert alone(features=f"local-dir:{few}/model")
    assert alone(pretrain=MoCoConfig(init=few))
    assert not alone(features=few, pretrain_data="more")
    assert not alone(features=few, init=many)
    assert not alone(init=other)
    assert not alone(features="resnet18")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["encoder", "weights"]),
        ({"features": "resnet18", "init": "old", "teacher_size": 64}, ["longer"]),
        ({"pretrain": MoCoConfig(init="old")}, ["warm", "encoder"]),
        ({"pretrain": MoCoConfig(init="old"), "warm_start": True}, ["encoder", "longer"]),
        ({"pretrain": MoCoConfig(init="old"), "pretrain_model": "sssd_resnet50"}, ["encoder", "longer"]),
        ({"channels": 4}, ["longer"]),
    ],
)
def test_what_is_proposed_depends_on_what_was_tried(given, names, tmp_path):
    args = FitArgs(data="images", out="run", model="sssd_resnet18", **given)
    figures = {"std": 0.9, "two_view_consistency": 0.05}
    fits = [
        words
        for line in run_verdict(args, args.model, 3000, figures)["next"]
        if (words := shlex.split(line))[1] == "fit"
    ]
    assert [words[-1] for words in fits] == [f"run-{name}" for name in names]
    assert not any("old" in words for words in fits if args.pretrain_model is not None), "they fit another architecture"
    for words in fits:
        if "--config" in words:  # all settings of the run but one
            assert words[2:4] == ["--config", "run/config.yaml"]
            save_config(tmp_path, args)
            again, _ = read_arguments("fit", ["--config", str(tmp_path / "config.yaml"), *words[4:]], "sssd fit")
            changed = {name for name, value in vars(args).items() if vars(again)[name] != value}
            assert len(changed - {"out"}) == 1


@pytest.mark.parametrize("given", [{}, {"features": "resnet18", "init": "old"}])
def test_of_very_few_images_other_weights_as_they_are_come_first(given):
    args = FitArgs(data="images", out="run", model="sssd_resnet18", **given)
    first = run_verdict(args, args.model, 999, {"std": 0.9, "two_view_consistency": 0.05})["next"][0]
    weights = "sssd_resnet18.dist_tiny_imagenet_32"
    assert shlex.split(first) == ["sssd", "embed", weights, "--data", "images", "--out", "embeddings.parquet"]


@pytest.mark.parametrize(
    ("model", "student", "size", "distils"),
    [
        ("sssd_resnet18_cifar.cifar10", "sssd_resnet18_cifar", 32, False),
        ("sssd_resnet18", "sssd_resnet18", 64, False),
        ("resnet18", "sssd_resnet18", 224, True),
    ],
)
def test_what_is_proposed_starts_from_weights_that_fit(model, student, size, distils):
    network = timm.create_model(model, pretrained=model != "resnet18")
    commands = quality_commands(QualityArgs(data="images", model=model), network)
    weights = {"sssd_resnet18": "dist_tiny_imagenet_32", "sssd_resnet18_cifar": "dist_cifar10"}[student]
    fits = [words for line in commands.improve + commands.use if (words := shlex.split(line))[1] == "fit"]
    assert len(fits) == 1 + distils, "a network with exits is not distilled into another of its kind"
    assert len({words[-1] for words in fits}) == len(fits), "each has a folder of its own"
    for words in fits:
        settings, _ = read_arguments("fit", words[2:], "sssd fit")
        assert (settings.model, settings.image_size) == (student, size)
        assert settings.init == f"{student}.{weights}"
    assert shlex.split(commands.use[-1])[:3] == ["sssd", "embed", model]


@pytest.mark.slow
def test_with_labels_knn_joins_and_a_rerun_repeats_nothing(folder_of_images, tmp_path, capsys):
    data, out = folder_of_images, tmp_path / "run"
    words = ("fit", "--data", data, "--out", out, *TINY, "--baseline", "false")
    assert sssd(*words) == 0
    assert "knn" in read_results(out)["label_free"]
    capsys.readouterr()
    assert sssd(*words) == 0
    assert "[quality] done before" in capsys.readouterr().out


def test_command(photos, tmp_path, capsys):
    network = save_tiny(tmp_path / "network", 3)
    words = ["quality", network, "--data", photos, "--device", "cpu", "--images", "20"]
    assert sssd(*words, "--format", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["label_free"]["images"] == 20
    assert {"two_view_consistency", "std_exit_3", "exit_agreement_4"} <= answer["label_free"].keys()
    assert answer["verdict"]["level"] == "weak"
    assert sssd(*words) == 0
    table = capsys.readouterr().out
    assert "network: weak." in table
    assert f"{answer['label_free']['std']:.3f}  std of the embeddings" in table


def test_an_image_whose_name_cannot_be_pasted_is_not_proposed(tmp_path):
    write(tmp_path / "a.png", picture(0))
    (tmp_path / "a.png").rename(tmp_path / "a\n```\n.png")
    assert image_of(str(tmp_path)) is None
    write(tmp_path / "b c.png", picture(0))
    assert image_of(str(tmp_path)) == str(tmp_path / "b c.png")


def test_one_image_is_too_few(tmp_path, capsys):
    write(tmp_path / "data" / "a.png", picture(0))
    network = save_tiny(tmp_path / "network", 3)
    assert sssd("quality", network, "--data", tmp_path / "data") == 2
    assert "needs at least 2" in one_line(capsys)


def test_the_options_that_name_images_read_back_as_they_were():
    args = QualityArgs(model="m", data="a b", split="train[:5]", unlabelled=True, max_corrupt=3, workers=0)
    words = data_words(args)
    assert read_arguments("quality", ["m", *words], "sssd quality")[0] == args
    assert "--streaming" not in words


def test_what_a_run_kept_in_memory_is_embedded_without():
    words = shlex.split(embed_command("run", QualityArgs(model="m", data="a", in_memory=True, max_corrupt=3)))
    assert words == ["sssd", "embed", "run", "--data", "a", "--max_corrupt", "3", "--out", "embeddings.parquet"]
