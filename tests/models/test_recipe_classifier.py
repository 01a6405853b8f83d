"""The README's example of a new base classifier, taken step by step in a copy of the repository."""

import pytest
from recipe import copy_code, follow, train_and_certify

from rrcm.certification.results import read_certificates
from rrcm.utils.files import read_json

FILES = ["rrcm/models/mirrored.py", "rrcm/models/__init__.py", "rrcm/models/__init__.py", "rrcm/methods.py"]
FILES += ["conf/preset/all.yaml"]


@pytest.mark.thorough
def test_a_base_classifier_is_trained_and_certified(tmp_path, tiny_shards):
    assert follow("rrcm/models/README.md", "Add a base classifier", copy_code(tmp_path)) == FILES
    train_and_certify(tmp_path, tiny_shards, "rrcm_mirrored")
    described = read_json(tmp_path / "models/rrcm_mirrored/sigma_0.5/config.json")
    assert (described["kind"], described["sigma"]) == ("mirrored", 0.5)
    assert len(read_certificates(tmp_path / "certificates/rrcm_mirrored/sigma_0.5.tsv")) > 0
