"""Figures of the SSSD paper (Chen and Chu, WACV 2023), to stand beside ours: always named as the paper's."""

from typing import NamedTuple


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        data: D_tar.
        method: as `sssd compare` names it.
        network: of the pretext, M_ssl; None without a pretext.
        epochs: of the pretext; None without.
        pretext_data: D_pre, where it is not D_tar.
        values: accuracy in percent of exits 1 to 4 and the ensemble; of a table of one number, that of the last exit.
    """

    data: str
    method: str
    network: str | None
    epochs: int | None
    pretext_data: str | None
    values: tuple[float, ...]


def _rows(
    data: str, rows: dict[tuple[str, int], tuple[float, ...]], pretext_data: str | None = None, method: str = "sssd"
) -> list[Row]:
    return [Row(data, method, network, epochs, pretext_data, values) for (network, epochs), values in rows.items()]


def _random(data: str, *values: float) -> list[Row]:
    return [Row(data, "random", None, None, None, values)]


# The paper resizes ImageNet-1K to 32 px where it is D_pre of CIFAR. Where its table 1 gives 53.49, table 6 has 53.50.
TABLES: dict[int, list[Row]] = {
    1: [
        *_random("CIFAR-10", 42.34, 42.10, 41.92, 44.03, 45.99),
        *_rows(
            "CIFAR-10",
            {
                ("ResNet-18", 200): (78.54, 79.47, 79.71, 80.00, 82.05),
                ("ResNet-18", 800): (81.96, 83.32, 83.96, 84.10, 85.75),
                ("ResNet-50", 200): (78.93, 79.75, 80.08, 80.22, 82.20),
                ("ResNet-50", 800): (83.15, 84.72, 85.81, 85.94, 87.36),
            },
        ),
        *_random("CIFAR-100", 18.05, 17.88, 18.66, 21.06, 21.34),
        *_rows(
            "CIFAR-100",
            {
                ("ResNet-18", 200): (52.78, 53.49, 53.51, 53.24, 57.01),
                ("ResNet-18", 800): (54.44, 55.72, 56.24, 55.85, 59.71),
                ("ResNet-50", 200): (51.33, 52.17, 52.08, 52.03, 55.76),
                ("ResNet-50", 800): (57.37, 58.90, 60.54, 60.25, 63.60),
            },
        ),
        *_random("ImageNet-1K", 12.07, 12.25, 13.19, 16.83, 16.24),
        *_rows(
            "ImageNet-1K",
            {
                ("ResNet-18", 200): (44.19, 45.68, 48.53, 51.95, 52.35),
                ("ResNet-18", 800): (45.86, 48.05, 51.38, 54.82, 54.82),
                ("ResNet-50", 200): (48.41, 50.97, 55.24, 58.45, 58.11),
                ("ResNet-50", 800): (50.23, 53.74, 58.63, 61.86, 61.12),
            },
        ),
    ],
    2: [
        *_rows("ImageNet-1K", {("ResNet-50", 200): (56.55,), ("ResNet-101", 200): (59.02,)}, method="clusterfit"),
        *_rows("ImageNet-1K", {("ResNet-50", 200): (57.90,), ("ResNet-101", 200): (58.90,)}, method="seed"),
        *_rows("ImageNet-1K", {("ResNet-50", 200): (58.45,), ("ResNet-101", 200): (60.46,)}),
    ],
    3: [
        Row("ImageNet-1K", "dacsd", None, None, None, (45.59, 48.14, 51.63, 49.77, 53.62)),
        *_rows("ImageNet-1K", {("ResNet-50", 200): (48.41, 50.97, 55.24, 58.45, 58.11)}),
    ],
    6: [
        *_rows(
            "CIFAR-10",
            {
                ("ResNet-18", 200): (78.54, 79.47, 79.71, 80.00, 82.05),
                ("ResNet-50", 200): (78.93, 79.75, 80.08, 80.22, 82.20),
            },
        ),
        *_rows(
            "CIFAR-10",
            {
                ("ResNet-18", 200): (80.53, 82.21, 83.44, 83.47, 84.97),
                ("ResNet-50", 200): (83.19, 85.05, 86.58, 86.54, 87.60),
            },
            "ImageNet-1K",
        ),
        *_rows(
            "CIFAR-100",
            {
                ("ResNet-18", 200): (52.78, 53.50, 53.51, 53.24, 57.01),
                ("ResNet-50", 200): (51.33, 52.17, 52.08, 52.03, 55.76),
            },
        ),
        *_rows(
            "CIFAR-100",
            {
                ("ResNet-18", 200): (53.88, 55.90, 57.32, 57.21, 60.76),
                ("ResNet-50", 200): (57.35, 59.85, 61.14, 60.83, 64.12),
            },
            "ImageNet-1K",
        ),
    ],
}

# Table 4: accuracy in percent on ImageNet-1K after fine-tuning on a fraction of its labels, by the network of the
# pretext, 200 epochs, and the labels in percent.
TABLE_4: dict[str, dict[float, float]] = {
    "ResNet-50": {1: 40.16, 10: 57.41, 20: 61.18, 30: 63.19, 40: 64.54, 50: 65.53},
    "ResNet-101": {1: 42.58, 10: 58.48, 20: 62.05, 30: 64.09, 40: 65.36, 50: 65.94},
}


def named_rows() -> dict[str, tuple[float, ...]]:
    """All rows of five numbers by name, such as 'CIFAR-10: ResNet-18, 200 epochs'."""
    rows: dict[str, tuple[float, ...]] = {}
    for number in (1, 3, 6):
        for row in TABLES[number]:
            name = {"random": "random labels", "dacsd": "DACSD"}.get(row.method, f"{row.network}, {row.epochs} epochs")
            name += f" on {row.pretext_data}" if row.pretext_data else ""
            rows.setdefault(f"{row.data}: {name}", row.values)
    return rows
