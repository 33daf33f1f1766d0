"""Figures of quality without labels: against plain statements of them, at their ends, and the verdict on them."""

import math

import pytest
import torch

from helpers.data import load
from helpers.images import picture, write
from helpers.networks import create
from sssd_zoo.configs import ForwardConfig
from sssd_zoo.evaluation.label_free import (
    alignment,
    cluster_stability,
    collapse_warning,
    effective_rank,
    embedding_figures,
    embedding_std,
    exit_agreement,
    neighbour_accuracy,
    two_view_consistency,
    uniformity,
)
from sssd_zoo.evaluation.subset import Subset, draw_subset, network_figures
from sssd_zoo.evaluation.verdict import Commands, judge


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestFigures:
    def test_effective_rank_is_rank_me(self):
        features = normal(200, 12) * torch.arange(1, 13)
        fractions = torch.linalg.svdvals(features.double())
        fractions = fractions / fractions.sum() + 1e-7
        expected = math.exp(-(fractions * fractions.log()).sum())
        assert effective_rank(features) == pytest.approx(expected, rel=1e-6)
        assert effective_rank(features.T.contiguous()) == pytest.approx(expected, rel=1e-5), "more columns than rows"

    @pytest.mark.parametrize(("features", "rank"), [(torch.eye(8), 8), (torch.ones(20, 8), 1), (torch.zeros(20, 8), 1)])
    def test_effective_rank_at_its_ends(self, features, rank):
        assert effective_rank(features) == pytest.approx(rank, rel=1e-3)

    def test_uniformity_is_the_mean_over_pairs(self):
        features = normal(700, 6)
        unit = features / features.norm(dim=1, keepdim=True)
        distances = torch.pdist(unit.double()).square()
        assert uniformity(features) == pytest.approx(float((-2 * distances).exp().mean().log()), rel=1e-4)

    def test_uniformity_of_some_zeros(self):
        """Embeddings of zeros, as of dead ReLUs, are at distance 0 from each other and at 1 from the others."""
        features = torch.cat([normal(30, 6), torch.zeros(20, 6)])
        unit = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
        distances = torch.pdist(unit.double()).square()
        assert uniformity(features) == pytest.approx(float((-2 * distances).exp().mean().log()), rel=1e-4)

    def test_alignment_is_the_mean_distance_of_views(self):
        first, second = normal(50, 6), normal(50, 6, seed=1)
        unit = [value / value.norm(dim=1, keepdim=True) for value in (first, second)]
        assert alignment(first, second) == pytest.approx(float((unit[0] - unit[1]).square().sum(1).mean()), rel=1e-5)
        assert alignment(first, 3 * first) == pytest.approx(0, abs=1e-6)

    def test_std_tells_isotropic_embeddings_from_one_point(self):
        assert embedding_std(normal(4000, 64)) == pytest.approx(1, abs=0.01)
        assert embedding_std(torch.ones(40, 64)) == pytest.approx(0, abs=1e-6)

    def test_consistency_counts_own_views_in_runs_of_500(self):
        first = normal(1200, 32)
        second = first.clone()
        second[:100] = first[100:200]  # these find another image
        second[100:200] = first[:100]
        second[1000:] = 0  # the shorter run does not count
        assert two_view_consistency(first, second) == 0.8
        assert two_view_consistency(first[:40], first[:40]) == 1

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_embeddings_that_are_all_alike_find_nothing(self, value):
        alike = torch.full((60, 8), value)
        figures = embedding_figures(alike, alike, alike)
        assert figures["two_view_consistency"] == figures["std"] == 0
        assert figures["uniformity"] == pytest.approx(0, abs=1e-4)
        assert all(math.isfinite(figure) for figure in figures.values())
        assert cluster_stability(alike, 0) == {}
        assert "have collapsed" in (collapse_warning(figures, "it") or "")

    def test_agreement_of_exits(self):
        logits = torch.zeros(2, 4, 3)
        for place, (first, second) in enumerate([(0, 0), (0, 1), (2, 2), (1, 2)]):
            logits[0, place, first] = 1
            logits[1, place, second] = 5  # so sure that the ensemble answers as it does
        assert exit_agreement(logits) == {"exit_agreement_1": 0.5, "exit_agreement_2": 1, "exits_unanimous": 0.5}

    def test_separate_clusters_are_stable_and_seeded(self):
        centres = 20 * normal(3, 16)
        groups = centres[torch.arange(90) % 3] + normal(90, 16, seed=1)
        first = cluster_stability(groups, 3)
        assert first == cluster_stability(groups, 3)
        assert 0 < first["cluster_stability"] <= 1

    def test_neighbours_vote_by_the_classes_that_they_have(self):
        features, labels = torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10)
        assert neighbour_accuracy(features, labels) == 100
        assert neighbour_accuracy(features, torch.arange(40)) is None, "no class has two images"
        assert neighbour_accuracy(features[:1], labels[:1]) is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        write(folder / ("ab"[number % 2]) / f"{number}.png", picture(number, 16))
    return load(folder)


class TestSubset:
    def test_it_is_seeded_and_bounded(self):
        assert len(draw_subset(10_000, 2000, 0)) == 2000
        assert sorted(draw_subset(7, 2000, 0).tolist()) == list(range(7))
        assert torch.equal(draw_subset(100, 5, 3), draw_subset(100, 5, 3))
        assert not torch.equal(draw_subset(100, 5, 3), draw_subset(100, 5, 4))

    def test_a_network_with_exits_has_figures_of_all_and_nothing_of_it_or_the_random_state_changes(self, data):
        model = create(layers=(1, 1, 1, 1), num_classes=3).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        subset = Subset(data, ForwardConfig(precision="fp32", device="cpu", batch_size=5), seed=0)
        figures = network_figures(model, subset)
        assert {"rank_me", "rank_me_exit_1", "rank_me_exit_3", "exit_agreement_4", "knn"} <= figures.keys()
        assert "rank_me_exit_4" not in figures
        assert figures == network_figures(model, subset)
        assert torch.equal(state, torch.get_rng_state())
        assert model.training
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_labels_are_those_of_the_images_that_were_read(self, tmp_path):
        for number in range(8):
            write(tmp_path / ("ab"[number // 4]) / f"{number}.png", picture(number, 16))
        (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:60])
        data = load(tmp_path, max_corrupt=1, in_memory=False, verify=False)
        subset = Subset(data, ForwardConfig(precision="fp32", device="cpu", batch_size=8), seed=0)
        features = subset.features(create(layers=(1, 1, 1, 1), num_classes=0))[0]
        assert 1 not in subset.positions, "another image takes the place of the one that cannot be read"
        assert features.shape[1] == len(subset.labels)
        assert torch.equal(subset.labels, (subset.positions >= 4).long())

    def test_views_are_other_pixels_of_the_same_images(self, data):
        subset = Subset(data, ForwardConfig(precision="fp32", device="cpu"), seed=0)
        batches = [(index, data.gather(index)) for index in subset.positions.split(6)]
        (index, first), *_ = subset._viewed(iter(batches), 16, 0)
        (_, second), *_ = subset._viewed(iter(batches), 16, 1)
        assert first.shape == second.shape == (6, 3, 16, 16)
        assert first.dtype == torch.uint8
        assert not torch.equal(first, second)
        assert torch.equal(index, subset.positions[:6])

    def test_views_of_other_channels_are_never_grey(self, data):
        subset = Subset(data, ForwardConfig(precision="fp32", device="cpu"), seed=0)
        images = torch.arange(5, dtype=torch.uint8).mul(50).view(1, 5, 1, 1).expand(200, 5, 16, 16)
        ((_, views),) = subset._viewed([(torch.arange(200), images)], 16, 0)
        assert (views.amax(1) > views.amin(1)).all()


COMMANDS = Commands(improve=["more"], use=["predict", "embed"])


@pytest.mark.parametrize(
    ("std", "consistency", "images", "from_scratch", "level", "words", "first"),
    [
        (0.7, 0.9, 50_000, True, "good", "in 90% of cases", "predict"),
        (0.7, 0.2, 50_000, True, "fair", "in 20% of cases", "more"),
        (0.7, 0.02, 50_000, True, "weak", "weak below 10%", "more"),
        (0.01, 0.9, 50_000, True, "weak", "has collapsed", "more"),
        (0.7, 0.9, 300, True, "weak", "learned from 300 images alone", "more"),
        (0.7, 0.9, 300, False, "good", "in 90% of cases", "predict"),
    ],
)
def test_verdict(std, consistency, images, from_scratch, level, words, first):
    figures = {"std": std, "two_view_consistency": consistency, "images": 2000.0}
    verdict = judge(figures, images=images, from_scratch=from_scratch, commands=COMMANDS)
    assert verdict["level"] == level
    assert words in verdict["sentence"]
    assert verdict["next"][0] == first
