"""The settings of every step as dataclasses: one definition for Python, the `sssd` command and the recipes.

This package imports nothing else of sssd-zoo.
"""

from sssd_zoo.configs.commands import (
    CardArgs,
    CompareArgs,
    DetectArgs,
    DetectEvalArgs,
    DistillArgs,
    EarlyExitArgs,
    ExportArgs,
    FinetuneArgs,
    FitArgs,
    KNNArgs,
    LinearArgs,
    ModelsArgs,
    PredictArgs,
    PretrainArgs,
    PseudoLabelArgs,
    PublishArgs,
    PublishLabelsArgs,
    PullArgs,
    QualityArgs,
    RepoConfig,
    SEEDArgs,
    SpaceArgs,
)
from sssd_zoo.configs.data import DataConfig, DetectionDataConfig
from sssd_zoo.configs.evaluation import ForwardConfig, KNNConfig, ProbeConfig, QualityConfig
from sssd_zoo.configs.methods import (
    AnchoredConfig,
    ClusterConfig,
    DetectorConfig,
    MoCoConfig,
    PretextConfig,
    SEEDConfig,
    SelfDistillationConfig,
)
from sssd_zoo.configs.ranges import SettingsError
from sssd_zoo.configs.training import OptimConfig, RuntimeConfig

__all__ = [
    "AnchoredConfig",
    "CardArgs",
    "ClusterConfig",
    "CompareArgs",
    "DataConfig",
    "DetectArgs",
    "DetectEvalArgs",
    "DetectionDataConfig",
    "DetectorConfig",
    "DistillArgs",
    "EarlyExitArgs",
    "ExportArgs",
    "FinetuneArgs",
    "FitArgs",
    "ForwardConfig",
    "KNNArgs",
    "KNNConfig",
    "LinearArgs",
    "MoCoConfig",
    "ModelsArgs",
    "OptimConfig",
    "PredictArgs",
    "PretextConfig",
    "PretrainArgs",
    "ProbeConfig",
    "PseudoLabelArgs",
    "PublishArgs",
    "PublishLabelsArgs",
    "PullArgs",
    "QualityArgs",
    "QualityConfig",
    "RepoConfig",
    "RuntimeConfig",
    "SEEDArgs",
    "SEEDConfig",
    "SelfDistillationConfig",
    "SettingsError",
    "SpaceArgs",
]
