"""Augmentation: operations agree with torchvision, and the frequencies of random choices with the settings.

Frequencies are tested at 5 standard errors: correct code fails one such check in about 2 million.
"""

import math
import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from conftest import assert_close
from PIL import Image

from rrcm.config import Views
from rrcm.data import augment
from rrcm.data.augment import FinetuneTransform, PretrainTransform, centre_crop, color_blur, sample_color_blur, to_array
from rrcm.utils.rng import numpy_rng

MOCO = Views(
    min_crop_area=0.08,
    flip_prob=0.5,
    color_jitter_prob=0.8,
    grayscale_prob=0.2,
    blur_prob=(1.0, 0.1),
    blur_sigma=(0.1, 2.0),
    solarize_prob=(0.0, 0.2),
)
NEUTRAL = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0.0])


def colours(count: int = 6, size: int = 16) -> torch.Tensor:
    """Random images with cases that are hard for hue: grey, black, white, two equal channels."""
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[0, :, 0] = torch.tensor([[0.3, 0, 1, 0.7]]).repeat(3, size // 4)
    images[0, 1, 1] = images[0, 0, 1]
    return images


def photo(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def frequency_is(hits: np.ndarray, probability: float) -> bool:
    return abs(hits.mean() - probability) <= 5 * math.sqrt(probability * (1 - probability) / len(hits))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("column", "values", "reference"),
    [
        (augment.BRIGHTNESS, (0.6, 1.0, 1.4), F.adjust_brightness),
        (augment.CONTRAST, (0.6, 0.9, 1.4), F.adjust_contrast),
        (augment.SATURATION, (0.8, 0.99, 1.2), F.adjust_saturation),
        (augment.HUE, (-0.1, 0.03, 0.1), F.adjust_hue),
        (augment.GRAY, (1.0,), lambda x, _: F.rgb_to_grayscale(x, x.shape[-3])),
        (augment.SOLARIZE, (1.0,), lambda x, _: F.solarize(x, 0.5)),
    ],
)
def test_operations_equal_torchvision(channels: int, column: int, values: tuple[float, ...], reference):
    images = colours()[:, :channels]
    for value in values:
        parameters = NEUTRAL.repeat(len(images), 1)
        parameters[1:, column] = value  # the first image does not change
        result = color_blur(images, parameters)
        assert torch.equal(result[0], images[0])
        assert_close(result[1:], reference(images[1:], value))


def test_hue_of_degenerate_colours_equals_torchvision():
    images = colours()
    for shift in (-0.1, 0.07):
        result = augment.adjust_hue(images, torch.full((len(images),), shift))
        assert_close(result, F.adjust_hue(images, shift))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvision(sigma: float):
    """Renormalised weights at the border: blur of the zero-padded image divided by the blur of zero-padded ones."""
    images, radius = colours(), 15
    size = [2 * radius + 1] * 2

    def padded_blur(x: torch.Tensor) -> torch.Tensor:
        wide = F.gaussian_blur(F.pad(x, [2 * radius]), size, [sigma] * 2)
        return wide[..., 2 * radius : -2 * radius, 2 * radius : -2 * radius]

    expected = padded_blur(images) / padded_blur(torch.ones_like(images))
    parameters = NEUTRAL.repeat(len(images), 1)
    parameters[:, augment.BLUR] = sigma
    assert_close(color_blur(images, parameters), expected)


def test_each_image_has_its_own_sigma_order_and_batch():
    """Each image gives the same result alone and in a batch, and jitter runs in the drawn order."""
    generator, images = np.random.default_rng(0), (colours(64) * 255).byte()
    parameters = torch.from_numpy(np.stack([sample_color_blur(MOCO, 1, generator) for _ in range(64)]))
    together = color_blur(images, parameters)
    assert together.dtype == torch.float32 and together.min() >= 0 and together.max() <= 1
    for i in range(64):
        assert_close(color_blur(images[i : i + 1], parameters[i : i + 1])[0], together[i])
    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    for number, order in enumerate(augment.ORDERS.tolist()):
        factors = [1.4, 0.6, 1.2, -0.1]
        row = torch.tensor([[*factors, number, 0, 0, 0]])
        expected = images[:1].float() / 255
        for operation in order:
            expected = steps[operation](expected, factors[operation])
        assert_close(color_blur(images[:1], row), expected)


def test_color_blur_does_not_change_its_input():
    images = colours()
    before = images.clone()
    parameters = NEUTRAL.repeat(len(images), 1)
    parameters[:, augment.SOLARIZE] = 1
    color_blur(images, parameters)
    assert torch.equal(images, before)


def test_color_blur_frequencies():
    n = 20000
    for view in (0, 1):
        generator = np.random.default_rng(view)
        rows = np.stack([sample_color_blur(MOCO, view, generator) for _ in range(n)])
        jittered = (rows[:, :4] != [1, 1, 1, 0]).any(1)
        assert frequency_is(jittered, 0.8)
        assert frequency_is(rows[:, augment.GRAY] == 1, 0.2)
        assert frequency_is(rows[:, augment.BLUR] > 0, (1.0, 0.1)[view])
        assert frequency_is(rows[:, augment.SOLARIZE] == 1, (0.0, 0.2)[view])
        both = (rows[:, augment.BLUR] > 0) & (rows[:, augment.SOLARIZE] == 1)
        assert frequency_is(both, (0.0, 0.02)[view])  # choices are independent
        assert frequency_is(jittered & (rows[:, augment.GRAY] == 1), 0.16)
        for number in range(24):
            assert frequency_is(rows[:, augment.ORDER] == number, 1 / 24)
        blurred = rows[rows[:, augment.BLUR] > 0, augment.BLUR]
        assert blurred.min() >= 0.1 and blurred.max() <= 2.0 and frequency_is(blurred < 1.05, 0.5)
        active = rows[jittered]
        for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
            values = (active[:, column] - low) / (high - low)
            assert values.min() >= -1e-6 and values.max() <= 1 + 1e-6
            assert frequency_is(values < 0.25, 0.25) and frequency_is(values < 0.75, 0.75)
        correlations = np.corrcoef(active[:, :4].T) - np.eye(4)
        assert np.abs(correlations).max() < 5 / math.sqrt(len(active))


def test_crop_equals_torchvision_and_has_its_statistics(monkeypatch: pytest.MonkeyPatch):
    """Record the cut rectangle; its pixels must equal torchvision's resized_crop."""
    boxes, image, crop = [], photo(120, 100), Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or crop(self, box))
    rng, n = numpy_rng(0), 8000
    for i in range(n):
        result = augment.random_resized_crop(image, 24, 0.08, Image.Resampling.BILINEAR, rng)
        if i < 20:
            left, top, right, bottom = boxes[-1]
            expected = crop(image, boxes[-1]).resize((24, 24), Image.Resampling.BILINEAR)
            assert np.array_equal(np.asarray(result), np.asarray(expected))
            reference = F.resized_crop(image, top, left, bottom - top, right - left, [24, 24])
            assert np.array_equal(np.asarray(result), np.asarray(reference))
    left, top, right, bottom = np.array(boxes).T
    area, aspect = (right - left) * (bottom - top) / 12000, (right - left) / (bottom - top)
    assert left.min() == 0 and top.min() == 0 and right.max() == 120 and bottom.max() == 100
    assert area.min() > 0.075 and aspect.min() > 0.72 and aspect.max() < 1.38  # up to rounding of sides
    assert frequency_is(area < 0.4, (0.4 - 0.08) / 0.92 / _fits(120, 100, 0.08)[0])
    assert frequency_is(aspect < 1, _fits(120, 100, 0.08)[1])
    small = area < 0.3  # these have room to move: the position must be uniform
    assert left[small].min() == top[small].min() == 0 and right[small].max() == 120 and bottom[small].max() == 100
    place = left[small] / (120 - (right - left)[small])
    assert abs(place.mean() - 0.5) < 5 * math.sqrt(1 / 12 / small.sum())


def _fits(width: int, height: int, low: float) -> tuple[float, float]:
    """Probability that a drawn rectangle fits, and that a fitting one is upright; by numerical integration."""
    area = (low + (1 - low) * (np.arange(2000) + 0.5) / 2000) * width * height
    aspect = np.exp(np.linspace(-1, 1, 2001) * math.log(4 / 3))[:, None]
    fits = (np.round(np.sqrt(area * aspect)) <= width) & (np.round(np.sqrt(area / aspect)) <= height)
    return fits.mean(), fits[:1000].sum() / fits.sum()


def test_if_no_crop_fits_it_is_central():
    wide = photo(300, 10)
    result = augment.random_resized_crop(wide, 10, 1.0, Image.Resampling.BILINEAR, numpy_rng(0))
    expected = F.resized_crop(wide, 0, 143, 10, 13, [10, 10])
    assert np.array_equal(np.asarray(result), np.asarray(expected))
    tall = augment.random_resized_crop(
        wide.transpose(Image.Transpose.TRANSPOSE), 10, 1.0, Image.Resampling.BILINEAR, numpy_rng(0)
    )
    assert np.array_equal(np.asarray(tall), np.asarray(expected.transpose(Image.Transpose.TRANSPOSE)))


def test_flip_rate():
    image, rng = photo(2, 2), numpy_rng(0)
    flipped = np.array([augment.flip(image, 0.3, rng) is not image for _ in range(10000)])
    assert frequency_is(flipped, 0.3)
    assert np.array_equal(to_array(augment.flip(image, 1.0, rng)), to_array(image)[:, :, ::-1])


@pytest.mark.parametrize("shape", [(40, 30), (30, 49), (49, 30), (31, 31), (8, 300), (5, 5)])
def test_centre_crop_equals_torchvision(shape: tuple[int, int]):
    image = photo(*shape)
    reference = F.center_crop(F.resize(image, 24, F.InterpolationMode.BICUBIC), [24, 24])
    assert np.array_equal(np.asarray(centre_crop(image, 24)), np.asarray(reference))


def test_centre_crop_at_its_size_is_a_no_op():
    image = photo(24, 24)
    assert centre_crop(image, 24) is image
    assert np.array_equal(to_array(image), np.asarray(image).transpose(2, 0, 1))
    gray = image.convert("L")
    assert np.array_equal(to_array(gray), np.asarray(gray)[None])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pretrain_sample(mode: str):
    transform = pickle.loads(pickle.dumps(PretrainTransform(MOCO, 16)))
    image = photo().convert(mode)
    sample = transform(image, numpy_rng(0))
    assert list(sample) == ["image", "view1", "color_blur1", "view2", "color_blur2"]
    for name in ("image", "view1", "view2"):
        assert sample[name].shape == (len(mode), 16, 16) and sample[name].dtype == np.uint8
    assert sample["color_blur1"].shape == (8,) and sample["color_blur1"].dtype == np.float32
    assert not np.array_equal(sample["view1"], sample["view2"])
    again = transform(image, numpy_rng(0))
    assert all(np.array_equal(sample[name], again[name]) for name in sample)
    centre = to_array(centre_crop(image, 16))
    both = {transform(image, numpy_rng(0, i))["image"].tobytes() for i in range(20)}
    assert both == {centre.tobytes(), centre[:, :, ::-1].tobytes()}
    blurs = [transform(image, numpy_rng(1, i))["color_blur1"][augment.BLUR] > 0 for i in range(50)]
    assert all(blurs)  # the first view always blurs


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_finetune_samples(mode: str):
    image = photo(20, 20).convert(mode)
    centre = to_array(image)

    def results(augmentation: str) -> list[np.ndarray]:
        transform = pickle.loads(pickle.dumps(FinetuneTransform(augmentation, 20)))
        first = [transform(image, numpy_rng(0, i))["image"] for i in range(40)]
        again = [transform(image, numpy_rng(0, i))["image"] for i in range(40)]
        assert all(x.shape == (len(mode), 20, 20) and x.dtype == np.uint8 for x in first)
        assert all(map(np.array_equal, first, again))
        return first

    assert all(np.array_equal(x, centre) for x in results("none"))
    assert {x.tobytes() for x in results("flip")} == {centre.tobytes(), centre[:, :, ::-1].tobytes()}
    assert len({x.tobytes() for x in results("crop_flip")}) > 35
    assert len({x.tobytes() for x in results("randaugment")}) > 35


def test_pad_crop_flip_takes_every_window_of_the_padded_image():
    image = photo(16, 16)
    padded = np.pad(to_array(image), ((0, 0), (2, 2), (2, 2)))
    windows = [padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    expected = {x.tobytes() for window in windows for x in (window, window[:, :, ::-1])}
    found = {FinetuneTransform("pad_crop_flip", 16)(image, numpy_rng(0, i))["image"].tobytes() for i in range(600)}
    assert found == expected  # each is missed with a chance of (1 - 1/50)^600, less than 1e-5


def test_crop_flip_keeps_at_least_40_percent(monkeypatch: pytest.MonkeyPatch):
    areas, image, crop = [], photo(100, 100), Image.Image.crop
    monkeypatch.setattr(
        Image.Image, "crop", lambda self, b: areas.append((b[2] - b[0]) * (b[3] - b[1]) / 1e4) or crop(self, b)
    )
    for augmentation, low in (("crop_flip", 0.4), ("randaugment", 0.08)):
        areas.clear()
        for i in range(300):
            FinetuneTransform(augmentation, 8)(image, numpy_rng(0, i))
        assert low - 0.02 < min(areas) < low + 0.05


def test_randaugment_is_timms(monkeypatch: pytest.MonkeyPatch):
    """After the crop the result equals timm's transform with the same seeds."""
    import random

    from timm.data.auto_augment import rand_augment_transform

    monkeypatch.setattr(augment, "random_resized_crop", lambda image, *_: image)
    monkeypatch.setattr(augment, "flip", lambda image, *_: image)
    settings = {"translate_const": 9, "img_mean": (124, 116, 104), "magnitude_max": 9.999}
    policy = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    image = photo(20, 20)
    for i in range(30):
        ours = FinetuneTransform("randaugment", 20)(image, numpy_rng(0, i))["image"]
        seeds = numpy_rng(0, i).integers(2**32, size=2).tolist()
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        assert np.array_equal(ours, to_array(policy(image)))


def test_randaugment_at_its_largest_magnitude(monkeypatch: pytest.MonkeyPatch):
    """The magnitude is Gaussian; with timm's bound it reaches a value at which Pillow cannot posterize."""
    monkeypatch.setattr("random.gauss", lambda *_: 12.0)
    transform = FinetuneTransform("randaugment", 20)
    for i in range(200):  # 15 operations, two per image
        transform(photo(20, 20), numpy_rng(0, i))
