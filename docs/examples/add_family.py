"""Four exits on a network of one's own: `python docs/examples/add_family.py` prints what they cost."""

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from sssd_zoo.models import multiply_adds

default_cfgs = generate_default_cfgs({"own_net": {"input_size": (3, 224, 224), "classifier": "fc"}})


def layer(before: int, after: int) -> nn.Sequential:
    """Halves a map."""
    return nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class OwnNet(nn.Module):
    """What timm asks of a network, and a forward pass that is a chain of modules."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, 256, 256
        self.stem = layer(in_chans, 32)
        self.stages = nn.Sequential(layer(32, 64), layer(64, 128), layer(128, 192), layer(192, 256))
        chs = (64, 128, 192, 256)  # timm's description of the stages' maps
        self.feature_info = [{"num_chs": c, "reduction": 4 << i, "module": f"stages.{i}"} for i, c in enumerate(chs)]
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As in timm."""
        self.num_classes, self.fc = num_classes, nn.Linear(256, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """As in timm."""
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        """The stages, one after the other."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies."""
        return x.mean((2, 3)) if pre_logits else self.fc(x.mean((2, 3)))


@register_model
def own_net(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """The name for timm."""
    return build_model_with_cfg(OwnNet, "own_net", pretrained, **kwargs)


if __name__ == "__main__":
    model = timm.create_model("sssd_backbone", backbone="own_net", num_classes=10)
    for answer, macs in multiply_adds(model, (3, 224, 224)).items():
        print(f"{answer:>8}: {macs / 1e6:7.1f} million MACs")
