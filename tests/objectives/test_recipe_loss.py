"""The README's example of a new loss, taken step by step in a copy of the repository."""

import pytest
import torch
import yaml
from recipe import copy_code, follow, train_and_certify

from rrcm.certification.results import read_certificates

FILES = ["rrcm/objectives/logit_pairing.py", "rrcm/objectives/__init__.py", "rrcm/config.py", "rrcm/config.py"]
FILES += ["conf/config.yaml", "rrcm/methods.py", "conf/preset/all.yaml"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = copy_code(tmp_path_factory.mktemp("loss"))
    assert follow("rrcm/objectives/README.md", "Add a loss", folder) == FILES
    return folder


@pytest.mark.thorough
def test_a_loss_is_trained_with_its_own_setting(copy, tiny_shards):
    weight = "finetune.objectives.logit_pairing.pairing_weight=0.25"
    train_and_certify(copy, tiny_shards, "logit_pairing", weight, "pretrain.objectives=[]")
    own = yaml.safe_load((copy / "params.yaml").read_text())["finetune"]["objectives"]["logit_pairing"]
    assert own == {"pairing_weight": 0.25}
    history = (copy / "models/logit_pairing/sigma_0.5/history.csv").read_text().splitlines()
    assert history[0].split(",")[:4] == ["epoch", "loss", "cross_entropy", "pairing"] and len(history) == 4
    assert len(read_certificates(copy / "certificates/logit_pairing/sigma_0.5.tsv")) > 0


def test_the_formula_is_the_variance_of_the_logits(copy):
    scope: dict = {}
    exec((copy / FILES[0]).read_text(), scope)
    logits = torch.randn(4, 3, 5)
    expected = logits.var(0, correction=0).sum(-1)
    torch.testing.assert_close(scope["logit_distance"](logits), expected)
