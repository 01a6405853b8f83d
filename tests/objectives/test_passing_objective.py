"""The objective that trains an output for pass, and the rule for where it should pass."""

import numpy as np
import pytest
import torch
from test_joint_objective import CPU, SIGMAS, B, K, batch, gradients, network

from rrcm.models.architectures import network_classifier
from rrcm.models.joint import JointSigmas
from rrcm.objectives.base import StepRandomness
from rrcm.objectives.gaussian import Gaussian
from rrcm.objectives.joint import join_objectives
from rrcm.objectives.passing import PassingObjective, pass_targets
from rrcm.training.start import add_pass_output

LIST, RANGE = JointSigmas(SIGMAS), JointSigmas(SIGMAS, (0.2, 1.1))


def wide():
    """The network of the joint tests, with an output for pass."""
    classifier = add_pass_output(network(), 1.0, 0.0)
    torch.nn.init.normal_(classifier.head.weight)
    return classifier.requires_grad_(True)


def objective(noise: JointSigmas, bias: float = 0.0) -> PassingObjective:
    return PassingObjective(join_objectives("gaussian", [Gaussian(sigma, 3) for sigma in SIGMAS], noise), bias)


@pytest.mark.parametrize("noise", [LIST, RANGE])
def test_each_image_has_the_cross_entropy_of_its_sigma_with_pass_as_a_class(noise):
    """At the smallest sigma the output is ignored, even if the target asks for it. Its logit is lower by the bias."""
    classifier, bias = wide(), -0.7
    share = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 0.5, 0]]).repeat(B // 3, 1)
    whole = batch() | {"passes": share}

    def classify(noisy, frozen=False, t=None):
        return classifier(noisy, t=t)

    mixed = gradients(objective(noise, bias), classify, classifier, whole, range(B))
    sigmas = noise.draw(StepRandomness(0, 3, range(B), B, CPU).uniform("joint sigma").tolist())
    scales = noise.nearest(sigmas)
    assert {0, 2} <= set(scales)
    single = []
    for b, (sigma, scale) in enumerate(zip(sigmas, scales, strict=True)):
        classifier.t, rows = 2 * sigma, {key: value[b : b + 1] for key, value in whole.items()}
        passes = rows["passes"][:, scale, None]
        if scale:
            rows["target"] = torch.cat([(1 - passes) * rows["target"], passes], 1)

        def shifted(noisy, frozen=False, scale=scale):
            logits = classifier(noisy)
            return torch.cat([logits[:, :K], logits[:, K:] - bias], 1) if scale else logits[:, :K]

        single.append(gradients(Gaussian(sigma, 3), shifted, classifier, rows, [b]))
        if not scale:
            assert not single[-1]["head.weight"][K].any() and not single[-1]["head.bias"][K].any()
    for key, value in mixed.items():
        torch.testing.assert_close(value, sum(one[key] for one in single) / B, atol=1e-5, rtol=2e-4, msg=key)


def test_the_encoder_costs_forward_passes_alone():
    assert objective(LIST).forwards_per_image == 3 and objective(LIST).terms == ()
    trained = {name for name, p in add_pass_output(network(), 1.0, 0.0).named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"}


def test_the_new_output_starts_at_the_bias_and_leaves_the_others():
    narrow, pixels = network().eval(), torch.rand(4, 1, 8, 8)
    logits = add_pass_output(narrow, 1.0, -1.5).eval()(pixels)
    assert torch.equal(logits[:, :K], narrow(pixels)) and (logits[:, K:] == -1.5).all() and logits.shape == (4, K + 1)


def test_a_network_without_condition_can_pass():
    sizes = {"name": "lenet", "image_size": 28, "channels": 1, "pixel_mean": None, "pixel_std": None}
    narrow, pixels = network_classifier(sizes, 3, 0.5).eval(), torch.rand(4, 1, 28, 28)
    wide = add_pass_output(narrow, 0.5, 2.0).eval()
    torch.testing.assert_close(wide(pixels)[:, :3], narrow(pixels))
    assert wide.num_classes == 4 and (wide(pixels)[:, 3] == 2).all()
    assert sum(parameter.requires_grad for parameter in wide.parameters()) == 2


def test_a_sigma_belongs_to_the_closest_of_the_list():
    assert RANGE.nearest([0.2, 0.25, 0.35, 0.36, 0.7, 0.72, 1.1]) == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("votes", "expected"),  # of a label, 0, at three sigmas
    [
        ([[9, 1, 0], [1, 9, 0], [4, 6, 0]], [0, 0.9, 0.6]),  # only the smallest sigma is right
        ([[9, 1, 0], [9, 1, 0], [10, 0, 0]], [0, 0.1, 0]),  # all are
        ([[1, 9, 0], [2, 8, 0], [0, 9, 1]], [0, 0, 0]),  # none is
        ([[1, 9, 0], [9, 1, 0], [1, 0, 9]], [0, 0, 0.9]),  # the middle one is
        ([[5, 5, 0], [0, 10, 0], [0, 10, 0]], [0, 0, 0]),  # a draw is not right
    ],
)
def test_the_share_of_pass_is_that_of_wrong_votes_where_a_smaller_sigma_is_right(votes, expected):
    found = pass_targets(np.array([votes]), np.array([0]))
    assert found.dtype == np.float32 and found[0].tolist() == pytest.approx(expected)
