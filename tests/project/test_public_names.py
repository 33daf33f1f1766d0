"""Names that users import, the models in timm whichever is imported first, and imports that stay light."""

from importlib import import_module

import pytest

from helpers.commands import command

NAMES = [
    "sssd_zoo.hub.save_network",
    "sssd_zoo.hub.save_model_folder",
    "sssd_zoo.hub.model_card",
    "sssd_zoo.detection.load_detector",
    "sssd_zoo.files.write_json",
    "sssd_zoo.errors.UserError",
    "sssd_zoo.data.detection.DetectionDataConfig",
    "sssd_zoo.data.detection.load_detection",
    "sssd_zoo.data.images.Encoded",
    "sssd_zoo.data.images.decode",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_importable(name):
    module, _, attribute = name.rpartition(".")
    assert getattr(import_module(module), attribute) is not None


CREATE = "assert timm.create_model('sssd_resnet18_cifar', num_classes=3, output=1).num_classes == 3"
INTERRUPTED = """
import builtins, sys
import sssd_zoo
original = builtins.__import__
def interrupt(name, *args, **kwargs):
    if name == "torch":
        raise KeyboardInterrupt
    return original(name, *args, **kwargs)
builtins.__import__ = interrupt
try:
    import timm
except KeyboardInterrupt:
    pass
else:
    raise SystemExit("it was not interrupted")
finally:
    builtins.__import__ = original
assert "timm" not in sys.modules
import timm
"""
LATE_INTERRUPT = """
import sys
import sssd_zoo
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "sssd_zoo.models":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
try:
    import timm
except KeyboardInterrupt:
    pass
else:
    raise SystemExit("it was not interrupted")
import timm
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import sssd_zoo, timm",
        "import timm, sssd_zoo",
        "import sssd_zoo; from timm.models import create_model; import timm",
        "import sssd_zoo; import timm.data; import timm",
        "import importlib, sssd_zoo; timm = importlib.import_module('timm')",
        "from sssd_zoo import models; import timm",
        INTERRUPTED,
        LATE_INTERRUPT,
    ],
)
def test_timm_has_the_models_in_each_order_of_imports(imports):
    done = command("-c", f"{imports}\n{CREATE}")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_or_a_network_imports_only_what_that_needs():
    code = """
import sys
import sssd_zoo
assert not {"torch", "timm", "numpy"} & sys.modules.keys()
import sssd_zoo.models.networks
print(*({"matplotlib", "accelerate", "faiss", "sssd_zoo.training.engine"} & sys.modules.keys()))
import sssd_zoo.pipeline.knn
print(*({"matplotlib"} & sys.modules.keys()))
import sssd_zoo.pipeline.fit
print(*({"torchmetrics", "transformers", "faiss", "datasets"} & sys.modules.keys()))
"""
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
