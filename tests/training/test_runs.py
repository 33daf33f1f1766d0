"""What tells runs apart, and what a run folder says of itself."""

from dataclasses import asdict

import pytest
import yaml

from sssd_zoo.cli.arguments import read_arguments
from sssd_zoo.configs import DistillArgs, MoCoConfig, OptimConfig, SEEDConfig
from sssd_zoo.errors import UserError
from sssd_zoo.training.runs import check_queue, method_settings, save_config, settings_of


def distill(**changes: object) -> DistillArgs:
    return DistillArgs(**{"data": "photos", "labels": "random", "k": 4, "out": "run", **changes})


def test_settings_are_the_fields_with_their_values():
    assert settings_of(OptimConfig(epochs=3)) == asdict(OptimConfig(epochs=3))
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
