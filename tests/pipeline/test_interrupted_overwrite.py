"""A `sssd fit --overwrite` that was interrupted leaves old and new steps, which no command takes for one run."""

import json
import shutil

import pytest

from helpers.commands import TINY, one_line, sssd
from helpers.disk import contents
from helpers.runs import fitted
from sssd_zoo.errors import UserError
from sssd_zoo.pipeline.fit import Plan

pytestmark = pytest.mark.long
QUICK = [*TINY, "--unlabelled", "--workers", "0"]


def killed(self, folder):
    raise UserError("killed")


@pytest.fixture(scope="module")
def finished(folder_of_images, tmp_path_factory):
    """A finished run; tests work on copies."""
    return fitted(tmp_path_factory.mktemp("finished"), folder_of_images, *QUICK)


@pytest.fixture
def interrupted(finished, folder_of_images, tmp_path, monkeypatch, capsys):
    """The run with labels of other clusters, and the network of before."""
    out = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    with monkeypatch.context() as patched:
        patched.setattr(Plan, "distill", killed)
        words = ("fit", "--data", folder_of_images, "--out", out, *QUICK, "--cluster.k", "5", "--overwrite")
        assert sssd(*words) == 2
    assert one_line(capsys) == "error: killed"
    assert len(json.loads((out / "labels" / "pseudo_labels.json").read_text())["sizes"]) == 5
    return out


class TestInterrupted:
    def test_commands_that_mix_old_and_new_refuse(self, interrupted, folder_of_images, tmp_path, capsys):
        names = tmp_path / "names.csv"
        names.write_text("cluster,name\n0,cats\n")
        before = contents(interrupted)
        for words in (
            ("rename", interrupted, names),
            ("card", interrupted, "--out", tmp_path / "card"),
            ("report", interrupted, "--data", folder_of_images),
        ):
            assert sssd(*words) == 2
            line = one_line(capsys)
            assert f"{interrupted} is not finished" in line
            assert "after it had made labels again" in line
            assert "--overwrite if it had that" in line
        assert contents(interrupted) == before
        assert not (tmp_path / "card").exists()
        # The network is whole, with the classes that it was trained on.
        assert sssd("predict", interrupted, folder_of_images / "red", "--device", "cpu") == 0

    @pytest.mark.parametrize("clusters", ["4", "5"])
    def test_fit_asks_for_overwrite_and_finishes_by_it(self, clusters, interrupted, folder_of_images, capsys):
        words = ("fit", "--data", folder_of_images, "--out", interrupted, *QUICK, "--cluster.k", clusters)
        before = contents(interrupted)
        assert sssd(*words) == 2
        line = one_line(capsys)
        assert "was interrupted after it had made labels again" in line
        assert "there" not in line, "what was there before the interruption is no longer"
        assert contents(interrupted) == before
        assert sssd(*words, "--overwrite") == 0
        assert "[pretrain] done before" in capsys.readouterr().out
        config = json.loads((interrupted / "model" / "config.json").read_text())
        assert config["num_classes"] == int(clusters)
        assert sssd("report", interrupted, "--data", folder_of_images) == 0
        assert sssd(*words) == 0
        assert not [path for path in contents(interrupted) if ".distill.new" in str(path)]


def test_the_records_of_the_steps_stay_with_the_run(finished, tmp_path):
    steps = json.loads((finished / "metrics.json").read_text())["steps"]
    assert list(steps) == ["pretrain", "labels", "distill"]
    assert sssd("card", finished, "--out", tmp_path / "card") == 0
    assert "steps" not in json.loads((tmp_path / "card" / "metrics.json").read_text())


def test_a_run_of_an_earlier_version_is_taken_as_whole(finished, folder_of_images, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    results = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps({key: value for key, value in results.items() if key != "steps"}))
    assert sssd("report", out, "--data", folder_of_images) == 0
