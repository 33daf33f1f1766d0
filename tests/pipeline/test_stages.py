"""Stages of `fit`, `compare` and `finetune`: done once, replaced only when told to, resumed, repeated after damage."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.disk import DAMAGE, contents, flip
from sssd_zoo.errors import UserError
from sssd_zoo.files import RUN_MARK, atomic_write_text, read_json, write_json
from sssd_zoo.pipeline.stages import Stage, Stages
from sssd_zoo.training.checkpoints import OtherRun


def run_stage(stages: Stages, name: str, action: Any, settings: Any, **more: Any) -> dict[str, Any]:
    return stages.run(Stage(name=name, action=action, settings=settings, **more))


def step(value: str, log: list[str] | None = None, dies: bool = False):
    def run(folder: Path) -> dict[str, Any]:
        if log is not None:
            log.append(folder.name)
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
        if dies:
            raise KeyboardInterrupt
        (folder / "metrics.json").write_text(value)
        return {"value": value}

    return run


def test_a_finished_step_goes_only_when_told_to_and_its_successor_is_complete(tmp_path, capsys):
    old = Stages(tmp_path, {"data": "x" * 64})
    assert run_stage(old, "train", step("1"), {"lr": 1})["value"] == "1"
    (tmp_path / "train" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"train was made with other.*\(lr: 1 there, 2 now\).*--overwrite"):
        run_stage(old, "train", step("2"), {"lr": 2})
    with pytest.raises(UserError, match=r"\(other images\).*--overwrite"):
        run_stage(Stages(tmp_path, {"data": "y" * 64}), "train", step("2"), {"lr": 1})
    assert contents(tmp_path) == before

    again = Stages(tmp_path, {"data": "x" * 64}, overwrite=True)
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_stage(again, "train", step("2", log, dies=True), {"lr": 2})
    assert (tmp_path / "train" / "metrics.json").read_text() == "1"
    assert run_stage(old, "train", step("never"), {"lr": 1})["value"] == "1", "the old one is as good as before"
    (tmp_path / ".train.new" / "half").write_text("done")
    assert run_stage(again, "train", step("2", log), {"lr": 2})["value"] == "2"
    assert log == [".train.new", ".train.new"]
    assert (tmp_path / "train" / "half").read_text() == "done", "it resumed"
    assert (tmp_path / "train" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "train" / "metrics.json").read_text() == "2"
    assert run_stage(again, "train", step("never"), {"lr": 2})["value"] == "2"
    assert not [path for path in tmp_path.rglob(".*") if path.name != RUN_MARK]


@pytest.mark.parametrize("at", ["before the folder", "before the record"])
def test_a_kill_while_a_step_is_replaced_is_made_good(at, tmp_path, monkeypatch):
    run_stage(Stages(tmp_path, {}), "train", step("1"), {"lr": 1})
    stages = Stages(tmp_path, {}, overwrite=True)
    killed = "sssd_zoo.pipeline.stages.replace" if at == "before the folder" else "pathlib.Path.replace"
    with monkeypatch.context() as patch:
        real = Path.replace

        def die(first: Path, *rest: Any) -> Any:
            if first.name in (".train.new", ".train.new.json"):
                raise KeyboardInterrupt
            return real(first, *rest)

        patch.setattr(killed, die)
        with pytest.raises(KeyboardInterrupt):
            run_stage(stages, "train", step("2"), {"lr": 2})
    assert run_stage(Stages(tmp_path, {}), "train", step("never"), {"lr": 2})["value"] == "2"
    assert (tmp_path / "train" / "metrics.json").read_text() == "2"


def test_a_step_with_nothing_to_lose_is_begun_anew(tmp_path):
    def fails(folder: Path) -> dict[str, Any]:
        raise UserError("too large a batch")

    with pytest.raises(UserError, match="batch"):
        run_stage(Stages(tmp_path, {}), "train", fails, {"batch": 2})
    assert run_stage(Stages(tmp_path, {}), "train", step("1"), {"batch": 1})["value"] == "1"


def test_other_true_labels_are_measured_again_unasked(tmp_path, capsys):
    stages = Stages(tmp_path, {})
    assert run_stage(stages, "probe", step("cats"), {}, measured_on="a")["value"] == "cats"
    assert run_stage(stages, "probe", step("never"), {}, measured_on="a")["value"] == "cats"
    assert run_stage(stages, "probe", step("dogs"), {}, measured_on="b")["value"] == "dogs"
    assert "repeated, for other true labels" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        run_stage(stages, "probe", step("never"), {"epochs": 9}, measured_on="c")


def test_checkpoints_of_another_run_are_discarded_where_that_is_asked_for(tmp_path):
    def train(folder: Path) -> dict[str, Any]:
        if (folder / "checkpoints" / "step-00000001").exists():
            raise OtherRun("written by another run; use a new --out, or --overwrite")
        return {"value": "trained"}

    (tmp_path / "train" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(OtherRun):
        run_stage(Stages(tmp_path, {}), "train", train, {})
    assert run_stage(Stages(tmp_path, {}, overwrite=True), "train", train, {})["value"] == "trained"


def test_what_changes_a_file_afterwards_does_not_damage_it(tmp_path, capsys):
    """As where the true labels that clusters are compared with have changed."""

    def label(folder: Path) -> dict[str, Any]:
        write_json(folder / "pseudo_labels.json", {"quality": "of the old labels"})
        return {}

    def compare(quality: str) -> bool:
        write_json(tmp_path / "labels" / "pseudo_labels.json", {"quality": quality})
        return True

    for quality in ("of the old labels", "of the new ones", "of the new ones"):
        Stages(tmp_path, {}).run(Stage(name="labels", action=label, settings={}, then=partial(compare, quality)))
    assert "damaged" not in capsys.readouterr().out
    assert read_json(tmp_path / "labels" / "pseudo_labels.json")["quality"] == "of the new ones"


def test_a_step_does_not_take_a_folder_of_the_users(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "annotations.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds annotations\.txt;"):
            run_stage(Stages(tmp_path, {}, overwrite=overwrite), "labels", step("1"), {})
    run_stage(Stages(tmp_path, {}), "probe", step("1"), {"lr": 1})
    shutil.rmtree(tmp_path / "probe")
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "photo.png").write_text("mine")
    with pytest.raises(UserError, match=r"holds photo\.png;"):
        run_stage(Stages(tmp_path, {}, overwrite=True), "probe", step("2"), {"lr": 2})
    assert (tmp_path / "probe" / "photo.png").read_text() == "mine"


def test_a_step_from_before_marks_is_reused_and_replaced(tmp_path):
    run_stage(Stages(tmp_path, {}), "train", step("1"), {"lr": 1})
    (tmp_path / "train" / RUN_MARK).unlink()
    assert run_stage(Stages(tmp_path, {}), "train", step("never"), {"lr": 1, "true_labels": "x"})["value"] == "1"
    (tmp_path / "train" / RUN_MARK).unlink()
    assert run_stage(Stages(tmp_path, {}, overwrite=True), "train", step("2"), {"lr": 2})["value"] == "2"


class TestInputs:
    """What a stage is done again for."""

    def test_a_stage_depends_on_the_settings_of_those_before_it(self, tmp_path):
        def run(lr: int, k: int) -> list[str]:
            log: list[str] = []
            stages = Stages(tmp_path, {"data": "x"}, overwrite=True)
            run_stage(stages, "train", step("1", log), {"lr": lr})
            run_stage(stages, "labels", step("2", log), {"k": k}, after=("train",))
            run_stage(stages, "probe", step("3", log), {"k": 9}, after=("labels",))
            run_stage(stages, "alone", step("4", log), {"k": 9})
            return [name.strip(".").removesuffix(".new") for name in log]

        assert run(lr=1, k=4) == ["train", "labels", "probe", "alone"]
        assert run(lr=1, k=4) == []
        assert run(lr=1, k=5) == ["labels", "probe"]
        assert run(lr=2, k=5) == ["train", "labels", "probe"]

    def test_why_one_is_repeated(self, tmp_path, capsys):
        for lr, decay in ((1, 1), (2, 1), (2, 3), (4, 5)):
            stages = Stages(tmp_path, {"data": "x"}, overwrite=True)
            run_stage(stages, "train", step("1"), {"lr": lr, "optim.decay": 0})
            run_stage(stages, "measure", step("2"), {"decay": decay}, after=("train",))
        said = [line for line in capsys.readouterr().out.splitlines() if "repeated, for" in line]
        assert said == [
            "[train] repeated, for other lr",
            "[measure] repeated, for another result of [train]",
            "[measure] repeated, for other decay",
            "[train] repeated, for other lr",
            "[measure] repeated, for other decay and another result of [train]",
        ]

    def test_common_inputs_give_way_to_a_stage_s_own(self, tmp_path):
        for seed in (0, 1):
            stages = Stages(tmp_path, {"seed": seed})
            assert run_stage(stages, "labels", step(f"{seed}"), {"seed": "none"})["value"] == "0"

    def test_settings_may_come_from_an_earlier_result(self, tmp_path):
        stages = Stages(tmp_path, {})
        run_stage(stages, "labels", step("7"), {})
        later = {"later": lambda: {"labels": stages.results["labels"]["value"]}, "after": ("labels",)}
        run_stage(stages, "distill", step("8"), {"lr": 1}, **later)
        record = json.loads((tmp_path / "steps" / "distill.json").read_text())
        assert record["inputs"] == {"labels": "7", "lr": 1}
        again = Stages(tmp_path, {})  # before its labels are known, its other settings are compared
        labels, distil = (Stage(name=name, action=step("9"), settings={}) for name in ("labels", "distill"))
        assert again.survey([labels, replace(distil, settings={"lr": 1}, **later)]).changes == {}
        assert again.survey([labels, replace(distil, settings={"lr": 2}, **later)]).changes == {"distill.lr": (1, 2)}
        assert again.survey([labels, replace(distil, **later)]).changes == {"distill.lr": (1, None)}

    def test_what_follows_a_stage_follows_an_old_result_too(self, tmp_path):
        seen: list[str] = []
        for _ in range(2):
            stages = Stages(tmp_path, {})
            result = run_stage(stages, "train", step("1"), {}, then=lambda: seen.append("then"))
            assert result["seconds"] >= 0
        assert seen == ["then", "then"]


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    @pytest.mark.parametrize("file", ["model.safetensors", "labels.parquet", "network/config.json"])
    def test_a_damaged_result_is_made_again(self, damage, file, tmp_path, capsys):
        done = []

        def step(folder: Path) -> dict[str, Any]:
            done.append(folder)
            atomic_write_text(folder / file, "a result of some length")
            atomic_write_text(folder / "log.txt", "what no later step reads")
            return {}

        for _ in range(2):
            run_stage(Stages(tmp_path, {}), "step", step, {})
        assert len(done) == 1
        flip(tmp_path / "step" / "log.txt")
        damage(tmp_path / "step" / file)
        for _ in range(2):
            run_stage(Stages(tmp_path, {}), "step", step, {})
        assert len(done) == 2
        assert f"is damaged: {file}" in capsys.readouterr().out
        assert (tmp_path / "step" / file).read_text() == "a result of some length"

    def test_a_run_folder_that_goes_is_one_line(self, tmp_path):
        def step(folder: Path) -> dict[str, Any]:
            shutil.rmtree(tmp_path / "run")
            atomic_write_text(folder / "a.json", "{}")
            return {}

        with pytest.raises(UserError, match=r"run was removed while \[step\] ran"):
            run_stage(Stages(tmp_path / "run", {}), "step", step, {})

    def test_of_earlier_versions(self, tmp_path):
        run_stage(Stages(tmp_path, {}), "step", lambda folder: atomic_write_text(folder / "a.json", "{}") or {}, {})
        record = json.loads((tmp_path / "steps" / "step.json").read_text())
        del record["sha256"]
        (tmp_path / "steps" / "step.json").write_text(json.dumps(record))
        run_stage(Stages(tmp_path, {}), "step", lambda folder: pytest.fail("it was done"), {})


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_of_a_finished_step_go_unless_they_are_kept(keep, tmp_path):
    stages = Stages(tmp_path, {"data": "x"}, keep_checkpoints=keep)
    run_stage(stages, "train", step("1"), {"lr": 1})
    assert (tmp_path / "train" / "checkpoints").exists() == keep
    assert (tmp_path / "train" / "metrics.json").read_text() == "1"
