"""How pictures are changed at random while a policy learns: `AugmentConfig`, and named ones. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AugmentConfig:
    """How much. Colours as in VLA-Adapter's recipe; each camera view of each frame draws its own."""

    crop: float = 0.9
    """Smallest side of the crop, as a fraction of the picture's; drawn between this and 1, then its place. 1: none."""
    brightness: float = 0.2
    """Added, as a fraction of white."""
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05
    """Fraction of the colour circle. Instructions that name colours bear little of it."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur, as a fraction of the picture's larger side."""
    overlay: float = 0.0
    """Largest opacity of a random texture that is laid over the picture."""

    def beside(self, xyz: object) -> AugmentConfig:
        """The same without crops for a policy that reads places (`xyz`), whose depth would not be cropped with the
        pictures."""
        return self if xyz is None else replace(self, crop=1.0)

    def problem(self) -> str | None:
        """Describe what is wrong with this configuration, or return None."""
        if not 0 < self.crop <= 1:
            return f"augment.crop must be in (0, 1], got {self.crop}"
        for name in ("brightness", "contrast", "saturation", "hue", "blur", "overlay"):
            if not 0 <= getattr(self, name) <= 1:
                return f"augment.{name} must be in [0, 1], got {getattr(self, name)}"
        return None


AUGMENTATIONS: dict[str, AugmentConfig] = {
    "light": AugmentConfig(crop=0.95, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02, blur=0.005),
    "medium": AugmentConfig(blur=0.01, overlay=0.3),
    "strong": AugmentConfig(0.85, 0.35, 0.35, 0.35, blur=0.015, overlay=0.6),
}
"""Changes of recorded pictures, which no simulator can draw anew, by their names for `vla train --randomise`."""
