"""The classifier that a fine-tuning starts from: random, pre-trained, from timm, or trained before.

The linear probe is here as well, since it only prepares the head of that classifier.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from rrcm.config import Data, Finetune, Model
from rrcm.data.augment import FinetuneTransform
from rrcm.data.loader import batch_loader, steps_per_epoch
from rrcm.data.shards import ShardedDataset
from rrcm.derived import CONDITIONED
from rrcm.methods import METHODS
from rrcm.models import ENCODERS, TRAINED_CLASSIFIERS
from rrcm.models.architectures import network_classifier
from rrcm.models.base_classifiers import NetworkClassifier, NoiseConditionedClassifier
from rrcm.models.checkpoints import COMPARED, architecture, load_encoder
from rrcm.models.denoised import denoise_pixels
from rrcm.models.denoiser import load_denoiser
from rrcm.models.encoders import Encoder, build_encoder, set_training_options
from rrcm.models.kinds import load_model_folder
from rrcm.training.plan import Training
from rrcm.training.teacher import Teacher
from rrcm.utils.distributed import DistEnv, all_reduce_sum
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import expand_user, sha256_folder
from rrcm.utils.pixels import to_model_space, to_unit_range
from rrcm.utils.rng import derive_seed

Classifier = NoiseConditionedClassifier | NetworkClassifier


class Start(NamedTuple):
    """The state of a training before its first step."""

    classifier: Classifier  # in train mode
    denoise: Callable[[torch.Tensor], torch.Tensor]  # noisy images -> what the classifier sees, both (B, C, H, W)
    inputs: dict[str, str]  # hashes of what was read and is not in the classifier's weights
    teacher: Callable[..., torch.Tensor] | None = None  # of a student: the predictions that it learns


def load_start(training: Training, num_classes: int, device: torch.device) -> Start:
    """The start of a training. Raises `RRCMError` for weights that are missing, damaged or of another network."""
    if training.continued is not None:
        narrow = load_model_folder(training.continued, sigma=training.sigma).classifier
        return Start(
            add_pass_output(narrow, training.sigma, training.common.pass_bias).to(device).train(), nn.Identity(), {}
        )
    if training.parts is None:
        classifier = build_classifier(training, num_classes).to(device).train()
        if training.teacher is None:
            return Start(classifier, nn.Identity(), {})
        teacher = Teacher(training.teacher, training.sigma, training.common.precision, device)
        return Start(classifier, nn.Identity(), {"teacher": sha256_folder(training.teacher)}, teacher)
    denoise = load_denoise(training.parts.denoiser, training.sigma, device)
    classifier = load_model_folder(training.parts.classifier).classifier
    return Start(classifier.to(device).train(), denoise, {"denoiser": sha256_folder(training.parts.denoiser)})


def load_denoise(folder: Path, sigma: float, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The frozen denoiser in a model folder, as a function of images with noise of pixel `sigma`."""
    return partial(denoise_pixels, load_denoiser(folder).requires_grad_(False).to(device), sigma=sigma)


def build_classifier(training: Training, num_classes: int) -> Classifier:
    """The classifier before the first step. All methods that start from scratch start from the same weights."""
    torch.manual_seed(derive_seed(training.seed, "finetune"))
    data, model = training.data, training.model
    if model.architecture not in CONDITIONED:
        classifier = network_classifier(network_settings(model, data), num_classes, training.sigma)
        return with_initial_weights(classifier, training.method, training.common)
    encoder = load_initial_encoder(training.method, training.t, training.files.encoders, training.common, model, data)
    return TRAINED_CLASSIFIERS[METHODS[training.method].trained](encoder, num_classes, training.t)


def add_pass_output(narrow: Classifier, sigma: float, bias: float) -> Classifier:
    """The same classifier with one more output, whose logit is `bias`. Only its last layer is to be trained."""
    if isinstance(narrow, NetworkClassifier):
        wide = network_classifier(narrow.architecture, narrow.num_classes + 1, sigma)
    else:
        wide = type(narrow)(narrow.encoder, narrow.num_classes + 1, narrow.t)
    weights, last = narrow.state_dict(), set()
    for name, value in wide.state_dict().items():
        if value.shape == weights[name].shape:
            value.copy_(weights[name])
        else:
            value.fill_(bias if value.ndim == 1 else 0.0)[:-1] = weights[name]
            last.add(name)
    for name, parameter in wide.named_parameters():
        parameter.requires_grad_(name in last)
    return wide


def network_settings(model: Model, data: Data) -> dict[str, object]:
    """The network that replaces the ViT, as `network_classifier` takes it and a model folder records it."""
    sizes = {"image_size": data.image_size, "channels": data.channels}
    return {"name": model.architecture, **sizes, "pixel_mean": model.pixel_mean, "pixel_std": model.pixel_std}


def with_initial_weights(classifier: NetworkClassifier, method: str, finetune: Finetune) -> NetworkClassifier:
    """The same classifier. If `method` starts from timm's weights, it gets these and a new head.

    Raises `RRCMError` for weights that are missing, damaged or made for another network.
    """
    if METHODS[method].initial_weights == "timm":
        ENCODERS["timm network"](classifier.network, finetune.timm.model, finetune.timm.weights)
    return classifier


def encoder_path(method: str, finetune: Finetune, encoders: Path) -> Path | None:
    """The file or folder of the encoder that a method starts from. For a ViT from timm it may be only a name.

    None for random weights, and for denoising methods, which start from a classifier.
    """
    row = METHODS[method]
    if row.pretrained_here:
        return expand_user(finetune.initial_weights or encoders / row.initial_weights)
    return expand_user(finetune.timm.weights or finetune.timm.model) if row.initial_weights == "timm" else None


def load_initial_encoder(
    method: str, t: float, encoders: Path, finetune: Finetune, model: Model, data: Data
) -> Encoder:
    """The encoder that fine-tuning for noise level t starts from. Random weights use torch's global generator.

    `encoders` holds the pre-trained encoders by objective. Raises `RRCMError` for weights that are missing, damaged, or
    of another network than the settings describe.
    """
    row = METHODS[method]
    encoder = build_encoder(model, data)
    if row.initial_weights == "timm":
        shape = {"image_size": data.image_size, "channels": data.channels, "patch_size": model.patch_size}
        encoder = ENCODERS["timm"](finetune.timm.model, finetune.timm.weights, **shape, t=t)
    elif row.initial_weights is not None:
        path = encoder_path(method, finetune, encoders)
        if finetune.initial_weights is not None and not path.exists():
            raise RRCMError(f"finetune.initial_weights = {finetune.initial_weights!r}: no such folder or file")
        wanted = architecture(encoder)
        encoder = load_encoder(path, {name: wanted[name] for name in COMPARED if name in wanted})
    set_training_options(encoder, model)
    return encoder


def linear_probe(
    training: Training, classifier: NoiseConditionedClassifier, images: ShardedDataset, env: DistEnv
) -> None:
    """Fit the head alone on clean training images, before fine-tuning.

    Clean images have the lowest noise level of the pre-training. Weights from timm are converted for one level only.
    Raises `RRCMError` for a classifier without an attribute `head`.
    """
    if not hasattr(classifier, "head"):
        raise RRCMError(
            f"finetune.linear_probe_epochs = {training.settings.linear_probe_epochs}: {type(classifier).__name__} has "
            "no attribute head to train; name its last layers head, or set it to 0"
        )
    t = classifier.t if training.clean_t is None else training.clean_t
    batch_size, epochs = training.settings.batch_size, training.settings.linear_probe_epochs
    optimizer = torch.optim.AdamW(classifier.head.parameters(), lr=1e-2, weight_decay=0.0)
    batches = batch_loader(
        images,
        FinetuneTransform("none", training.data.image_size),
        batch_size=batch_size,
        seed=derive_seed(training.seed, "probe batches"),
        steps=range(epochs * steps_per_epoch(len(images), batch_size)),
        env=env,
        workers=training.data.workers,
    )
    for batch in batches:
        with torch.no_grad():
            clean = to_model_space(to_unit_range(batch["image"].to(env.device)))
            representation = classifier.encoder(clean, t)
        loss = F.cross_entropy(classifier.head(representation), batch["label"].to(env.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in classifier.head.parameters():
            parameter.grad = all_reduce_sum(parameter.grad) / env.world_size
        optimizer.step()
