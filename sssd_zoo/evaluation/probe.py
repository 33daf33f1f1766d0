"""Linear probes on the frozen features of every exit, and their ensemble.

`linear_probe` fits one linear classifier per exit to convergence; the paper's accuracies (tables 1 to 3) are those of
linear probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sssd_zoo.configs import ProbeConfig
from sssd_zoo.distributed.progress import progress_bar
from sssd_zoo.errors import UserError

ROWS = 8192  # looked at in one go, so that nothing of the size of all logits is allocated
WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # tried from the strongest on, each from the weights of the one before
HELD_OUT = 0.1  # fraction of the training rows that the weight decay is chosen on
TOLERANCE = 1e-6  # of an iteration's change of the loss: far below what moves an answer


@dataclass(frozen=True)
class Probe:
    """A linear classifier per exit and its accuracy on the test split.

    Attributes:
        weights: float32 [E, C, D], for features as they are (the standardisation is folded in).
        biases: float32 [E, C].
        exits: accuracy of each exit, percent.
        ensemble: accuracy of the mean of the exits' softmax outputs, percent.
        weight_decays: of each exit's classifier.
    """

    weights: Tensor
    biases: Tensor
    exits: list[float]
    ensemble: float
    weight_decays: list[float]

    def logits(self, features: Tensor) -> Tensor:
        """Features [E, B, D] to logits [E, B, C]."""
        return torch.baddbmm(self.biases.unsqueeze(1), features, self.weights.mT)


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    num_classes: int,
    config: ProbeConfig,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Probe:
    """Fits a linear classifier to the frozen features of every exit, and measures it on the test split.

    Multinomial logistic regression: features are standardised per dimension by the training split, and the mean
    cross-entropy + weight_decay / 2 * ||weights||^2 is minimised by L-BFGS until it stops falling, so that the result
    depends neither on the scale of the features nor on a learning rate. scikit-learn's LogisticRegression minimises the
    same with C = 1 / (N weight_decay). Biases are not decayed. The weight decay of each exit is the one of
    `WEIGHT_DECAYS` with the most right answers on a tenth of the training rows, held out class by class; the classifier
    is then fitted to all of them. Nothing is chosen on the test split.

    Args:
        train_x: float32 [E, N, D]; computes on its device.
        train_y: int64 [N] in 0..num_classes-1.
        test_x: float32 [E, M, D].
        test_y: int64 [M].
        num_classes: C.
        config: the weight decay, where it is not to be chosen, and the most iterations.
        seed: for the rows that are held out.
        progress: show a progress bar.

    Raises:
        UserError: if a class has no training row or a label is outside of 0..C-1.
    """
    check_labels(train_y, test_y, num_classes)
    device = train_x.device
    labels, kept, held_out = train_y.to(device), *(rows.to(device) for rows in hold_out_rows(train_y, seed))
    weights, biases, decays = [], [], []
    with progress_bar(len(train_x), "linear probes", "exit", disable=not progress) as bar:
        for exit_x in train_x:
            if config.probe_weight_decay is not None:
                decay, start = config.probe_weight_decay, None
            else:
                decay, start = _choose_weight_decay(exit_x, labels, num_classes, kept, held_out, config.probe_epochs)
            problem = LogisticRegression(exit_x, labels, num_classes, config.probe_epochs)
            weight, bias = problem.unscaled(problem.fit(decay, start))
            weights.append(weight)
            biases.append(bias)
            decays.append(decay)
            bar.update()
    probe = Probe(torch.stack(weights), torch.stack(biases), [], 0.0, decays)
    exits, ensemble = _accuracies(probe, test_x.to(device), test_y.to(device))
    return Probe(probe.weights, probe.biases, exits, ensemble, decays)


def hold_out_rows(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draws `HELD_OUT` of the rows of every class, of a class with few rows none.

    Args:
        labels: int64 [N].
        seed: of the draw.

    Returns:
        The rows that stay, and those that are held out; int64, in order.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # the rows class by class, shuffled in each
    counts = torch.bincount(labels)
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)  # within its class
    drawn = place < (counts * HELD_OUT).long().repeat_interleave(counts)
    return by_class[~drawn].sort().values, by_class[drawn].sort().values


def _choose_weight_decay(
    x: Tensor, labels: Tensor, num_classes: int, kept: Tensor, held_out: Tensor, iterations: int
) -> tuple[float, Tensor | None]:
    """The weight decay with the most right answers on the rows held out, and the parameters found with it."""
    if not len(held_out):
        return WEIGHT_DECAYS[len(WEIGHT_DECAYS) // 2], None
    problem = LogisticRegression(x[kept], labels[kept], num_classes, iterations)
    test_x, test_y = x[held_out], labels[held_out]
    best: tuple[int, float, Tensor | None] = (-1, 0.0, None)
    start: Tensor | None = None
    for decay in WEIGHT_DECAYS:
        start = problem.fit(decay, start)
        weight, bias = problem.unscaled(start)
        hits = int((torch.addmm(bias, test_x, weight.T).argmax(1) == test_y).sum())
        if hits > best[0]:
            best = (hits, decay, start)
    return best[1:]


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Variances, float32 [D], and axes, float32 [D, D], of the principal components of a covariance matrix [D, D]."""
    try:
        variances, axes = torch.linalg.eigh(covariance.double())
    except torch.linalg.LinAlgError:
        # Of fewer rows than dimensions most variances are zero, which LAPACK does not always cope with. The dimensions
        # themselves are as right, and L-BFGS takes more iterations.
        return covariance.diagonal(), torch.eye(len(covariance), device=covariance.device)
    return variances.float(), axes.float()


class LogisticRegression:
    """Multinomial logistic regression on standardised features, fitted on their device.

    Args:
        x: float32 [N, D], features as they are.
        labels: int64 [N] in 0..num_classes-1.
        num_classes: C.
        iterations: of L-BFGS, at most.
    """

    def __init__(self, x: Tensor, labels: Tensor, num_classes: int, iterations: int = ProbeConfig.probe_epochs) -> None:
        self.x, self.labels, self.num_classes, self.iterations = x, labels, num_classes, iterations
        std, self.mean = torch.std_mean(x, dim=0, correction=0)
        # A dimension that a ReLU keeps at zero has a std of 0: it is left at zero rather than divided by that.
        self.scale = torch.where(std > 1e-6, 1 / std, 0.0)
        covariance = sum(rows.T @ rows for rows in ((part - self.mean) * self.scale for part in x.split(ROWS))) / len(x)
        self.variances, self.axes = principal_components(covariance)

    def fit(self, weight_decay: float, start: Tensor | None = None) -> Tensor:
        """The parameters that minimise the loss, float32 [D + 1, C]: of standardised features, the biases last.

        Args:
            weight_decay: factor of half the squared norm of the weights.
            start: parameters to start from; by default zeros.
        """
        if start is None:
            start = self.x.new_zeros(self.x.shape[1] + 1, self.num_classes)
        # On the principal components, each scaled to an alike curvature of the loss: features are so correlated that
        # L-BFGS would need two to seven times as many iterations on the features themselves (CIFAR-10's, D = 512).
        curvature = (self.variances.clamp_min(0) + 10 * weight_decay + 1e-6).sqrt().unsqueeze(1)
        parameters = torch.cat([self.axes.T @ start[:-1] * curvature, start[-1:]]).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [parameters],
            max_iter=self.iterations,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=TOLERANCE,
            tolerance_change=TOLERANCE,
        )

        def on_features() -> Tensor:
            return torch.cat([self.axes @ (parameters.detach()[:-1] / curvature), parameters.detach()[-1:]])

        def closure() -> Tensor:
            loss, gradient = self.loss(on_features(), weight_decay)
            parameters.grad = torch.cat([self.axes.T @ gradient[:-1] / curvature, gradient[-1:]])
            return loss

        optimiser.step(closure)
        return on_features()

    def loss(self, parameters: Tensor, weight_decay: float) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and its gradient, float32 [D + 1, C]; see `fit`.

        The standardisation is folded into the weights: a standardised copy of all features may not fit.
        """
        weight, bias = self.unscaled(parameters)
        loss, gradient = self.x.new_zeros(()), torch.zeros_like(parameters)
        for x, labels in zip(self.x.split(ROWS), self.labels.split(ROWS), strict=True):
            logs = torch.addmm(bias, x, weight.T).log_softmax(1)
            loss -= logs.gather(1, labels.unsqueeze(1)).sum()
            errors = logs.exp_()
            errors.scatter_add_(1, labels.unsqueeze(1), errors.new_full((len(labels), 1), -1.0))
            gradient[:-1].addmm_(x.T, errors)
            gradient[-1] += errors.sum(0)
        # Of the standardised features: x^T e becomes scale * (x^T e - mean sum(e)).
        gradient[:-1].sub_(self.mean.unsqueeze(1) * gradient[-1]).mul_(self.scale.unsqueeze(1))
        gradient /= len(self.x)
        gradient[:-1] += weight_decay * parameters[:-1]
        return loss / len(self.x) + weight_decay / 2 * parameters[:-1].square().sum(), gradient

    def unscaled(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, float32 [C, D], and biases, float32 [C], for features as they are."""
        folded = parameters[:-1] * self.scale.unsqueeze(1)
        return folded.T.contiguous(), parameters[-1] - self.mean @ folded


def _accuracies(probe: Probe, x: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Accuracy in percent of every exit and of the ensemble on features [E, M, D], batch by batch."""
    hits = torch.zeros(len(x) + 1, device=x.device)
    for start in range(0, len(labels), ROWS):
        logits = probe.logits(x[:, start : start + ROWS])
        answers = torch.cat([logits.argmax(2), logits.softmax(2).mean(0, keepdim=True).argmax(2)])
        hits += (answers == labels[start : start + ROWS]).sum(1)
    *exits, ensemble = (100 * hits.double() / len(labels)).tolist()
    return exits, ensemble


def check_labels(train_y: Tensor, test_y: Tensor, num_classes: int, names: Sequence[str] | None = None) -> None:
    """Raises `UserError` unless a probe of these labels, int64 [N] and [M], can be trained and measured.

    The error says which class has no images, by its name where `names` are given.
    """
    for name, labels in (("training", train_y), ("test", test_y)):
        if not len(labels):
            raise UserError(f"the {name} split has no images")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise UserError(f"the {name} labels run from {low} to {high}, but there are {num_classes} classes")
    empty = (torch.bincount(train_y, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        class_name = empty[0] if names is None else f"'{names[empty[0]]}'"
        raise UserError(
            f"class {class_name} has no training images ({len(empty)} of {num_classes} classes have none); use more "
            "images or labels, or give --unlabelled where a command can do without"
        )
