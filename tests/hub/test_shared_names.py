"""What a card, published labels and reports say of folders and data sets: no path of this machine, ids of the Hub."""

import json

import numpy as np
import pytest
import timm
import yaml

import sssd_zoo  # noqa: F401  registers the models
from helpers.labels import pseudo_labels
from sssd_zoo.configs import PublishLabelsArgs
from sssd_zoo.evaluation.reports.comparison import paper_data
from sssd_zoo.hub.cards import public_recipe
from sssd_zoo.hub.model_card import eval_result_files, model_card
from sssd_zoo.hub.publish import labels_card
from sssd_zoo.labels.kmeans import Clustering
from sssd_zoo.models.saving import network_config
from sssd_zoo.pipeline import publish_labels

SECRET = "/home/alice/secret"  # no folder of this machine
METRICS = {"1": 41.5, "2": 42.25, "3": 43.0, "4": 44.0, "ensemble": 46.125}


def test_a_recipe_has_no_paths_of_a_machine(tmp_path):
    recipe = {
        **{"data": SECRET, "out": SECRET, "features": f"local-dir:{SECRET}/encoder", "init": "customer/run/model"},
        **{"pretrain_data": [f"{SECRET}/a", "~/b"], "pretrain": {"init": "hf-hub:timm/resnet18.a1_in1k"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert public_recipe(tmp_path, {"data": "images"}) == {
        **{"data": "images", "features": "encoder", "init": "run/model", "pretrain_data": "a + b"},
        "pretrain": {"init": "hf-hub:timm/resnet18.a1_in1k"},
    }
    # A name of two parts may be a relative path, which no longer leads anywhere, or an id of the Hub.
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**recipe, "pretrain_data": "customer/photos"}))
    assert public_recipe(tmp_path, {"data": "images"})["pretrain_data"] == "photos"
    known = {"data": "images", "pretrain_data": "org/set"}
    assert public_recipe(tmp_path, known)["pretrain_data"] == "org/set", "as it was called while it was trained on"


@pytest.mark.parametrize(
    ("model", "public"),
    [
        (f"local-dir:{SECRET}/run", "run"),
        (f"{SECRET}/run/pretrain", "pretrain"),
        ("customer/run", "run"),
        ("hf-hub:org/name", "hf-hub:org/name"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
    ],
)
def test_published_labels_have_no_paths_of_a_machine(model, public, tmp_path, monkeypatch):
    clustering = Clustering(
        np.arange(4) % 2, np.zeros((2, 3), np.float32), np.zeros(4, np.float32), inertia=1.0, k_asked=2
    )
    pseudo_labels(clustering, np.arange(4), model=model).save(tmp_path / "labels")
    found = []
    monkeypatch.setattr(
        publish_labels, "send", lambda _, folder, *__: found.append((folder / "pseudo_labels.json").read_text())
    )
    publish_labels.publish_labels(PublishLabelsArgs(labels=str(tmp_path / "labels"), repo="someone/labels"))
    assert json.loads(found[0])["model"] == public
    assert "alice" not in found[0]


def test_a_configuration_is_no_part_of_a_data_set_s_id():
    model = timm.create_model("sssd_resnet18_cifar", num_classes=2)
    context = {"data": "org/set:plain", "test": "split test"}
    config = network_config(model, "sssd_resnet18_cifar")
    card = model_card(config, model, metrics=METRICS, context=context)
    data = next(yaml.safe_load_all(card))
    assert data["datasets"] == ["org/set"]
    (described,) = {json.dumps(result["dataset"], sort_keys=True) for result in data["model-index"][0]["results"]}
    assert json.loads(described) == {"name": "org/set", "type": "org/set", "config": "plain", "split": "test"}
    for text in eval_result_files(METRICS, context).values():
        (entry,) = yaml.safe_load(text)
        assert entry["dataset"]["id"] == "org/set"
        assert "configuration plain, split test" in entry["notes"]
    meta = {"data": "org/set:plain", "split": "train", "k": 2, "k_asked": 2, "sizes": [1, 1], "seed": 0}
    text = labels_card({**meta, "fingerprint": "ab"}, "someone/labels", None)
    assert next(yaml.safe_load_all(text))["source_datasets"] == ["org/set"]
    assert 'load_dataset("org/set", "plain", split="train")' in text
    assert paper_data("uoft-cs/cifar10:plain_text", 50_000) == paper_data("uoft-cs/cifar10", 50_000) == "CIFAR-10"
