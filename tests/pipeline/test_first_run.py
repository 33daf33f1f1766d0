"""The first hour with `sssd fit`: mistakes at once, an estimate, a budget, and nothing of an earlier run mixed in."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from helpers.commands import TINY, one_line, sssd
from helpers.disk import contents
from helpers.runs import fitted
from sssd_zoo.configs import AnchoredConfig, ContrastiveConfig, MoCoConfig, SelfDistillationConfig
from sssd_zoo.configs.ranges import seconds_of
from sssd_zoo.distributed.progress import duration
from sssd_zoo.files import RUN_MARK
from sssd_zoo.pipeline import estimate, fit
from sssd_zoo.pipeline.budget import as_budget
from sssd_zoo.pipeline.distill import distill_network
from sssd_zoo.pipeline.forecast import Forecast
from sssd_zoo.pipeline.mistakes import Mistakes
from sssd_zoo.tasks import AnchoredSelfDistillation, ContrastiveSelfDistillation
from sssd_zoo.training.trial import StepTime

QUICK = [*TINY, "--probe.probe_epochs", "2", "--workers", "0"]


@pytest.fixture(scope="module")
def finished(folder_of_images, tmp_path_factory):
    """A finished run of labelled images, with its baseline; tests work on copies."""
    return fitted(tmp_path_factory.mktemp("finished"), folder_of_images, *QUICK)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def weights(out: Path) -> dict:
    return load_file(out / "distill" / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


class TestMistakes:
    def test_all_are_told_at_once_and_before_any_image_is_decoded(self, folder_of_images, tmp_path, capsys):
        data, out = tmp_path / "data", tmp_path / "run"
        shutil.copytree(folder_of_images, data)
        (data / "red" / "00.png").write_bytes(b"no image")  # which decoding would refuse
        wrong = ["--pretrain.batch_size", "64", "--pretrain.queue_size", "100", "--pretrain.splits", "7"]
        wrong += ["--cluster.k", "49", "--distill.batch_size", "50", "--soft", "0.2", "--warm_start", "--init", "x"]
        assert sssd("fit", "--data", data, "--out", out, "--device", "cpu", "--image_size", "32", *wrong) == 2
        line = one_line(capsys)
        assert line.startswith("error: 8 mistakes: (1) ")
        for words in (
            "--warm_start and --init both say",
            "--soft needs the distances",
            "pretrain: batch_size 64 is larger than the data set of 48 images",
            "pretrain: queue_size 100 is larger",
            "pretrain: splits 7 must divide the batch of 64",
            "distill: batch_size 50 is larger",
            "K = 49 clusters of 48 images",
        ):
            assert words in line
        assert not out.exists()

    def test_settings_that_contradict_each_other_are_told_of_every_training(self, tmp_path, capsys):
        wrong = ["--pretrain.warmup_epochs", "500", "--distill.optimizer", "nonsense"]
        assert sssd("fit", "--data", tmp_path, "--out", tmp_path / "run", *wrong) == 2
        line = one_line(capsys)
        assert "pretrain: warmup_epochs is 500" in line
        assert "distill: optimizer 'nonsense'" in line

    def test_what_cannot_be_opened_is_told_with_the_rest(self, folder_of_images, tmp_path, capsys):
        wrong = ["--pretrain_split", "train", "--split", "nowhere", "--teacher_size", "64"]
        assert sssd("fit", "--data", folder_of_images, "--out", tmp_path / "run", *wrong) == 2
        line = one_line(capsys)
        assert "3 mistakes" in line
        assert "nowhere" in line

    def test_a_message_is_noted_once(self):
        mistakes = Mistakes()
        mistakes.tell()
        for _ in range(2):
            mistakes.note("too large")
        with pytest.raises(ValueError, match=r"^too large$"):
            mistakes.tell()

    def test_a_test_split_that_is_missing_is_told_before_decoding(self, folder_of_images, tmp_path, capsys):
        assert sssd("fit", "--data", folder_of_images, "--out", tmp_path / "run", *QUICK, "--test_split", "nope") == 2
        assert "nope" in one_line(capsys)


class TestForecast:
    def test_it_begins_with_what_is_expected_and_goes_on_with_what_was_measured(self):
        forecast = Forecast(["pretrain", "labels", "distill", "probe"], {"pretrain": 600, "labels": 60, "distill": 300})
        assert forecast.describe("pretrain") == "step 1 of 4, about 16 min left"
        forecast.finished("pretrain", 1200)
        assert forecast.describe("labels") == "step 2 of 4, about 12 min left"
        forecast.finished("labels", 0)
        assert forecast.describe("probe") == "step 4 of 4"

    def test_times_in_words(self):
        assert [duration(seconds) for seconds in (0.2, 89, 91, 3600, 7260)] == [
            "1 s",
            "89 s",
            "2 min",
            "60 min",
            "2 h 01 min",
        ]

    @pytest.mark.parametrize(
        "more",
        [
            pytest.param(["--method", "sssd"], id="sssd"),
            pytest.param(["--method", "anchored"], id="anchored", marks=pytest.mark.slow),
            pytest.param([], id="contrastive", marks=pytest.mark.slow),
            pytest.param(
                ["--method", "anchored", "--distill.cached_views", "2"], id="cached views", marks=pytest.mark.slow
            ),
            pytest.param(
                [
                    "--method",
                    "anchored",
                    "--distill.cached_views",
                    "2",
                    "--distill.dense",
                    "true",
                    "--image_size",
                    "64",
                ],
                id="cached views with maps",
                marks=pytest.mark.slow,
            ),
        ],
    )
    @pytest.mark.long
    def test_measuring_changes_no_weight(self, more, folder_of_images, tmp_path, monkeypatch, capsys):
        words = ["fit", "--data", folder_of_images, *QUICK, "--unlabelled", *more]
        assert sssd(*words, "--out", tmp_path / "plain") == 0
        assert "step 1 of 4 ->" in capsys.readouterr().out, "so few steps are not worth measuring"
        monkeypatch.setattr(estimate, "WORTH", 0)
        measured, tasks = estimate.measure_step, []
        monkeypatch.setattr(
            estimate, "measure_step", lambda task, *a, **kw: tasks.append(task) or measured(task, *a, **kw)
        )
        assert sssd(*words, "--out", tmp_path / "measured") == 0
        seen = [task.anchor.spec.size for task in tasks if isinstance(task, AnchoredSelfDistillation)]
        assert seen == ([tasks[-1].size] if "anchored" in more else []), "the encoder is the run's pretext"
        assert isinstance(tasks[-1], ContrastiveSelfDistillation) is (not more)
        said = capsys.readouterr().out
        assert "by a few measured steps of each training" in said
        assert "[distill]: step 3 of 4, about " in said
        assert same(weights(tmp_path / "plain"), weights(tmp_path / "measured"))
        assert contents_but_times(tmp_path / "plain") == contents_but_times(tmp_path / "measured")
        assert sssd(*words, "--out", tmp_path / "measured") == 0, "nothing is left to do"
        assert "[distill] done before: step 3 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (AnchoredConfig(), SelfDistillationConfig(epochs=3), True),
        (AnchoredConfig(warmup_epochs=5), SelfDistillationConfig(epochs=3, lr=1.0, schedule="step"), True),
        (AnchoredConfig(anchor=1.0, warmup_epochs=5), AnchoredConfig(anchor=1.0, epochs=3), True),
        (ContrastiveConfig(warmup_epochs=5), ContrastiveConfig(epochs=3), True),
        (AnchoredConfig(anchor=1.0), SelfDistillationConfig(), False),
        (ContrastiveConfig(), SelfDistillationConfig.of(ContrastiveConfig()), False),
        (AnchoredConfig(sizes=[16, 32]), AnchoredConfig(), False),
        (AnchoredConfig(batch_size=64), AnchoredConfig(), False),
        (AnchoredConfig(), MoCoConfig(), False),
    ],
)
def test_trainings_whose_steps_take_as_long_are_measured_once(one, other, same):
    assert estimate.alike(one, other) is same
    assert estimate.alike(other, one) is same


def contents_but_times(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


class TestDamage:
    @pytest.mark.long
    def test_of_what_is_derived_is_repaired(self, run, folder_of_images):
        (run / "metrics.json").write_text("{")
        assert sssd("fit", "--data", folder_of_images, "--out", run, *QUICK) == 0
        assert json.loads((run / "metrics.json").read_text())["images"] == 48

    def test_of_a_record_names_what_to_do(self, run, folder_of_images, capsys):
        (run / "steps" / "distill.json").write_text("")
        assert sssd("fit", "--data", folder_of_images, "--out", run, *QUICK) == 2
        assert "remove this file to make the stage again" in one_line(capsys)
        assert sssd("clean", run) == 0


class TestLabels:
    @pytest.mark.long
    def test_a_network_of_other_labels_is_not_taken(self, run, folder_of_images, capsys):
        words = ["fit", "--data", folder_of_images, "--out", run, *QUICK]
        record = run / "steps" / "distill.json"
        content = json.loads(record.read_text())
        labels = content["inputs"].pop("labels")
        record.write_text(json.dumps(content))  # as an earlier version left it
        assert sssd(*words) == 0
        assert capsys.readouterr().out.count("done before") == 6
        content["inputs"]["labels"] = labels[::-1]  # as if k-means had come out otherwise, when it was repeated
        record.write_text(json.dumps(content))
        before = weights(run)
        assert sssd(*words) == 2
        assert "was made with other settings or data (labels: " in one_line(capsys)
        assert same(weights(run), before)
        assert sssd(*words, "--overwrite") == 0
        assert "[distill] repeated, for other labels" in capsys.readouterr().out
        assert json.loads(record.read_text())["inputs"]["labels"] == labels


class TestBudget:
    def test_a_warm_up_that_is_too_long_for_it(self, folder_of_images, tmp_path, monkeypatch, capsys):
        def second_long(setup, work):
            return estimate.Rates(dict.fromkeys(work.trainings, StepTime(1.0, 0.0)), 0.0, 0.0)

        monkeypatch.setattr(fit, "measure", second_long)
        words = ["fit", "--data", folder_of_images, "--out", tmp_path / "run", *TINY[:4], "--unlabelled"]
        words += ["--workers", "0", "--device", "cpu", "--budget", "30s"]
        assert sssd(*words, "--pretrain.warmup_epochs", "9") == 2
        line = one_line(capsys)
        assert re.search(r"30s is enough for [1-4] epochs of each training, and pretrain.warmup_epochs 9 must be", line)

    @pytest.mark.slow
    def test_it_chooses_the_epochs_once(self, folder_of_images, tmp_path, capsys):
        out = tmp_path / "run"
        words = ["fit", "--data", folder_of_images, "--out", out, "--model", "sssd_resnet18", "--image_size", "32"]
        words += ["--device", "cpu", "--unlabelled", "--workers", "0", "--budget"]
        assert sssd(*words, "1s") == 2
        told = re.search(r"--budget is too short: one epoch of each stage takes about (\d+) s on", one_line(capsys))
        budget = f"{20 + 5 * int(told[1])}s"  # enough also beside other programs
        assert sssd(*words, budget) == 0
        said = capsys.readouterr().out
        assert f"percent of the --budget of {budget}" in said
        saved = yaml.safe_load((out / "config.yaml").read_text())
        epochs = saved["pretrain"]["epochs"]
        assert 1 <= epochs == saved["distill"]["epochs"]
        assert f"--distill.epochs {epochs}" in said
        assert saved["budget"] is None, "as a recipe it gives the epochs"
        assert sssd(*words, budget) == 0
        assert "[distill] done before" in capsys.readouterr().out
        kept = (out / "budget.json").read_bytes()
        assert sssd(*words, budget, "--distill.lr", "0.01") == 2
        line = one_line(capsys)
        assert "distill.lr" in line
        assert "pretrain.epochs" not in line
        assert (out / "budget.json").read_bytes() == kept
        assert sssd("fit", "--config", out / "config.yaml") == 0
        assert "[distill] done before" in capsys.readouterr().out

    @pytest.mark.long
    def test_its_epochs_stay_unless_it_or_a_training_changes(self, folder_of_images, tmp_path, monkeypatch, capsys):
        measured = []

        def measure(setup, work):
            measured.append(work)
            return estimate.Rates(dict.fromkeys(work.trainings, StepTime(1.0, 0.0)), 0.0, 0.0)

        monkeypatch.setattr(fit, "measure", measure)
        monkeypatch.setattr(fit, "epochs_within", lambda setup, work, rates, seconds: round(seconds / 300))
        out = tmp_path / "run"
        words = ["fit", "--data", folder_of_images, "--out", out, "--workers", "0", "--baseline", "false"]
        words += [word for pair in pairwise(TINY) if pair[0] in TINY[::2] and "epochs" not in pair[0] for word in pair]
        budget = ["--budget", "10m"]
        assert sssd(*words, *budget) == 0
        assert "percent of the --budget of 10m" in capsys.readouterr().out
        assert sssd(*words, *budget) == 0
        said = capsys.readouterr().out
        assert "[probe] done before" in said
        assert re.search(r"Done in [\d.]+ minutes\. ", said), "nothing was done, so nothing of the budget was used"
        # What measures, and the clusters, decide nothing of how long an epoch takes.
        other = [*words, "--cluster.k", "5", "--probe.probe_weight_decay", "0.1"]
        assert sssd(*other, *budget, "--overwrite") == 0
        assert "[pretrain] done before" in capsys.readouterr().out
        assert len(measured) == 1
        assert sssd(*other, "--budget", "20m") == 2
        line = one_line(capsys)
        assert "(budget: '10m' there, '20m' now; " in line
        assert "pretrain.epochs: 2 there, 4 now" in line
        assert sssd(*other) == 2
        assert "(budget: '10m' there, None now; " in one_line(capsys)
        record = json.loads((out / "budget.json").read_text())
        record["chosen_for"]["settings"] += [{"k": 4}]  # as of an earlier version, which kept those of all stages
        (out / "budget.json").write_text(json.dumps(record))
        assert sssd(*other, *budget) == 0

    @pytest.mark.parametrize("text", ["90s", "30m", "2h", "1h30m", "1h2m3s"])
    def test_it_is_told_as_it_is_given(self, text):
        assert as_budget(seconds_of(text)) == ("1m30s" if text == "90s" else text)

    def test_not_beside_epochs(self, folder_of_images, tmp_path, capsys):
        words = ["--budget", "1h30m", "--pretrain.epochs", "3", "--distill.epochs", "3"]
        assert sssd("fit", "--data", folder_of_images, "--out", tmp_path / "run", "--image_size", "32", *words) == 2
        line = one_line(capsys)
        assert "--budget chooses the epochs, and --pretrain.epochs gives them" in line
        assert "--distill.epochs gives them" in line

    @pytest.mark.parametrize("text", ["30", "m", "1.5h", "0s", "30m2h", "-1s"])
    def test_a_time_has_units(self, text, tmp_path, capsys):
        assert sssd("fit", "--data", tmp_path, "--out", tmp_path / "run", f"--budget={text}") == 2
        assert "must be a time such as 90s, 30m, 2h or 1h30m" in one_line(capsys)


class TestAFinishedRun:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (["--image_size", "48"], "image_size: 32 there, 48 now"),
            (["--cluster.k", "5"], "cluster.k: 4 there, 5 now"),
            (["--distill.lr", "0.5"], "distill.lr: 0.001 there, 0.5 now"),
            (["--baseline", "false"], "baseline: True there, False now"),
            (["--probe.probe_epochs", "3"], "probe.probe_epochs: 2 there, 3 now"),
            (["--unlabelled"], "there"),
        ],
        ids=lambda words: words[0] if isinstance(words, list) else None,
    )
    def test_other_settings_are_refused_before_anything_is_done(self, change, says, run, folder_of_images, capsys):
        before = contents(run)
        assert sssd("fit", "--data", folder_of_images, "--out", run, *QUICK, *change) == 2
        line = one_line(capsys)
        assert "was made with other settings or data" in line
        assert says in line
        assert "--overwrite" in line
        assert contents(run) == before

    def test_other_data_are_refused(self, run, folder_of_images, tmp_path, capsys):
        shutil.copytree(folder_of_images, tmp_path / "data")
        shutil.copy(tmp_path / "data" / "red" / "00.png", tmp_path / "data" / "red" / "99.png")
        assert sssd("fit", "--data", tmp_path / "data", "--out", run, *QUICK) == 2
        assert "images: 48 there, 49 now" in one_line(capsys)

    def test_where_and_how_it_runs_may_change(self, run, folder_of_images, capsys):
        more = ["--log_every", "3", "--keep_last", "1", "--max_corrupt", "2", "--cluster.on_disk", "true"]
        assert sssd("fit", "--data", folder_of_images, "--out", run, *QUICK, *more) == 0
        said = capsys.readouterr().out
        assert said.count("done before") == 6

    @pytest.mark.slow
    def test_nothing_of_it_survives_an_overwrite(self, run, folder_of_images, tmp_path, capsys):
        (run / "baseline" / "notes.txt").write_text("mine")
        (run / "figures" / "holiday.png").write_bytes(b"mine")
        assert (run / "figures" / "accuracy.png").exists()
        words = ["fit", "--data", folder_of_images, "--out", run, *QUICK, "--unlabelled", "--overwrite"]
        assert sssd(*words) == 0
        assert not (run / "probe").exists()
        assert {path.name for path in (run / "baseline").iterdir()} == {"notes.txt", RUN_MARK}
        assert sorted(path.stem for path in (run / "steps").iterdir()) == ["distill", "labels", "pretrain", "quality"]
        assert not (run / "figures" / "accuracy.png").exists()
        assert (run / "figures" / "holiday.png").read_bytes() == b"mine"
        results = json.loads((run / "metrics.json").read_text())
        assert not {"accuracy", "clustered", "classes"} & results.keys()
        assert "random labels" not in (run / "report.md").read_text()
        assert "red" not in (run / "model" / "config.json").read_text()
        assert sssd("card", "--run", run, "--out", tmp_path / "card", "--license", "mit") == 0
        assert sorted(path.name for path in (tmp_path / "card" / "figures").iterdir()) == [
            *("cluster_sizes.png", "curves.png")  # clusters.png shows images
        ]
        assert "clusters.png" not in (tmp_path / "card" / "metrics.json").read_text()
        assert sssd(*words[:-1]) == 0, "it is a finished run like any other"


class TestMoreEpochs:
    @pytest.mark.slow
    def test_a_finished_run_goes_on(self, run, folder_of_images, capsys, monkeypatch):
        seeds = []

        def recorded(data, labels, config, runtime, spec, **kwargs):
            seeds.append((spec.out.name, runtime.seed))
            return distill_network(data, labels, config, runtime, spec, **kwargs)

        monkeypatch.setattr("sssd_zoo.pipeline.fit.distill_network", recorded)
        words = ["fit", "--data", folder_of_images, "--out", run, *QUICK]
        before = weights(run)
        for link in (run / "config.json", run / "model.safetensors"):  # as where a run is copied with links followed
            content = link.read_bytes()
            link.unlink()
            link.write_bytes(content)
        assert sssd(*words, "--more_epochs", "2") == 0
        assert (run / "config.json").is_symlink()
        assert (run / "model.safetensors").is_symlink()
        said = capsys.readouterr().out
        assert said.count("done before") == 4
        assert "[more-1]" in said
        assert same(before, weights(run)), "the first training stays"
        assert yaml.safe_load((run / "config.yaml").read_text())["more_epochs"] == [2]
        assert "2 after the first 1" in (run / "report.md").read_text()
        once = load_file(run / "model" / "model.safetensors")
        log = [json.loads(line) for line in (run / "more-1" / "metrics.jsonl").read_text().splitlines()]
        assert (log[-1]["step"], log[-1]["epoch"]) == (6, 2.0)
        assert sssd(*words, "--more_epochs", "2") == 0
        said = capsys.readouterr().out
        assert "7 stages: " in said
        assert said.count("done before") == 7, "the same command resumes, and here has nothing to do"
        assert sssd(*words) == 2
        assert "more_epochs: [2] there, [] now" in one_line(capsys)
        assert sssd(*words, "--more_epochs", "[2, 1]") == 0
        assert capsys.readouterr().out.count("done before") == 5
        assert [name for name, _ in seeds] == ["more-1", "more-2"]
        assert len({0, *(seed for _, seed in seeds)}) == 3, "each sees new views, in another order"
        assert not same(once, load_file(run / "model" / "model.safetensors"))
        assert sssd(*words, "--overwrite") == 0
        assert not (run / "more-1").exists()
        assert same(before, weights(run))

    def test_it_is_no_way_around_a_refusal(self, run, folder_of_images, capsys):
        words = ["fit", "--data", folder_of_images, "--out", run, *QUICK, "--more_epochs", "1", "--distill.lr", "0.5"]
        assert sssd(*words) == 2
        assert "distill.lr: 0.001 there, 0.5 now" in one_line(capsys)
