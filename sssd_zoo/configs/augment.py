"""How training views are made of images."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

from sssd_zoo.configs.ranges import Checked, Fraction, Range, SettingsError

Degrees = Annotated[float, Range(0, 180)]
Turns = Annotated[float, Range(0, 0.5)]

STRENGTHS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}  # of MoCo v2's colour jitter
OF_RGB = ("saturation", "hue", "grey")  # what has no meaning for images of other channels


@dataclass(kw_only=True)
class AugmentConfig(Checked):
    """How training views are made, beside the crop. The defaults are those of MoCo v2 and of the paper.

    Args:
        flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip, for images without a natural orientation, such as satellite or
            microscope images.
        quarter_turns: rotate by 0, 90, 180 or 270 degrees, all equally likely, for images without a natural
            orientation.
        rotation: largest angle in degrees of a random rotation in either direction.
        jitter: probability of jittering the colours; by default 0.8 in MoCo, SEED and the query's view of contrastive
            self distillation, and 0 in methods that learn from labels.
        brightness: strength of the jitter of brightness; by default 0.4, a factor from 0.6 to 1.4.
        contrast: strength of the jitter of contrast; by default 0.4.
        saturation: strength of the jitter of saturation; by default 0.4. For RGB images only.
        hue: strength of the jitter of hue, in turns of the colour wheel; by default 0.1. For RGB images only.
        grey: probability of turning an image grey; by default 0.2 where `jitter` is 0.8, and else 0. For RGB images
            only.
        blur: probability of Gaussian blur; by default the method's own `blur`, and 0 in methods that learn from labels.
    """

    flip: Fraction = 0.5
    vertical_flip: Fraction = 0.0
    quarter_turns: bool = False
    rotation: Degrees = 0.0
    jitter: Fraction | None = None
    brightness: Fraction | None = None
    contrast: Fraction | None = None
    saturation: Fraction | None = None
    hue: Turns | None = None
    grey: Fraction | None = None
    blur: Fraction | None = None

    def resolved(self, *, contrastive: bool, channels: int = 3, blur: float = 0.0) -> Self:
        """The same with every default filled in.

        Args:
            contrastive: whether the view is one of MoCo, of SEED or of the contrast, not of a method that learns from
                labels.
            channels: of the images.
            blur: the method's own `blur`.

        Raises:
            SettingsError: for settings that contradict one another, or have no meaning for these images.
        """
        jitter = self.jitter if self.jitter is not None else 0.8 if contrastive else 0.0
        for name in STRENGTHS:
            if getattr(self, name) and not jitter:
                raise SettingsError(f"augment.{name} is a strength of the jitter: give augment.jitter above 0 too")
        if self.blur is not None and blur and self.blur != blur:
            raise SettingsError(f"augment.blur {self.blur:g} and blur {blur:g} contradict each other: give one of them")
        for name in OF_RGB if channels != 3 else ():
            if getattr(self, name):
                raise SettingsError(
                    f"augment.{name} is for RGB images, and these have {channels} channel{'s' * (channels > 1)}: "
                    "remove it"
                )
        defaults = {**STRENGTHS, "jitter": jitter, "grey": 0.2 if contrastive else 0.0, "blur": blur}
        if channels != 3:
            defaults |= dict.fromkeys(OF_RGB, 0.0)
        missing: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)

    @property
    def orients(self) -> bool:
        """Whether views are turned or flipped other than from left to right."""
        return bool(self.vertical_flip or self.quarter_turns or self.rotation)
