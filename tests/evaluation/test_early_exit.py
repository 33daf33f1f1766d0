"""Early exit: temperatures, thresholds and costs against slow versions, and `sssd early-exit` on tiny data."""

import doctest
import itertools
import json
import math
import shlex
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.special import gammaln, xlogy
from scipy.stats import beta, binom, multinomial

import sssd_zoo  # noqa: F401  registers the models
from helpers.commands import one_line, sssd
from helpers.networks import poisoned, save_tiny
from sssd_zoo.configs import EarlyExitArgs
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation import calibration
from sssd_zoo.evaluation.calibration import (
    SHARED,
    all_rules,
    average_cost,
    calibration_error,
    early_answers,
    ensemble_answers,
    fit_temperatures,
    fold,
    shared_threshold,
)
from sssd_zoo.evaluation.paired_test import p_value
from sssd_zoo.evaluation.reports.early_exit import command_line, network_source
from sssd_zoo.evaluation.timing import measure_stages
from sssd_zoo.models import (
    StageCosts,
    classifiers,
    early_logits,
    exits_asked,
    multiply_adds,
    stage_costs,
    stages_and_heads,
)

COSTS = StageCosts((100.0, 80.0, 70.0, 60.0), (9.0, 7.0, 5.0, 1.0))


def random_logits(exits=4, count=200, classes=5, seed=0):
    """Logits that tend to be right, the later exits more so, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(exits, count, classes, generator=generator)
    strength = torch.linspace(0.8, 2.0, exits).view(-1, 1, 1)
    return noise + strength * F.one_hot(labels, classes), labels


def test_temperatures_minimise_the_likelihood():
    logits, labels = random_logits()
    logits = logits * torch.tensor([0.3, 1.0, 4.0, 2.0]).view(-1, 1, 1)
    found = fit_temperatures(logits, labels)
    grid = torch.logspace(-1.5, 1.5, 3001).tolist()
    for own, temperature in zip(logits, found, strict=True):
        best = min(grid, key=lambda t, own=own: F.cross_entropy(own / t, labels).item())
        assert temperature == pytest.approx(best, rel=2e-3)


def test_calibration_error_by_hand():
    logits, labels = random_logits(1)
    confidence, answer = logits[0].softmax(1).max(1)
    wanted = 0.0
    for low in range(15):
        inside = [i for i in range(200) if low / 15 < confidence[i] <= (low + 1) / 15]
        if inside:
            right = sum(int(answer[i] == labels[i]) for i in inside) / len(inside)
            wanted += abs(right - sum(float(confidence[i]) for i in inside) / len(inside)) * len(inside) / 200
    assert calibration_error(logits[0], labels) == pytest.approx(wanted, abs=1e-6)


@torch.no_grad()
def test_folded_temperatures_divide_the_logits():
    model = timm.create_model("sssd_resnet18", num_classes=3, layers=(1, 1, 1, 1)).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model.forward_exits(images).logits
    fold(model, [0.5, 1.5, 2.0, 3.0])
    for logits, old, temperature in zip(model.forward_exits(images).logits, before, (0.5, 1.5, 2, 3), strict=True):
        torch.testing.assert_close(logits, old / temperature)


def test_the_worked_example_of_the_grid():
    outcome = doctest.testmod(calibration)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@torch.no_grad()
@pytest.mark.parametrize("thresholds", [(0.4, 0.4, 0.4), (1, 0.45, 0.4), (0.4, 1, 1), (1, 1, 1), (0, 0, 0)])
def test_the_rule_from_all_logits_is_that_of_forward_early(thresholds):
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=3, layers=(1, 1, 1, 1)).eval()
    images = torch.randn(12, 3, 32, 32)
    logits = torch.stack(model.forward_exits(images).logits)
    expected, early = model.forward_early(images, thresholds), early_logits(logits, thresholds)
    assert torch.equal(early.exit, expected.exit)
    torch.testing.assert_close(early.logits, expected.logits)
    assert exits_asked(thresholds) == [number for number in (1, 2, 3) if thresholds[number - 1] < 1] + [4]


def test_heads_and_stages_are_those_of_the_network():
    model = timm.create_model("sssd_resnet18", num_classes=3, layers=(1, 1, 1, 1)).eval()
    assert classifiers(model) == [model.exit1.fc, model.exit2.fc, model.exit3.fc, model.fc]
    truncated = timm.create_model("sssd_resnet18", num_classes=3, output=2)
    assert classifiers(truncated) == [truncated.exit2.fc]
    plain = timm.create_model("resnet18", num_classes=3)
    assert classifiers(plain) == [plain.fc]
    x = images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for (stage, head), logits in zip(stages_and_heads(model), model.forward_exits(images).logits, strict=True):
            x = stage(x)
            torch.testing.assert_close(head(x), logits)


def rule_by_hand(logits, labels, thresholds):
    """Whether each image is answered right, and what it costs."""
    rights, costs = [], []
    for i, label in enumerate(labels.tolist()):
        cost, asked = 0.0, []
        for number in range(4):
            cost += COSTS.stages[number]
            if number < 3 and thresholds[number] == 1:
                continue
            cost += COSTS.heads[number]
            asked.append(logits[number, i].softmax(0))
            if number == 3 or asked[-1].max() > thresholds[number]:
                answer = torch.stack(asked).mean(0) if number == 3 else asked[-1]
                rights.append(int(answer.argmax()) == label)
                break
        costs.append(cost)
    return torch.tensor(rights), torch.tensor(costs)


def test_every_rule_is_measured_exactly():
    logits, labels = random_logits(count=60)
    rules = all_rules(logits, labels, COSTS, levels=4)
    assert rules.lost.shape == (6, 6, 6)
    full = ensemble_answers(logits) == labels
    for place in itertools.product((0, 2, 4, 5), (1, 3, 4, 5), (0, 2, 4, 5)):
        thresholds = [float(own[where]) for own, where in zip(rules.candidates, place, strict=True)]
        right, cost = rule_by_hand(logits, labels, thresholds)
        difference = full.double() - right.double()
        assert rules.lost[place] == pytest.approx(100 * difference.mean().item())
        assert rules.cost[place] == pytest.approx(cost.mean().item())
        answers, taken = early_answers(logits, thresholds)
        assert torch.equal(answers == labels, right)
        assert average_cost(taken, thresholds, COSTS) == pytest.approx(cost.mean().item())


def test_choices_are_the_best_of_all():
    logits, labels = random_logits()
    rules = all_rules(logits, labels, COSTS, levels=6)
    places = list(itertools.product(range(8), repeat=3))

    def thresholds_of(place):
        return [float(own[where]) for own, where in zip(rules.candidates, place, strict=True)]

    def cost_of(thresholds):
        return rule_by_hand(logits, labels, thresholds)[1].mean().item()

    allowed = [place for place in places if rules.cost[place] <= 200]
    best = min(allowed, key=lambda place: float(rules.lost[place]))
    found = rules.most_accurate(200)
    assert cost_of(found) <= 200
    assert rule_by_hand(logits, labels, found)[0].sum() == rule_by_hand(logits, labels, thresholds_of(best))[0].sum()
    assert rules.most_accurate(1) is None


def test_the_ensemble_is_one_of_the_rules():
    logits, labels = random_logits(count=400)
    ensemble = (ensemble_answers(logits) == labels).double().mean()
    final = (logits[3].argmax(1) == labels).double().mean()
    assert ensemble > final
    rules = all_rules(logits, labels, COSTS)
    asked, not_asked = len(rules.candidates[0]) - 2, len(rules.candidates[0]) - 1
    assert rules.lost[asked, asked, asked] == 0  # no image leaves, and all exits answer
    assert rules.lost[not_asked, not_asked, not_asked] == pytest.approx(100 * (ensemble - final).item())


def test_confidences_that_round_to_1():
    logits, labels = random_logits(count=60)
    logits = logits * 100
    assert (logits[:3].softmax(2).amax(2) == 1).float().mean() > 0.1
    rules = all_rules(logits, labels, COSTS, levels=4)
    for place in itertools.product((0, 3, 4, 5), repeat=3):
        thresholds = [float(own[where]) for own, where in zip(rules.candidates, place, strict=True)]
        right, cost = rule_by_hand(logits, labels, thresholds)
        full = ensemble_answers(logits) == labels
        assert rules.lost[place] == pytest.approx(100 * (full.double() - right.double()).mean().item())
        assert rules.cost[place] == pytest.approx(cost.mean().item())


def test_the_command_can_be_pasted_and_has_no_paths():
    args = EarlyExitArgs(
        model="local-dir:/home/alice/my runs/run 1/model", data="~/im gs", out="/home/alice/out", split="test[:50%]"
    )
    line = command_line(args)
    words = ["sssd", "early-exit", "run 1/model", "--data", "im gs", "--out", "OUT", "--split", "test[:50%]"]
    assert shlex.split(line) == words
    for name in ("hf-hub:org/name", "sssd_resnet18_cifar.cifar10", "model"):
        assert network_source(name) == name
    assert network_source("customer/run") == "run"
    assert network_source("/home/alice/model") == "model", "the login name stays here"
    assert network_source("/Users/alice/model") == "model"


def test_measured_stages():
    model = timm.create_model("sssd_resnet18", num_classes=3, layers=(1, 1, 1, 1)).eval()
    measured = measure_stages(model, torch.randn(2, 3, 32, 32), runs=2)
    assert len(measured.stages) == len(measured.heads) == 4
    assert all(value > 0 for value in (*measured.stages, *measured.heads))


def slow_shared_threshold(logits, labels, budget, chance):
    """The lowest threshold before the first that fails the test, given images lost and won."""
    passed = None
    full = ensemble_answers(logits) == labels
    for threshold in SHARED:
        right, _ = rule_by_hand(logits, labels, [threshold] * 3)
        lost, won = int((full & ~right).sum()), int((~full & right).sum())
        if chance(lost, won, len(labels), budget / 100) > 0.05:
            return passed
        passed = threshold
    return passed


def chance_by_hand(lost, won, count, budget):
    """`p_value` of two ways, by the outcomes one by one and their multinomial chances."""

    def distance(lost, won):
        mean, changed = (lost - won) / (count + 2), (lost + won + 1) / (count + 2)
        return (budget - mean) / ((changed - mean**2) / (count + 2)) ** 0.5

    if (lost - won) / (count + 2) >= budget:
        return 1.0
    losses, wins = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
    losses, wins = losses[losses + wins <= count], wins[losses + wins <= count]
    good = distance(losses, wins) >= distance(lost, won) * (1 - 1e-12)
    ways = gammaln(count + 1) - gammaln(losses + 1) - gammaln(wins + 1) - gammaln(count - losses - wins + 1)
    low = beta.ppf(0.0005, won, count - won + 1) if won else 0.0
    high = min(beta.ppf(0.9995, won + 1, count - won) if won < count else 1.0, (1 - budget) / 2)
    chances = [0.0]
    for rate in np.linspace(low**0.5, high**0.5, 64) ** 2 if low <= high else ():
        same = 1 - budget - 2 * rate
        log = ways + xlogy(losses, budget + rate) + xlogy(wins, rate) + xlogy(count - losses - wins, max(same, 0))
        chances.append(np.exp(log[good]).sum())
    return max(chances) + 0.001


def few_by_hand(lost, won, count, budget):
    """The binomial chance of so few losses."""
    assert won == 0
    return sum(math.comb(count, k) * budget**k * (1 - budget) ** (count - k) for k in range(lost + 1))


@pytest.mark.parametrize("count", [7, 40, 150])
@pytest.mark.parametrize("budget", [0.005, 0.03, 0.3])
def test_the_chance_of_an_outcome_by_hand(count, budget):
    for lost, won in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 5), (3, 2), (6, 0), (2, count - 2), (0, count)):
        expected = min(chance_by_hand(lost, won, count, budget), 1)
        assert p_value(lost, won, count, budget, one_way=False) == pytest.approx(expected, abs=1e-6), (lost, won)
        assert p_value(lost, 0, count, budget, one_way=True) == pytest.approx(few_by_hand(lost, 0, count, budget))


def test_all_or_nothing_may_be_lost():
    assert p_value(100, 0, 100, 1.0, one_way=False) == p_value(100, 0, 100, 1.0, one_way=True) == 0
    assert p_value(0, 0, 100, 0.0, one_way=False) == 1
    assert p_value(1, 2, 100, 0.0, one_way=False) > 0.05
    assert p_value(1, 40, 100, 0.0, one_way=False) < 0.05
    assert p_value(0, 0, 100, 0.0, one_way=True) == 1


def test_a_shared_threshold_is_the_last_that_passes():
    logits, labels = random_logits(count=300)
    found = shared_threshold(3 * logits, labels, 4.0, by_agreement=False)
    assert 0 < found < SHARED[1]
    assert found == slow_shared_threshold(3 * logits, labels, 4.0, chance_by_hand)
    answers = ensemble_answers(3 * logits)
    found = shared_threshold(3 * logits, answers, 4.0, by_agreement=True)
    assert 0 < found < SHARED[1]
    assert found == slow_shared_threshold(3 * logits, answers, 4.0, few_by_hand)


@pytest.mark.parametrize("count", [300, 600, 620, 1000])
@pytest.mark.parametrize("won", [0.0, 0.0002, 0.001, 0.0015, 0.003, 0.02])
def test_a_rule_that_breaks_the_budget_passes_on_one_sample_of_twenty(count, won):
    budget = 0.005
    chance, lost = 0.0, budget + won
    for wins in range(int(binom.ppf(1 - 1e-6, count, won)) + 1):
        for losses in range(count):
            if p_value(losses, wins, count, budget, one_way=False) > 0.05:
                break
            chance += multinomial.pmf([losses, wins, count - losses - wins], count, [lost, won, 1 - lost - won])
    assert chance <= 0.05


@pytest.mark.parametrize("by_agreement", [True, False])
@pytest.mark.long
def test_budgets_are_kept_on_other_images(by_agreement):
    """Of 60 samples of 600 images, 3 in the mean may give a threshold that breaks the budget of 3 points."""
    logits, labels = random_logits(count=40_000)
    logits = 2 * logits
    target = ensemble_answers(logits) if by_agreement else labels
    full, broken = ensemble_answers(logits) == target, 0
    for sample in torch.randperm(40_000, generator=torch.Generator().manual_seed(1))[:36_000].view(60, 600):
        threshold = shared_threshold(logits[:, sample], target[sample], 3.0, by_agreement=by_agreement)
        answers, _ = early_answers(logits, [threshold] * 3)
        lost = 100 * (full.double() - (answers == target).double()).mean().item()
        broken += lost > 3.0
    assert broken <= 7  # 8 or more of 60 have a chance of 1 percent at 5 percent each


def test_a_final_classifier_better_than_the_ensemble_refuses_nothing():
    logits, labels = random_logits(count=4000)
    logits[3] += 2 * F.one_hot(labels, 5)
    logits[:3] *= 3
    ensemble, final = (ensemble_answers(logits) == labels).sum(), (logits[3].argmax(1) == labels).sum()
    assert final > ensemble + 200
    threshold = shared_threshold(logits, labels, 1.0, by_agreement=False)
    answers, _ = early_answers(logits, [threshold] * 3)
    assert 0 < threshold < SHARED[0]
    assert (answers == labels).sum() > ensemble - 40


def test_few_images_show_nothing():
    logits, labels = random_logits(count=100)
    message = r"^100 images .* highest threshold it may change up to 3; .* --answers_changed 3 or more$"
    with pytest.raises(UserError, match=message):
        shared_threshold(logits, ensemble_answers(logits), 0.5, by_agreement=True)
    with pytest.raises(UserError, match=r"would lose at most 0.5 points.*--points_lost"):
        shared_threshold(logits, labels, 0.5, by_agreement=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network that saw nothing, with three classes by name."""
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("network"), 3, input_size=32, label_names=["blue", "green", "red"])


def test_early_exit(folder, folder_of_images, tmp_path, capsys):
    words = [folder, "--data", folder_of_images, "--split", "train", "--runs", "1", "--device", "cpu"]
    millions = multiply_adds(timm.create_model(f"local-dir:{folder}"), (3, 32, 32))["3"] / 1e6
    assert sssd("early-exit", *words, "--multiply_adds", f"{millions:.2f}", "--out", tmp_path / "out") == 0
    assert "Throughput at batch size 128" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    report = json.loads((tmp_path / "out" / "early_exit" / "report.json").read_text())
    assert (tmp_path / "out" / "early_exit" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "out" / "early_exit" / "report.md").read_text()
    assert str(folder_of_images) not in text
    assert "24 images drawn by class from split train" in text

    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert loaded.thresholds == config["model_args"]["thresholds"] == report["thresholds"]
    before = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pairs = zip(loaded.forward_exits(images).logits, before.forward_exits(images).logits, strict=True)
        for (own, old), temperature in zip(pairs, config["early_exit"]["temperatures"], strict=True):
            torch.testing.assert_close(own, old / temperature)
        assert loaded.forward_early(images).exit.shape == (2,)

    assert sum(report["exits_taken"]) == pytest.approx(1)
    answers = report["answers"]
    assert set(answers) == {"1", "2", "3", "4", "ensemble", "early exit"}
    exit4, ensemble, early = (answers[name]["accuracy"] for name in ("4", "ensemble", "early exit"))
    assert f"against the ensemble: {ensemble - early:.2f} points" in text
    assert ("Exit 4 alone** is more accurate than the ensemble" in text) == (exit4 > ensemble)
    costs = stage_costs(loaded, (3, 32, 32))
    assert answers["2"]["multiply_adds"] == sum(costs.stages[:2]) + costs.heads[1]
    assert all(row["milliseconds"][batch] > 0 for row in answers.values() for batch in ("1", "128"))
    assert all(report["speedup"][batch][name] > 0 for batch in ("1", "128") for name in ("ensemble", "4"))
    assert {*report["calibration_error"]["1"]} == {"before", "after"}


def two_splits(folder_of_images, root):
    """The images as split `train`, and mirrored as split `test`."""
    shutil.copytree(folder_of_images, root / "train")
    for file in folder_of_images.rglob("*.png"):
        mirrored = root / "test" / file.relative_to(folder_of_images)
        mirrored.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.mirror(Image.open(file)).save(mirrored)
    return root


@pytest.mark.parametrize("budget", [("--latency", "1000"), ("--points_lost", "100")])
def test_other_budgets(folder, folder_of_images, tmp_path, budget):
    data = two_splits(folder_of_images, tmp_path / "data")
    words = [folder, "--data", data, "--split", "train", "--calibration_split", "test", "--runs", "1"]
    assert sssd("early-exit", *words, *budget, "--device", "cpu", "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "early_exit" / "report.json").read_text())
    assert report["budget"] == {budget[0].removeprefix("--"): float(budget[1])}
    assert "48 images, split train" in report["measured_on"]
    if budget[0] == "--points_lost":  # anything is allowed, so the cheapest is taken
        assert report["exits_taken"] == [1, 0, 0, 0]
    assert sssd("early-exit", *words, "--out", tmp_path / "out") == 2, "it is there already"


def test_equal_splits_of_other_names(folder, folder_of_images, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(folder_of_images, tmp_path / "data" / split)
    words = [folder, "--data", tmp_path / "data", "--split", "train", "--calibration_split", "test"]
    assert sssd("early-exit", *words, "--device", "cpu", "--out", tmp_path / "out") == 2
    assert "48 images of --split train of data are in --calibration_split test too" in one_line(capsys)


@pytest.fixture(scope="module")
def four_classes(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("other") / "network", classes=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}"], "--split"),
        (["{four_classes}", "--split", "train"], "3 classes"),
        (["{folder}", "--split", "train", "--latency", "1", "--points_lost", "1"], "one budget"),
        (["{folder}", "--split", "train", "--multiply_adds", "0.1"], "exit 1 alone takes"),
        (["{folder}", "--split", "train", "--holdout", "2"], "holdout is 2.0;"),
        (["{folder}", "--split", "train", "--runs", "0"], "runs is 0;"),
        (["{folder}", "--split", "train", "--calibration_split", "train"], "48 images of --split train"),
        (["{folder}", "--split", "train", "--calibration_split", "train[:75%]"], "36 images of --split train"),
        (["{folder}", "--split", "train[:32]", "--calibration_split", "train[16:]"], "16 images of --split train[:32]"),
        (["resnet10t"], "resnet10t"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(words, message, folder, four_classes, folder_of_images, tmp_path, capsys):
    words = [word.format(folder=folder, four_classes=four_classes) for word in words]
    assert sssd("early-exit", *words, "--data", folder_of_images, "--out", tmp_path / "out", "--device", "cpu") == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_network_that_gives_nan_is_not_calibrated(folder, folder_of_images, tmp_path, capsys):
    words = [poisoned(folder, tmp_path / "network"), "--data", folder_of_images, "--split", "train", "--device", "cpu"]
    assert sssd("early-exit", *words, "--out", tmp_path / "out") == 2
    assert "what exit 1 of the network gives for 48 of 48 images holds NaN or infinity" in one_line(capsys)
    assert not (tmp_path / "out").exists()
