"""Augmentation of training images.

The loader crops, flips and applies RandAugment to single images with PIL. Colour and blur are applied to batches on the
device. All random numbers are drawn per image, so results do not depend on batching, workers or processes.
"""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageOps

from rrcm.config import Views
from rrcm.utils.pixels import to_unit_range

BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, BLUR, SOLARIZE = range(8)  # columns of `sample_color_blur`
JITTER = (0.4, 0.4, 0.2, 0.1)  # MoCo-v3's strengths of the first four columns
ORDERS = torch.tensor(list(itertools.permutations(range(4))))
LONGEST = 32  # ratio of the longer to the shorter side above which an image is cut before it is resized
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green, blue in a grey value (ITU-R BT.601)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` (antialiased bicubic) and cut the central square.

    An image of this size is returned unchanged. Only the middle of a very long image is resized.
    """
    if image.size == (size, size):
        return image
    width, height = image.size
    short = min(width, height)
    if max(width, height) > LONGEST * short:  # a strip of 20,000 x 2 pixels would become one of 2,240,000 x 224
        w, h = min(width, LONGEST * short), min(height, LONGEST * short)
        left, top = (width - w) // 2, (height - h) // 2
        image = image.crop((left, top, left + w, top + h))
        width, height = w, h
    width, height = size * width // short, size * height // short
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(
    image: Image.Image, size: int, min_area: float, resample: Image.Resampling, rng: np.random.Generator
) -> Image.Image:
    """Cut a random rectangle and resize it to size x size, like torchvision's RandomResizedCrop.

    Its share of the area is uniform in [min_area, 1], and its log aspect ratio in [log 3/4, log 4/3]. If ten rectangles
    in a row do not fit, the largest central one within these aspect ratios is used.
    """
    width, height = image.size
    for _ in range(10):
        area, aspect, top, left = rng.random(4).tolist()
        area = (min_area + (1 - min_area) * area) * width * height
        aspect = math.exp((2 * aspect - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left * (width - w + 1)), int(top * (height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((size, size), resample)


def flip(image: Image.Image, probability: float, rng: np.random.Generator) -> Image.Image:
    """Mirror the image left to right with the given probability."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < probability else image


def to_array(image: Image.Image) -> np.ndarray:
    """A PIL image in mode L or RGB as uint8 (C, H, W), read-only."""
    pixels = np.frombuffer(image.tobytes(), np.uint8)  # half the time of np.asarray on small images
    return pixels.reshape(image.height, image.width, -1).transpose(2, 0, 1)


@dataclass(frozen=True)
class PretrainTransform:
    """Make a pre-training sample of an image: the image and two views.

    Returns `image`, `view1`, `view2`: uint8 (C, size, size), and `color_blur1`, `color_blur2`: float32 (8,). `image` is
    the centre crop, flipped at random. The views are only cropped and flipped here; `color_blur` completes them in
    batches.
    """

    views: Views
    size: int

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        views, sample = self.views, {}
        sample["image"] = to_array(flip(centre_crop(image, self.size), views.flip_prob, rng))
        for i in range(2):
            view = random_resized_crop(image, self.size, views.min_crop_area, Image.Resampling.BILINEAR, rng)
            sample[f"view{i + 1}"] = to_array(flip(view, views.flip_prob, rng))
            sample[f"color_blur{i + 1}"] = sample_color_blur(views, i, rng)
        return sample


def sample_color_blur(views: Views, view: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the parameters of `color_blur` for view 0 or 1 of an image: float32 (8,).

    Columns: factors of brightness, contrast and saturation, hue shift, index of the order, grey, blur sigma, solarize.
    The neutral values (1, 1, 1, 0, any, 0, 0, 0) switch an operation off. The strengths are MoCo-v3's (Chen et al.
    2021); the probabilities come from the settings `views`.
    """
    u = rng.random(12).tolist()
    jittered = u[0] < views.color_jitter_prob
    factors = [(2 * u[i + 1] - 1) * strength * jittered for i, strength in enumerate(JITTER)]
    low, high = views.blur_sigma
    return np.array(
        [
            1 + factors[BRIGHTNESS],
            1 + factors[CONTRAST],
            1 + factors[SATURATION],
            factors[HUE],  # fraction of the colour circle
            int(u[5] * len(ORDERS)),
            u[6] < views.grayscale_prob,
            (low + (high - low) * u[7]) * (u[8] < views.blur_prob[view]),  # pixels
            u[9] < views.solarize_prob[view],
        ],
        np.float32,
    )


def color_blur(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Colour jitter in each image's own order, then greyscale, blur and solarization.

    images (B, C, H, W): uint8, or float32 in [0, 1]. parameters (B, 8) come from `sample_color_blur`. Keep them on the
    CPU, so that selecting rows does not wait for the GPU. Returns float32 in [0, 1], on the device of `images`. With
    one channel, saturation, hue and greyscale do nothing.
    """
    images = to_unit_range(images) if images.dtype == torch.uint8 else images.clone()
    color = images.shape[1] == 3
    operations = [adjust_brightness, adjust_contrast, *([adjust_saturation, adjust_hue] if color else [])]
    order = ORDERS.to(parameters.device)[parameters[:, ORDER].long()]
    jittered = (parameters[:, :4] != parameters.new_tensor([1, 1, 1, 0])).any(1)

    def apply(operation, chosen: torch.Tensor, *columns: int) -> None:
        rows = chosen.nonzero().flatten()
        values = [parameters[rows, column].to(images.device) for column in columns]
        rows = rows.to(images.device)
        images[rows] = operation(images[rows], *values)

    for slot in range(4):
        for column, operation in enumerate(operations):
            apply(operation, jittered & (order[:, slot] == column), column)
    if color:
        apply(lambda x: to_gray(x).expand_as(x), parameters[:, GRAY] > 0)
    apply(gaussian_blur, parameters[:, BLUR] > 0, BLUR)
    apply(lambda x: torch.where(x >= 0.5, 1 - x, x), parameters[:, SOLARIZE] > 0)
    return images


def to_gray(images: torch.Tensor) -> torch.Tensor:
    """The luma of (B, 3, H, W) as (B, 1, H, W). A single channel is returned unchanged."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def blend(images: torch.Tensor, others: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    """factor * images + (1 - factor) * others, clipped to [0, 1]. images (B, C, H, W), factor (B,)."""
    factor = factor.view(-1, 1, 1, 1)
    return (images * factor + others * (1 - factor)).clamp(0, 1)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with black; images (B, C, H, W) in [0, 1], factor (B,)."""
    return blend(images, 0.0, factor)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the mean grey of each image; images (B, C, H, W) in [0, 1], factor (B,)."""
    return blend(images, to_gray(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the greyscale image; images (B, C, H, W) in [0, 1], factor (B,)."""
    return blend(images, to_gray(images), factor)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate the hue of images (B, 3, H, W) in [0, 1] by `shift` (B,), a fraction of the colour circle.

    Value and saturation (HSV) are unchanged.
    """
    red, green, blue = images.unbind(1)
    low, value = images.aminmax(dim=1)
    chroma = value - low
    divisor = chroma.clamp_min(1e-12)  # of grey pixels, for which the differences below are 0
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sector = sector + 6 * shift.view(-1, 1, 1)
    turned = torch.stack([sector + 5, sector + 3, sector + 1], 1).remainder(6)
    ramp = torch.minimum(turned, 4 - turned).clamp(0, 1)
    return value[:, None] - chroma[:, None] * ramp


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur each image of (B, C, H, W) with its own sigma (B,), in pixels.

    At the border the weights inside the image are renormalised. One matrix product per image and axis is faster than a
    convolution with one kernel per image.
    """

    def matrix(size: int) -> torch.Tensor:
        position = torch.arange(size, device=images.device, dtype=torch.float32)
        distance = (position[:, None] - position) / sigma.view(-1, 1, 1)
        return torch.softmax(-0.5 * distance**2, -1)[:, None]  # (B, 1, size, size), rows sum to 1

    return (matrix(images.shape[2]) @ images @ matrix(images.shape[3]).mT).clamp(0, 1)


def pad_and_crop(image: Image.Image, border: int, rng: np.random.Generator) -> Image.Image:
    """Add a black border of `border` pixels, then cut a random crop of the original size."""
    left, top = rng.integers(2 * border + 1, size=2).tolist()
    return ImageOps.expand(image, border).crop((left, top, left + image.width, top + image.height))


@dataclass(frozen=True)
class FinetuneTransform:
    """Make a fine-tuning sample of an image: `image`, uint8 (C, size, size).

    `augmentation` is one of
    none: centre crop;
    flip: centre crop, flipped at random;
    pad_crop_flip: a black border of an eighth of the side, then a random crop, flipped at random (He et al. 2016);
    crop_flip: random resized crop of at least 40 % of the area, flipped at random;
    randaugment: random resized crop of at least 8 % of the area, flipped at random, then timm's rand-m9-mstd0.5-inc1.
    """

    augmentation: str
    size: int

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if self.augmentation in ("none", "flip"):
            image = centre_crop(image, self.size)
        elif self.augmentation == "pad_crop_flip":
            image = pad_and_crop(centre_crop(image, self.size), self.size // 8, rng)
        else:
            min_area = 0.4 if self.augmentation == "crop_flip" else 0.08
            image = random_resized_crop(image, self.size, min_area, Image.Resampling.BICUBIC, rng)
        if self.augmentation != "none":
            image = flip(image, 0.5, rng)
        if self.augmentation == "randaugment":
            image = self._randaugment(image, rng)
        return {"image": to_array(image)}

    @cached_property
    def _policy(self):
        from timm.data.auto_augment import rand_augment_transform  # slow to import

        # The settings of timm's create_transform; the fill is ImageNet's mean colour. Only the bound of the magnitude
        # differs, because at timm's 10 posterize keeps 0 bits, which Pillow rejects.
        settings = {"translate_const": int(self.size * 0.45), "img_mean": (124, 116, 104), "magnitude_max": 9.999}
        return rand_augment_transform("rand-m9-mstd0.5-inc1", settings)

    def _randaugment(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Apply timm's policy, which draws from the global generators: they are seeded from `rng`, then restored."""
        states = random.getstate(), np.random.get_state()
        seeds = rng.integers(2**32, size=2).tolist()
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        try:
            return self._policy(image.convert("RGB")).convert(image.mode)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def mixup_pairs(
    mixup_fn: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    images: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix neighbouring images of a batch: 0 with 1, 2 with 3, and so on.

    Every part of a global batch with an even number of images is therefore mixed in the same way, and the number of
    processes does not matter. `mixup_fn` is a `timm.data.Mixup` with mixup, cutmix or both; it is seeded with `seed`.
    images (B, C, H, W) uint8, labels (B,) -> float images in [0, 255] and soft targets (B, K).
    """
    even = torch.arange(0, len(images), 2, device=images.device)
    order = torch.cat([even, even.flip(0) + 1])  # timm mixes image i with image B - 1 - i
    state = np.random.get_state()
    np.random.seed(seed % 2**32)  # timm draws from numpy's global generator
    mixed, soft_targets = mixup_fn(images[order].float(), labels[order])
    np.random.set_state(state)
    inverse = order.argsort()
    return mixed[inverse], soft_targets[inverse]
