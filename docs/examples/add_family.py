"""Four exits on a network of one's own: `python docs/examples/add_family.py` prints the MACs of each."""

import timm
from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from sssd_zoo.models import multiply_adds

WIDTHS = (32, 64, 128, 192, 256)
default_cfgs = generate_default_cfgs({"own_net": {"input_size": (3, 224, 224), "classifier": "fc"}})


class OwnNet(nn.Module):
    """What timm asks of a network, and a forward pass that is a chain of modules."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, WIDTHS[-1], WIDTHS[-1]
        self.stem = ConvNormAct(in_chans, WIDTHS[0], 3, stride=2)
        self.stages = nn.Sequential(*(ConvNormAct(WIDTHS[i], WIDTHS[i + 1], 3, stride=2) for i in range(4)))
        # What the maps of the stages are: channels, by how much smaller than the image, and the module that gives each.
        self.feature_info = [{"num_chs": WIDTHS[i + 1], "reduction": 4 << i, "module": f"stages.{i}"} for i in range(4)]
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As in timm."""
        self.num_classes, self.fc = num_classes, nn.Linear(WIDTHS[-1], num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """As in timm."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.forward_head(self.forward_features(x))

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
    print(multiply_adds(timm.create_model("sssd_backbone", backbone="own_net"), (3, 224, 224)))
