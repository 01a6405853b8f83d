"""The objective of classifiers that can pass, and the rule for where they should."""

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from test_joint_objective import CPU, SIGMAS, B, K, batch, expert_at, experts, gradients, network

from rrcm.models.joint import JointSigmas
from rrcm.objectives import FINETUNING
from rrcm.objectives.base import StepRandomness
from rrcm.objectives.joint import join_objectives
from rrcm.objectives.passing import PassingObjective, pass_targets
from rrcm.training.start import copy_outputs

LIST, RANGE = JointSigmas(SIGMAS), JointSigmas(SIGMAS, (0.2, 1.1))
OBJECTIVES = sorted(FINETUNING.keys() - {"cat_rs"})  # its soft labels know no pass


def wide():
    """The network of the joint tests, with an output for pass."""
    narrow = network()
    classifier = copy_outputs(narrow, type(narrow)(narrow.encoder, K + 1, 1.0))
    torch.nn.init.normal_(classifier.head.weight)
    return classifier


def passes() -> torch.Tensor:
    share = torch.tensor(
        [[0, 1, 1], [0, 0, 1], [1, 0.5, 0]]
    )  # pass is ignored at the smallest sigma, even if asked for
    return share.repeat(B // 3, 1)


@pytest.mark.parametrize("noise", [LIST, RANGE])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_image_has_the_loss_of_the_expert_with_pass_as_a_class(name, noise):
    """At the smallest sigma, that of the expert without the output. Also where a process has images of one kind."""
    each, classifier = experts(name, noise), wide()
    whole = batch() | {"passes": passes()}
    objective = PassingObjective(join_objectives(name, each, noise))

    def classify(noisy, frozen=False, t=None):
        return classifier(noisy, t=t)

    mixed = gradients(objective, classify, classifier, whole, range(B))
    sigmas = noise.draw(StepRandomness(0, 3, range(B), B, CPU).uniform("joint sigma").tolist())
    scales = noise.nearest(sigmas)
    assert {0, 2} <= set(scales)
    single = []
    for b, (sigma, scale) in enumerate(zip(sigmas, scales, strict=True)):
        rows = {key: value[b : b + 1] for key, value in whole.items()}
        alone = gradients(objective, classify, classifier, rows, [b])
        classifier.t = 2 * sigma
        share = rows["passes"][:, scale, None]
        if scale:
            rows["target"] = torch.cat([(1 - share) * rows["target"], share], 1)
        outputs = K + (scale > 0)
        single.append(
            gradients(
                expert_at(noise, each, sigma),
                lambda noisy, frozen=False, outputs=outputs: classifier(noisy)[:, :outputs],
                classifier,
                rows,
                [b],
            )
        )
        torch.testing.assert_close(alone["loss"], single[-1]["loss"], rtol=1e-5, atol=1e-5)
        if not scale:
            assert not alone["head.weight"][K].any() and not alone["head.bias"][K].any()
    scale = max(float(value.abs().max()) for value in mixed.values())
    for key, value in mixed.items():
        torch.testing.assert_close(value, sum(one[key] for one in single) / B, atol=2e-5 * scale, rtol=2e-4, msg=key)


def test_passing_costs_nothing():
    joint = join_objectives("smoothadv", experts("smoothadv", LIST), LIST)
    assert PassingObjective(joint).forwards_per_image == joint.forwards_per_image
    assert PassingObjective(joint).terms == joint.terms


def test_a_sigma_belongs_to_the_closest_of_the_list():
    assert RANGE.nearest([0.2, 0.25, 0.35, 0.36, 0.7, 0.72, 1.1]) == [0, 0, 0, 1, 1, 2, 2]


VOTES = [  # of a label, 0, at three sigmas
    [[9, 1, 0], [1, 9, 0], [1, 9, 0]],  # only the smallest sigma is right
    [[9, 1, 0], [9, 1, 0], [9, 1, 0]],  # all are, and the largest certifies most
    [[1, 9, 0], [1, 9, 0], [1, 9, 0]],  # none is
    [[9, 1, 0], [9, 1, 0], [4, 3, 3]],  # the largest is right, but certifies less
    [[1, 9, 0], [9, 1, 0], [1, 0, 9]],  # the middle one is right
]


def test_a_sigma_passes_where_a_smaller_one_certifies_more():
    expected = [[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1]]
    found = pass_targets(np.array(VOTES), np.zeros(5, int), SIGMAS, 0.0)
    assert found.dtype == bool and found.astype(int).tolist() == expected


def test_the_gain_must_exceed_the_dial():
    votes, labels = np.array(VOTES), np.zeros(5, int)
    radius = {share: 0.5 * (ndtri(share[0] / 11) - ndtri(share[1] / 11)) for share in ((9.5, 1.5), (4.5, 3.5))}
    gain = 0.5 * radius[9.5, 1.5] - radius[4.5, 3.5]
    for dial, expected in ((gain - 1e-6, True), (gain + 1e-6, False)):
        assert pass_targets(votes, labels, SIGMAS, dial)[3, 2] == expected
    assert not pass_targets(votes, labels, SIGMAS, 100.0).any()
    fewer = pass_targets(votes, labels, SIGMAS, 0.6)
    assert (fewer <= pass_targets(votes, labels, SIGMAS, 0.0)).all() and fewer[0].tolist() == [False, True, True]
