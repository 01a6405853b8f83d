"""Agreement with numbers from the authors' own code (tests/fixtures), computed on the CPU in float32."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file, save_file

from rrcm import (
    RRCMInputs,
    RRCMLevels,
    consistency_regularizer,
    info_nce,
    karras_levels,
    load_authors_checkpoint,
    num_levels,
    rrcm_loss,
    teacher_decay,
)

DATA = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="module")
def reference():
    return load_file(DATA / "authors_parity.safetensors")


@pytest.fixture
def load(reference, tmp_path):
    """Load one of the reference networks through the public loader, from a file in the authors' pickled format."""

    def loader(prefix):
        path = tmp_path / f"{prefix}.pth"
        torch.save({k.removeprefix(f"{prefix}."): v for k, v in reference.items() if k.startswith(f"{prefix}.")}, path)
        return load_authors_checkpoint(path, num_heads=3)

    return loader


def test_representations_and_projections(reference, load):
    network = load("student").eval()
    for t in ("0.002", "0.5", "1.0", "2.0", "40.0"):
        with torch.no_grad():
            representation = network.encoder(reference["x"] + float(t) * reference["noise"], float(t))
            projection = network.projector(representation)
        assert_close(representation, reference[f"cls_t{t}"])
        assert_close(projection, reference[f"proj_t{t}"])


def test_loss_terms_and_gradients(reference, load):
    student, teacher = load("student").train(), load("target").train()
    levels = karras_levels(int(reference["num_scales"])).tolist()
    n = int(reference["index"])
    loss = rrcm_loss(
        student,
        teacher,
        RRCMInputs(*(reference[name] for name in ("x", "x_aug1", "x_aug2", "noise"))),
        RRCMLevels(levels[n], levels[n + 1], t_min=levels[-1]),
        temperature=float(reference["tau"]),
    )
    for term in ("contrastive", "consistency"):
        torch.testing.assert_close(getattr(loss, term), reference[term], atol=0, rtol=1e-4)
    torch.testing.assert_close(loss.total, reference["loss"], atol=0, rtol=1e-4)
    loss.total.mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])
    torch.testing.assert_close(norm, reference["grad_norm"][0], atol=0, rtol=1e-4)
    patch = student.encoder.patch_embed.proj.weight.grad
    assert (patch - reference["grad_patch"]).norm() <= 1e-4 * reference["grad_patch"].norm()


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_fine_tuned_logits(reference, tmp_path, sigma):
    names = {k.replace("student.", "module.base_model."): v for k, v in reference.items() if k.startswith("student.")}
    names |= {k.replace("head.", "module.linear_head."): v for k, v in reference.items() if k.startswith("head.")}
    torch.save(names, tmp_path / "tuned.pth")
    classifier = load_authors_checkpoint(
        tmp_path / "tuned.pth", num_heads=3, sigma=sigma, levels=int(reference["num_scales"])
    )
    assert classifier.t == pytest.approx(float(reference[f"nearest_t_noise{2 * sigma}"]), rel=1e-6)
    pixels = (reference["x"] + 1) / 2
    with torch.no_grad():
        logits = classifier.eval()(pixels + sigma * reference["noise"])
    assert_close(logits, reference[f"logits_noise{2 * sigma}"])


@pytest.mark.parametrize("weight", [10, 20])
def test_consistency_regularizer(reference, weight):
    logits = torch.stack([reference["logits_a"], reference["logits_b"]])
    answer = consistency_regularizer(logits, weight, 0.5).mean()
    assert_close(answer, reference[f"consistency_loss_l{weight}_e0.5"][0])


def test_regularizer_equals_torch_kl_and_survives_certainty():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7)
    p = logits.softmax(-1)
    mean = p.mean(0)
    divergence = sum(torch.nn.functional.kl_div(q.log(), mean, reduction="none").sum(-1) for q in p) / 3
    entropy = torch.distributions.Categorical(mean).entropy()
    torch.testing.assert_close(consistency_regularizer(logits, 2.0, 0.3), 2 * divergence + 0.3 * entropy)
    certain = torch.tensor([[[200.0, 0.0]], [[200.0, 0.0]]], requires_grad=True)
    consistency_regularizer(certain).sum().backward()
    assert certain.grad.isfinite().all()


def test_schedules():
    with (DATA / "authors_schedule.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 20
    for row in rows:
        step, total = int(row["step"]), int(row["total_steps"])
        mu = teacher_decay(
            step,
            total,
            start=float(row["start_ema"]),
            end=float(row["end_ema"]),
            steepness=float(row["target_ema_A"]),
        )
        assert mu == pytest.approx(float(row["target_ema"]), abs=1e-9, rel=0)
        n = num_levels(step, total, start=int(row["start_scales"]), end=int(row["end_scales"]))
        assert n == int(row["num_scales"])


def test_karras_levels_run_from_loud_to_quiet():
    levels = karras_levels(81)
    assert levels[0] == pytest.approx(80) and levels[-1] == pytest.approx(0.002)
    assert (levels.diff() < 0).all()


def test_info_nce_against_its_definition():
    torch.manual_seed(0)
    anchors, targets = torch.randn(3, 8), torch.randn(7, 8)
    cosine = torch.nn.functional.cosine_similarity(anchors[:, None], targets[None], dim=-1) / 0.2
    expected = [-torch.log(cosine[i].exp()[2 + i] / cosine[i].exp().sum()) for i in range(3)]
    torch.testing.assert_close(info_nce(anchors, targets, 0.2, first_positive=2), torch.stack(expected))


def test_module_prefix_and_safetensors_load_the_same(reference, tmp_path):
    plain = {k.removeprefix("student."): v for k, v in reference.items() if k.startswith("student.")}
    torch.save({f"module.{k}": v for k, v in plain.items()}, tmp_path / "a.pth")
    save_file(plain, tmp_path / "b.safetensors")
    one = load_authors_checkpoint(tmp_path / "a.pth", num_heads=3).state_dict()
    two = load_authors_checkpoint(tmp_path / "b.safetensors", num_heads=3).state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
