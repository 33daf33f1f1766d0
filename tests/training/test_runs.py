"""What tells runs apart, and what a run folder says of itself."""

import pytest
import timm
import yaml

import sssd_zoo  # noqa: F401  registers the models with timm
from helpers.commands import one_line, sssd
from helpers.disk import contents, files_up_to
from helpers.images import file_bytes, picture, write_parquet
from sssd_zoo.cli.arguments import read_arguments
from sssd_zoo.configs import DistillArgs, MoCoConfig, OptimConfig, SEEDConfig
from sssd_zoo.errors import UserError
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline.pretrain import check_splits
from sssd_zoo.training.engine import Trainer
from sssd_zoo.training.runs import check_queue, method_settings, save_config, save_corrupt, settings_of


def distill(**changes: object) -> DistillArgs:
    return DistillArgs(**{"data": "photos", "labels": "random", "k": 4, "out": "run", **changes})


def test_settings_tell_values_apart():
    assert settings_of(OptimConfig(epochs=3)) != settings_of(OptimConfig(epochs=4))


def test_settings_of_later_versions_at_their_defaults_are_as_good_as_not_there():
    plain = settings_of(distill())
    assert not {"exits", "init", "anchor"} & plain.keys()
    assert plain == settings_of(distill(exits="plain", init=None, anchor=0.0))


@pytest.mark.parametrize("change", [{"exits": "attention"}, {"init": "folder"}, {"anchor": 2.0}])
def test_settings_of_later_versions_tell_runs_apart_where_they_are_used(change):
    changed = settings_of(distill(**change))
    assert changed != settings_of(distill())
    assert changed.items() >= change.items()


def test_settings_of_a_method_are_what_it_adds():
    for kind in (MoCoConfig, SEEDConfig):
        settings = method_settings(kind(epochs=7, momentum=0.5), kind)
        assert {"temperature", "queue_size"} <= settings.keys()
        assert not {"epochs", "momentum", "lr"} & settings.keys()
    assert method_settings(OptimConfig(), OptimConfig) == {}


def test_the_settings_of_a_run_are_a_recipe_that_gives_them_again(tmp_path):
    args = distill(epochs=3, batch_size=8, milestones=[1, 2], resume=True, out=str(tmp_path / "run"))
    save_config(tmp_path, args)
    assert not {"resume", "overwrite"} & yaml.safe_load((tmp_path / "config.yaml").read_text()).keys()
    again, _ = read_arguments("distill", ["--config", str(tmp_path / "config.yaml"), "--resume"], "sssd distill")
    assert again == args


def test_a_queue_may_be_as_large_as_the_data_and_no_larger():
    check_queue(48, 48)
    check_queue(10**6, None)
    with pytest.raises(UserError, match=r"queue_size 49 .* 48 images.*at most 24"):
        check_queue(49, 48)


@pytest.mark.parametrize(
    ("batch", "accumulate", "splits", "processes"), [(8, 1, 8, 1), (16, 2, 8, 1), (8, 1, 8, 4), (7, 1, 7, 1)]
)
def test_no_part_of_a_batch_may_be_a_single_image(batch, accumulate, splits, processes):
    config = MoCoConfig(batch_size=batch, accumulate=accumulate, splits=splits)
    with pytest.raises(
        UserError, match=rf"splits {splits} must be lower for a batch of {splits}, .*lower splits or raise"
    ):
        check_splits(config, processes)


def test_what_does_not_go_into_a_batch_is_told_apart():
    with pytest.raises(UserError, match=r"^splits 8 must divide the batch of 60 into equal parts"):
        check_splits(MoCoConfig(batch_size=60), 1)
    with pytest.raises(UserError, match=r"^splits 8 must be a multiple of the 3 processes; change splits$"):
        check_splits(MoCoConfig(batch_size=60), 3)


def test_pretrain_tells_all_that_is_wrong_for_the_images(folder_of_images, tmp_path, capsys):
    assert sssd("pretrain", "--data", folder_of_images, "--out", tmp_path / "run", "--batch_size", "60") == 2
    line = one_line(capsys)
    for words in ("batch_size 60 is larger", "queue_size 4096 is larger", "splits 8 must divide the batch of 60"):
        assert words in line


@pytest.mark.parametrize(
    ("batch", "accumulate", "splits", "processes"), [(16, 1, 8, 1), (8, 2, 2, 2), (8, 1, 1, 1), (16, 1, 8, 4)]
)
def test_two_images_in_a_part_are_enough(batch, accumulate, splits, processes):
    check_splits(MoCoConfig(batch_size=batch, accumulate=accumulate, splits=splits), processes)


def test_a_resumed_run_adds_to_its_corrupt_images_and_a_new_one_replaces_them(tmp_path):
    file = tmp_path / "corrupt.tsv"
    save_corrupt(tmp_path, [("a.png", "cut"), (7, "no image")])
    before = file.read_text()
    save_corrupt(tmp_path, [], resumed=True)
    assert file.read_text() == before == "image\treason\na.png\tcut\n7\tno image\n"
    save_corrupt(tmp_path, [("c.png", "cut"), (7, "no image")], resumed=True)
    assert file.read_text() == before + "c.png\tcut\n"
    save_corrupt(tmp_path, [("c.png", "cut")])
    assert file.read_text() == "image\treason\nc.png\tcut\n"
    save_corrupt(tmp_path, [])
    assert not file.exists()


class TestResumedCommand:
    """`sssd pretrain` on a stream of 8 images, the last of which is none."""

    @pytest.fixture
    def words(self, tmp_path) -> list[str]:
        pictures = [file_bytes(picture(number)) for number in range(7)]
        data = write_parquet(tmp_path / "my.parquet", [*pictures, b"x"])
        words = ["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), "--streaming", "true"]
        words += ["--model", "test_resnet", "--image_size", "32", "--batch_size", "4", "--splits", "2"]
        words += ["--queue_size", "8", "--max_corrupt", "1", "--epochs", "2", "--device", "cpu"]
        return [*words, "--steps_per_epoch", "2"]

    @pytest.mark.long
    def test_one_that_is_refused_leaves_the_folder_as_it_was(self, words, tmp_path, capsys):
        assert sssd(*words) == 0
        config, corrupt = (tmp_path / "run" / name for name in ("config.yaml", "corrupt.tsv"))
        before = config.read_bytes(), corrupt.read_bytes()
        assert b"it is not an image" in before[1]
        for changed, told in (
            ("--lr", "optim.lr: 0.06 there, 0.5 now"),
            ("--steps_per_epoch", "epoch: 2 there, 3 now"),
        ):
            capsys.readouterr()
            assert sssd(*words, changed, "0.5" if changed == "--lr" else "3", "--resume") == 2
            assert told in one_line(capsys)
            assert (config.read_bytes(), corrupt.read_bytes()) == before

        assert sssd(*words, "--workers", "1", "--resume") == 0
        assert yaml.safe_load(config.read_text())["workers"] == 1, "it is the same run"
        assert corrupt.read_bytes() == before[1], "nothing was read"

    @pytest.mark.long
    def test_one_that_is_stopped_keeps_the_corrupt_images_that_it_met(self, words, tmp_path, monkeypatch):
        def stop(self, *args):
            if self.progress.step == 3:
                raise KeyboardInterrupt
            step(self, *args)

        step = Trainer.step
        monkeypatch.setattr(Trainer, "step", stop)
        assert sssd(*words) == 130
        assert "it is not an image" in (tmp_path / "run" / "corrupt.tsv").read_text()


PRETRAIN = [
    *("pretrain", "--model", "sssd_resnet18", "--image_size", "32", "--batch_size", "16", "--queue_size", "16"),
    *("--splits", "2", "--workers", "0", "--device", "cpu", "--epochs", "1"),
]


class TestNothingIsLost:
    def test_a_complete_network_without_checkpoints_is_not_trained_again(self, folder_of_images, tmp_path, capsys):
        words = [*PRETRAIN, "--data", folder_of_images, "--out", tmp_path / "run"]
        assert sssd(*words) == 0
        assert sssd("clean", tmp_path / "run") == 0
        before = contents(tmp_path / "run")
        capsys.readouterr()
        for more in ([], ["--lr", "0.5", "--epochs", "2"]):
            assert sssd(*words, *more, "--resume") == 2
            assert "holds a complete network and no checkpoint" in one_line(capsys)
        assert contents(tmp_path / "run") == before

    @pytest.mark.parametrize("given", ["run", "local-dir:run", "run/../run"])
    def test_the_weights_to_start_from_are_not_replaced_by_those_of_the_run(
        self, given, folder_of_images, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        save_network(tmp_path / "run", timm.create_model("resnet18", num_classes=0), "resnet18", input_size=32)
        before = contents(tmp_path / "run")
        assert sssd(*PRETRAIN, "--data", folder_of_images, "--out", "run", "--init", given, "--overwrite") == 2
        assert f"--init {given} lies in --out run, where it could be overwritten" in one_line(capsys)
        assert contents(tmp_path / "run") == before

    @pytest.mark.long
    def test_a_run_may_be_named_after_its_architecture(self, folder_of_images, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words = [*PRETRAIN, "--data", folder_of_images, "--out", "sssd_resnet18"]
        assert sssd(*words) == 0
        assert sssd(*words, "--resume") == 0

    def test_a_runs_network_is_not_replaced_by_its_export(self, folder_of_images, tmp_path, capsys):
        save_network(tmp_path / "run" / "model", timm.create_model("sssd_resnet18"), "sssd_resnet18", input_size=32)
        (tmp_path / "run" / "model.safetensors").symlink_to("model/model.safetensors")
        (tmp_path / "run" / "config.json").symlink_to("model/config.json")
        before = contents(tmp_path / "run" / "model")
        words = ["--format", "timm", "--out", tmp_path / "run" / "model", "--overwrite"]
        for given in (tmp_path / "run", tmp_path / "run" / "model"):
            assert sssd("export", given, *words) == 2
            assert "where it could be overwritten" in one_line(capsys)
        assert contents(tmp_path / "run" / "model") == before

    def test_probes_replace_older_ones_whole_or_not_at_all(self, folder_of_images, tmp_path, monkeypatch, capsys):
        save_network(tmp_path / "net", timm.create_model("resnet18", num_classes=0), "resnet18", input_size=32)
        words = ["linear", tmp_path / "net", "--data", folder_of_images, "--out", tmp_path / "probes"]
        words += ["--device", "cpu", "--probe_weight_decay", "0.01", "--workers", "0", "--probe_epochs", "2"]
        assert sssd(*words) == 0
        before = contents(tmp_path / "probes")
        capsys.readouterr()
        with files_up_to(20_000_000):
            assert sssd(*words, "--overwrite") == 2
        assert "file-size limit" in one_line(capsys)
        assert contents(tmp_path / "probes") == before
        assert sssd(*words, "--overwrite") == 0

    @pytest.mark.long
    def test_a_run_is_resumed_wherever_the_weights_that_it_began_from_lie(
        self, folder_of_images, tmp_path, monkeypatch
    ):
        save_network(tmp_path / "here", timm.create_model("resnet18", num_classes=0), "resnet18", input_size=32)
        words = [*PRETRAIN, "--data", folder_of_images, "--out", tmp_path / "run", "--model", "resnet18"]
        assert sssd(*words, "--init", tmp_path / "here") == 0
        (tmp_path / "here").rename(tmp_path / "there")
        assert sssd(*words, "--init", tmp_path / "there", "--resume") == 0
