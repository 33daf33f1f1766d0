"""Figures of the SSSD paper (Chen and Chu, WACV 2023), to stand beside ours: always named as the paper's."""

# Table 1 (and, marked, 3 and 6): accuracy in percent of exits 1 to 4 and the ensemble, by data set and row. A row is
# named by the network of the pretext, its epochs, and its data where they are not the same.
TABLE_1: dict[str, dict[str, tuple[float, ...]]] = {
    "CIFAR-10": {
        "random labels": (42.34, 42.10, 41.92, 44.03, 45.99),
        "ResNet-18, 200 epochs": (78.54, 79.47, 79.71, 80.00, 82.05),
        "ResNet-18, 800 epochs": (81.96, 83.32, 83.96, 84.10, 85.75),
        "ResNet-50, 200 epochs": (78.93, 79.75, 80.08, 80.22, 82.20),
        "ResNet-50, 800 epochs": (83.15, 84.72, 85.81, 85.94, 87.36),
        "ResNet-18, 200 epochs on ImageNet-32 (table 6)": (80.53, 82.21, 83.44, 83.47, 84.97),
        "ResNet-50, 200 epochs on ImageNet-32 (table 6)": (83.19, 85.05, 86.58, 86.54, 87.60),
    },
    "CIFAR-100": {
        "random labels": (18.05, 17.88, 18.66, 21.06, 21.34),
        "ResNet-18, 800 epochs": (54.44, 55.72, 56.24, 55.85, 59.71),
        "ResNet-50, 800 epochs": (57.37, 58.90, 60.54, 60.25, 63.60),
    },
    "ImageNet-1K": {
        "random labels": (12.07, 12.25, 13.19, 16.83, 16.24),
        "ResNet-18, 200 epochs": (44.19, 45.68, 48.53, 51.95, 52.35),
        "ResNet-50, 200 epochs": (48.41, 50.97, 55.24, 58.45, 58.11),
        "ResNet-50, 800 epochs": (50.23, 53.74, 58.63, 61.86, 61.12),
        "DACSD (table 3)": (45.59, 48.14, 51.63, 49.77, 53.62),
    },
}

# Table 2: accuracy in percent of a ResNet-18 on ImageNet-1K, by method and the network of the pretext, 200 epochs.
TABLE_2: dict[str, dict[str, float]] = {
    "ResNet-50": {"ClusterFit": 56.55, "SEED": 57.90, "SSSD": 58.45},
    "ResNet-101": {"ClusterFit": 59.02, "SEED": 58.90, "SSSD": 60.46},
}

# Table 4: accuracy in percent on ImageNet-1K after fine-tuning on a share of its labels, by the network of the pretext,
# 200 epochs, and the labels in percent.
TABLE_4: dict[str, dict[float, float]] = {
    "ResNet-50": {1: 40.16, 10: 57.41, 20: 61.18, 30: 63.19, 40: 64.54, 50: 65.53},
    "ResNet-101": {1: 42.58, 10: 58.48, 20: 62.05, 30: 64.09, 40: 65.36, 50: 65.94},
}
