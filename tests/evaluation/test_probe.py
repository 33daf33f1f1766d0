import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import sssd_zoo  # noqa: F401  (registers the models)
from helpers.data import load
from helpers.images import picture, write
from sssd_zoo.configs import DataConfig, ProbeConfig
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import read_batches, stack_features
from sssd_zoo.evaluation.knn import knn
from sssd_zoo.evaluation.probe import LogisticRegression as LogisticRegressionProblem
from sssd_zoo.evaluation.probe import hold_out_rows, linear_probe
from sssd_zoo.evaluation.protocol import evaluation_data

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def images(n=10, size=16, seed=0):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batches(stored, order=None, batch=4):
    order = torch.arange(len(stored)) if order is None else order
    return [(index, stored[index]) for index in order.split(batch)]


def extract(model, stored, size=None, **options):
    spec = InputSpec(size or stored.shape[-1], MEAN, STD)
    return stack_features(read_batches(model, options.pop("batches", batches(stored)), spec, **options), len(stored))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = timm.create_model("sssd_resnet18", num_classes=5)
    with torch.no_grad():  # statistics that the images do not have, so that a network in train mode would show
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
    return network


def scaled(stored):
    """What the network should be given: each image by itself, by the definition."""
    return (stored.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_features_of_all_exits_are_those_of_the_network(model):
    stored = images()
    found = extract(model, stored, batches=batches(stored, torch.randperm(10)))
    assert found.shape == (4, 10, 512)
    assert found.dtype == torch.float32
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        expected = torch.stack([torch.stack(exact.forward_exits(x[None]).features)[:, 0] for x in scaled(stored)], 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert not found.is_inference()


@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {}), ("resnet18", {"num_classes": 0}), ("sssd_resnet18", {"output": 2})]
)
def test_a_network_of_one_output_gives_one_row_of_features(name, options):
    network = timm.create_model(name, **options)
    stored = images(5)
    found = extract(network, stored)
    assert found.shape == (1, 5, network.num_features)
    network.eval()
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(scaled(stored).float()), pre_logits=True)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)


def test_extraction_leaves_the_network_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    extract(model, images())
    assert [module.training for module in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_network_that_moves_its_statistics_is_caught(model):
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    moving = copy.deepcopy(model)
    moving.bn1.__class__ = Stubborn
    moving.bn1.train()
    with pytest.raises(RuntimeError, match="changed its buffers"):
        extract(moving, images())


def test_modes_come_back_after_an_error(model):
    model.train()
    with pytest.raises(ZeroDivisionError):
        extract(model, images(), batches=(1 / 0 for _ in range(1)))
    assert model.training
    assert model.bn1.training


def test_missing_images_are_an_error(model):
    with pytest.raises(UserError, match=r"^2 of 10 images can no longer be decoded"):
        extract(model, images(), batches=batches(images())[:2])
    with pytest.raises(UserError, match=r"^10 of 10"):
        extract(model, images(), batches=[])


def test_size_and_autocast(model):
    small, large = images(4, 16), images(4, 16).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(extract(model, large, size=16), extract(model, small), rtol=0.3, atol=0.3)
    halved = extract(model, small, autocast=torch.bfloat16)
    assert halved.dtype == torch.float32
    full = extract(model, small)
    assert (halved - full).norm() / full.norm() < 0.05
    assert not torch.equal(halved, full)


def groups(exits=3, n=300, m=100, d=12, classes=4, seed=0):
    """Features of classes that overlap, less in later exits; a constant dimension and very different scales."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(exits, classes, d, generator=random)
    labels = torch.randint(classes, (n + m,), generator=random)
    noise = torch.randn(exits, n + m, d, generator=random) * torch.linspace(2, 0.7, exits).view(-1, 1, 1)
    features = (centres[:, labels] + noise) * torch.logspace(-3, 3, d) + 5
    features[..., 3] = 7
    return features[:, :n].contiguous(), labels[:n], features[:, n:].contiguous(), labels[n:]


def scikit_learn(train_x, train_y, test_x, weight_decay):
    """One exit alone, in double precision: probabilities [M, C] of the test rows."""
    scaler = StandardScaler().fit(train_x.double())
    model = LogisticRegression(C=1 / (len(train_x) * weight_decay), tol=1e-8, max_iter=10_000)
    model.fit(scaler.transform(train_x.double()), train_y)
    return torch.from_numpy(model.predict_proba(scaler.transform(test_x.double())))


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-2, 1e-3])
def test_linear_probe_is_scikit_learns_logistic_regression(weight_decay):
    train_x, train_y, test_x, test_y = groups(n=600, m=1000)
    probe = linear_probe(train_x, train_y, test_x, test_y, 4, ProbeConfig(probe_weight_decay=weight_decay))
    theirs = torch.stack([scikit_learn(train_x[e], train_y, test_x[e], weight_decay) for e in range(3)])
    torch.testing.assert_close(probe.logits(test_x).softmax(2).double(), theirs, rtol=0, atol=0.02)
    assert probe.exits == pytest.approx((100 * (theirs.argmax(2) == test_y).double().mean(1)).tolist(), abs=0.3)
    mean = theirs.mean(0).argmax(1)
    assert probe.ensemble == pytest.approx(100 * float((mean == test_y).double().mean()), abs=0.3)
    assert probe.weights.shape == (3, 4, 12)
    assert probe.biases.shape == (3, 4)
    assert probe.weight_decays == [weight_decay] * 3
    assert probe.exits[2] > probe.exits[0] > 30


def test_the_gradient_of_the_loss_is_autograds():
    train_x, train_y, _, _ = groups(exits=1)
    problem = LogisticRegressionProblem(train_x[0] / torch.logspace(-3, 3, 12), train_y, 4)
    parameters = torch.randn(13, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    standardised = (problem.x - problem.mean) * problem.scale
    by_hand = F.cross_entropy(standardised @ parameters[:-1] + parameters[-1], train_y)
    by_hand = by_hand + 0.3 / 2 * parameters[:-1].square().sum()
    by_hand.backward()
    loss, gradient = problem.loss(parameters.detach(), 0.3)
    torch.testing.assert_close(loss, by_hand.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, parameters.grad, rtol=1e-3, atol=1e-4)


def test_the_weight_decay_is_chosen_on_rows_held_out_class_by_class():
    labels = torch.cat([torch.arange(3).repeat_interleave(100), torch.tensor([3] * 9)])
    labels = labels[torch.randperm(309, generator=torch.Generator().manual_seed(0))]
    kept, held_out = hold_out_rows(labels, seed=0)
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [10, 10, 10, 0]  # a tenth of nine rows is none
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(309))
    assert not torch.equal(held_out, hold_out_rows(labels, seed=1)[1])


def test_noise_asks_for_a_strong_weight_decay_and_clean_features_do_not():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    clean = F.one_hot(labels, 4).float() + 0.01 * torch.randn(400, 4, generator=random)
    noise = torch.randn(400, 200, generator=random)
    noisy = torch.cat([clean + torch.randn(400, 4, generator=random), noise], 1)
    padded = torch.cat([clean, torch.zeros(400, 200)], 1)
    features = torch.stack([noisy, padded])
    probe = linear_probe(features, labels, features, labels, 4, ProbeConfig())
    assert probe.weight_decays[0] >= 1e-3
    assert probe.exits[1] == 100


def test_probe_depends_on_its_seed_only():
    data = groups(n=1100)
    first, again = (linear_probe(*data, 4, ProbeConfig(), seed=1) for _ in range(2))
    assert torch.equal(first.weights, again.weights)


def test_probe_does_not_look_at_the_test_split():
    train_x, train_y, test_x, test_y = groups()
    one = linear_probe(train_x, train_y, test_x, test_y, 4, ProbeConfig(probe_weight_decay=0.01))
    other = linear_probe(train_x, train_y, test_x.flip(1)[:, :50], test_y[:50], 4, ProbeConfig(probe_weight_decay=0.01))
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.biases, other.biases)


def test_probe_leaves_its_features_alone():
    data = groups()
    kept = data[0].clone()
    linear_probe(*data, 4, ProbeConfig(probe_weight_decay=0.01))
    assert torch.equal(data[0], kept)


def test_probe_of_extracted_features(model):
    features = extract(model, images(12))
    labels = torch.arange(12) % 3
    probe = linear_probe(features, labels, features, labels, 3, ProbeConfig(probe_weight_decay=1e-4))
    assert probe.exits == [100.0] * 4
    assert probe.ensemble == 100


def slow_knn(train_x, train_y, test_x, test_y, classes, k, temperature):
    hits = 0
    for x, label in zip(test_x.double(), test_y, strict=True):
        cosines = ((train_x.double() * x).sum(1) / train_x.double().norm(dim=1) / x.norm()).tolist()
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[int(train_y[i])] += math.exp(cosines[i] / temperature)
        hits += votes.index(max(votes)) == label
    return 100 * hits / len(test_x)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (20, 10.0), (80, 0.1), (7, 0.01)])
def test_knn_against_the_definition(k, temperature):
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=random)
    labels = torch.randint(4, (600,), generator=random)
    features = centres[labels] + 1.5 * torch.randn(600, 12, generator=random)
    data = features[:80], labels[:80], features[80:], labels[80:]  # 520 queries: more than one chunk
    found = knn(*data, num_classes=4, neighbours=k, temperature=temperature)
    assert found == pytest.approx(slow_knn(*data, 4, k, temperature))
    assert 30 < found < 100


def test_knn_at_a_temperature_that_overflows_exp():
    # exp(1 / 0.001) is infinite in float32: both classes would have infinitely many votes.
    train = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, 0.02]])
    query = torch.tensor([[1.0, 0.0]])
    accuracy = knn(
        train, torch.tensor([0, 1, 0]), query, torch.tensor([1]), num_classes=2, neighbours=3, temperature=1e-4
    )
    assert accuracy == 100


def test_knn_at_a_temperature_at_which_exp_is_zero():
    # exp((0.4 - 1) / 0.001) is 0 in float32: no class would have a vote, and class 0 would win.
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.eye(3, 40)[labels] + 0.3 * torch.randn(60, 40, generator=random)
    data = features[:30], labels[:30], features[30:], labels[30:]
    nearest = knn(*data, num_classes=3, neighbours=1, temperature=1.0)
    assert nearest > 50
    assert knn(*data, num_classes=3, neighbours=5, temperature=1e-5) == nearest


@pytest.mark.parametrize("k", [0, 301])
def test_knn_refuses_k(k):
    train_x, train_y, test_x, test_y = groups()
    with pytest.raises(UserError, match="300 training images"):
        knn(train_x[0], train_y, test_x[0], test_y, num_classes=4, neighbours=k, temperature=0.1)


def test_labels_are_checked():
    train_x, train_y, test_x, test_y = groups()
    with pytest.raises(UserError, match="class 4 has no training images"):
        linear_probe(train_x, train_y, test_x, test_y, 5, ProbeConfig(probe_weight_decay=0.01))
    with pytest.raises(UserError, match="from 0 to 3, but there are 3"):
        knn(train_x[0], train_y, test_x[0], test_y, num_classes=3, neighbours=5, temperature=0.1)
    with pytest.raises(UserError, match="test split has no images"):
        linear_probe(train_x, train_y, test_x[:, :0], test_y[:0], 4, ProbeConfig(probe_weight_decay=0.01))


def test_features_of_fewer_rows_than_dimensions_and_all_alike():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    wide = torch.randn(12, 600, generator=random)
    alike = torch.ones(12, 600)
    features = torch.stack([wide, alike])
    probe = linear_probe(features, labels, features, labels, 3, ProbeConfig())
    assert probe.exits[0] == 100
    assert probe.exits[1] == pytest.approx(100 / 3)
    assert probe.weights.isfinite().all()


def test_a_covariance_that_lapack_gives_up_on_only_costs_iterations(monkeypatch):
    data = groups()
    expected = linear_probe(*data, 4, ProbeConfig(probe_weight_decay=0.01))

    def fails(matrix):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = linear_probe(*data, 4, ProbeConfig(probe_weight_decay=0.01))
    torch.testing.assert_close(found.logits(data[2]), expected.logits(data[2]), rtol=0.02, atol=0.02)


def test_a_test_split_may_lack_classes_but_not_labels(tmp_path):
    for number, name in enumerate(("train/a", "train/b", "train/c", "test/a", "test/b")):
        for place in range(2):
            write(tmp_path / "photos" / name / f"{place}.png", picture(10 * number + place))
    data = load(tmp_path / "photos")
    config = DataConfig(data=str(tmp_path / "photos"))
    for asked in (None, "test"):
        found = evaluation_data(data, config, test_split=asked, holdout=0.2, seed=0)
        assert found.test_labels.tolist() == [0, 0, 1, 1]
