"""The README.md beside an exported program. It describes the input and the output, and how to vote with the program."""

RUN = {
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")


def logits_of(noisy):
    return session.run(None, {"images": noisy})[0]""",
    "torch-export": """import torch

program = torch.export.load("model.pt2").module()


def logits_of(noisy):
    with torch.no_grad():
        return program(torch.from_numpy(noisy)).numpy()""",
    "torchscript": """import torch

program = torch.jit.load("model.pt")


def logits_of(noisy):
    with torch.no_grad():
        return program(torch.from_numpy(noisy)).numpy()""",
}

TEXT = """# A base classifier for randomized smoothing

`{file}` maps images (B, {channels}, {size}, {size}), float32 in [0, 1] with Gaussian noise of sigma {sigma:g} added, to
logits (B, {classes}). The noise level and the normalization are inside. `classes.txt` has the names of the classes, one
per line in the order of the logits.

Compared with the original: {compared}.

The program alone is not robust: the majority of its votes on noisy copies is. A certificate says that this majority
does not change within an L2 radius, in pixels of [0, 1]. It is wrong with probability at most alpha.

- Use the program at sigma {sigma:g} only. A cascade of several sigmas is another classifier, with other radii.
- Add the noise to the image in [0, 1], and do not clip the sum.
- Choose the class by n0 = 100 votes, and bound its probability by n = 100,000 others. The same votes must not do both.
- A class without a radius needs 1,000 votes.

```python
import numpy as np
from PIL import Image, ImageOps
from scipy.stats import beta, binomtest, norm

{run}


def read_image(file):
    "The image ({channels}, {size}, {size}) in [0, 1]: its shorter side is resized, and the central square is kept."
    picture = ImageOps.exif_transpose(Image.open(file))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    width, height = picture.size
    short = min(width, height)
    width, height = {size} * width // short, {size} * height // short
    picture = picture.convert("{mode}").resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - {size}) / 2), round((height - {size}) / 2)
    pixels = np.asarray(picture.crop((left, top, left + {size}, top + {size})), np.float32) / 255
    return pixels.reshape({size}, {size}, {channels}).transpose(2, 0, 1)


rng = np.random.default_rng()


def count_votes(image, n, batch=64):
    "Votes by class for n noisy copies of an image ({channels}, {size}, {size}) in [0, 1]."
    votes = np.zeros({classes}, int)
    for first in range(0, n, batch):
        noise = rng.standard_normal((batch, *image.shape), np.float32)
        answers = logits_of(np.float32(image + {sigma!r} * noise)).argmax(1)
        votes += np.bincount(answers[: n - first], minlength={classes})
    return votes


def predict(image, n=1000, alpha=0.001):
    "The class, or -1 where the votes do not decide it."
    votes = count_votes(image, n)
    second, first = np.sort(votes)[-2:]
    return int(votes.argmax()) if binomtest(int(first), int(first + second)).pvalue <= alpha else -1


def certify(image, n0=100, n=100_000, alpha=0.001):
    "The class and its certified radius, or -1 and 0."
    top = int(count_votes(image, n0).argmax())
    votes = int(count_votes(image, n)[top])
    bound = beta.ppf(alpha, votes, n - votes + 1) if votes else 0.0
    return (top, {sigma!r} * float(norm.ppf(bound))) if bound > 0.5 else (-1, 0.0)
```
"""


def export_readme(kind: str, file: str, compared: str, **facts: float) -> str:
    """The text. `kind` is a key of RUN, and `compared` says in one line how the program differs from the original.

    `facts` are `sigma` (pixel units), `channels`, `size` (side of the image in pixels) and `classes` (their number).
    """
    mode = "L" if facts["channels"] == 1 else "RGB"
    return TEXT.format(run=RUN[kind], file=file, compared=compared, mode=mode, **facts)
