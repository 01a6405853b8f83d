"""The figures of stage `generate`: any number of images, grey or colour, the same bytes when drawn again."""

import numpy as np
import pytest
import torch
from PIL import Image

from rrcm.evaluation.generation import CURVES, Generated, Nearest
from rrcm.report.figures import FORMATS, save_all
from rrcm.report.generated_images import draw_frechet_distance, draw_generated_images


def results(channels: int, shown: int) -> Generated:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 20, channels, 8, 8), dtype=torch.uint8, generator=generator)
    names, neighbour = ("test", "from_test", "from_noise"), torch.arange(20)
    return Generated(
        t=[4.0, 0.2, 0.002],
        distance={name: [3.0 + i, 2.0, 1.0] for i, name in enumerate(CURVES)},
        floor={"trained": 1.0, "untrained": 0.5},
        variance={"trained": 10.0, "untrained": 4.0},
        own_cosine=0.9,
        other_cosine=0.0,
        images=dict(zip(names, pixels[:3], strict=True)),
        nearest={name: Nearest(neighbour.double(), neighbour) for name in names},
        shown=list(range(shown)),
        neighbours=dict(zip(names, pixels[3:, :shown], strict=True)),
    )


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (3, 4)])
@pytest.mark.parametrize("draw", [draw_frechet_distance, draw_generated_images])
def test_figures_are_drawn_alike_twice(tmp_path, draw, channels, shown):
    save_all({name: draw(results(channels, shown)) for name in ("one", "two")}, tmp_path)
    for suffix in FORMATS:
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    drawn = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).reshape(-1, 3)
    assert (drawn != drawn[0]).any()


def test_every_image_stands_above_its_nearest_training_image():
    found = results(channels=3, shown=4)
    panels = [axes for axes in draw_generated_images(found).axes if axes.images]
    drawn = [torch.as_tensor(axes.images[0].get_array()).permute(2, 0, 1) for axes in panels]
    rows = [found.images["test"], found.images["from_test"], found.neighbours["from_test"]]
    rows += [found.images["from_noise"], found.neighbours["from_noise"]]
    assert len(drawn) == 20
    for place, image in enumerate(drawn):
        assert torch.equal(image, rows[place // 4][place % 4])
    assert [axes.get_xlabel() for axes in panels[8:12]] == ["0.00", "1.00", "2.00", "3.00"]


def test_the_distances_are_divided_by_the_variance_of_their_encoder():
    (axes,) = draw_frechet_distance(results(1, 1)).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines[CURVES["noisy"]]) == [0.3, 0.2, 0.1] and lines["pure noise"][0] == 0.4
    assert list(lines[CURVES["untrained"]]) == [1.25, 0.5, 0.25]
