"""A package outside the repository: its data set, loss, classifier and methods go through the real stages."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, files_of, stage
from recipe import follow

from rrcm import plugins
from rrcm.certification.results import read_certificates
from rrcm.methods import METHODS, PLUGGED_IN
from rrcm.models.own_code import load_named_classifier
from rrcm.plugins import REGISTRIES, use_plugin
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

FILES = [f"my_package/{name}.py" for name in ("plugin", "stripes", "both_views")]
CLASSIFIER = """
TRAINED_CLASSIFIERS = {"shifted": "my_package.shifted:Shifted"}
FOLDER_LOADERS = {"shifted": "my_package.shifted:load_shifted"}
METHODS += "  shifted  -  gaussian  shifted  #654321  Shifted"
"""
SHIFTED = """
from my_package.amount import AMOUNT
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import build_from_folder, describe_classifier

class Shifted(NoiseConditionedClassifier):
    def forward(self, noisy, draw=None, **options):
        return super().forward(noisy + AMOUNT, **options)

def load_shifted(folder, config):
    return describe_classifier(build_from_folder(folder, config, Shifted), config["class_names"])
"""
MODEL = """
from rrcm import load_base_classifier
from rrcm.plugins import use_plugin

def shifted():
    use_plugin("my_package.plugin")
    return load_base_classifier("models/shifted/sigma_0.25")
"""
SETTINGS = ["plugin=my_package.plugin", "data.source=stripes", "methods=[both_views,shifted]", "sigmas=[0.25]"]
SETTINGS += ["finetune.epochs=2", "finetune.warmup_epochs=1", "finetune.evaluate_every=2", "certify.n=100"]
SETTINGS += ["+finetune.objectives.both_views.clean_weight={default: 0.5, sigma_1.0: 2.0}"]
CLASHES = {"sigmas", "methods", *(text.partition("=")[0] for text in SETTINGS)}


@pytest.fixture(scope="module")
def plugged(tmp_path_factory) -> Path:
    """A folder in which the stages have run with the package of the README, which has got a classifier as well."""
    root = tmp_path_factory.mktemp("plugins")
    folder, package = root / "project", root / "code/my_package"
    folder.mkdir()
    package.mkdir(parents=True)
    assert follow("rrcm/README.md", "Plug-ins", root / "code") == FILES
    with (package / "plugin.py").open("a") as file:
        file.write(CLASSIFIER)
    (package / "shifted.py").write_text(SHIFTED)
    (package / "amount.py").write_text("AMOUNT = 0.01\n")
    tiny = [text for text in TINY if text.partition("=")[0] not in CLASHES]
    for command in (
        ["compose", "--output", "params.yaml", *tiny, *SETTINGS],
        ["shard_data"],
        *([name, method, "0.25"] for method in ("both_views", "shifted") for name in ("finetune", "certify")),
        ["fingerprint"],
    ):
        run(folder, *command)
    return folder


def run(folder: Path, *command: str) -> None:
    """Run a stage that must succeed, with the package on Python's path."""
    answer = stage(folder, *command, PYTHONPATH=str(folder.parent / "code"))
    assert answer.returncode == 0, f"{command}: {answer.stderr}"


def test_the_stages_use_what_the_package_declares(plugged):
    for method, kind in (("both_views", "classifier"), ("shifted", "shifted")):
        described = read_json(plugged / f"models/{method}/sigma_0.25/config.json")
        assert (described["kind"], described["class_names"]) == (kind, ["horizontal", "vertical", "flat"])
        assert read_certificates(plugged / f"certificates/{method}/sigma_0.25.tsv")["correct"].mean() > 0.9
    history = (plugged / "models/both_views/sigma_0.25/history.csv").read_text()
    assert history.split(",")[:3] == ["epoch", "loss", "clean"]


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("both_views", "noisy + self", "2 * noisy + self", {"finetune/both_views"}),
        ("amount", "0.01", "0.02", {"shifted", "latency", "clean_accuracy"}),  # of all stages, and no other method's
        pytest.param("stripes", "+= 200", "+= 190", {"shard-data"}, marks=pytest.mark.thorough),
        pytest.param("plugin", "Both views", "Two views", {"plot"}, marks=pytest.mark.thorough),
        pytest.param("both_views", '"""CE(f', '"""The loss: CE(f', set(), marks=pytest.mark.thorough),
    ],
)
def test_an_edit_of_the_package_changes_the_fingerprints_of_what_runs_it(plugged, tmp_path, file, old, new, stale):
    root = Path(shutil.copytree(plugged.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("models", "runs")))
    path = root / f"code/my_package/{file}.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    before = files_of(root / "project/fingerprints")
    run(root / "project", "fingerprint")
    after = files_of(root / "project/fingerprints")
    changed = {name.removesuffix(".txt") for name in before if before[name] != after[name]}
    assert {name.rpartition("/")[2] if "shifted" in stale else name for name in changed} == stale


@pytest.fixture
def restored(monkeypatch) -> Iterator[None]:
    """What a plug-in changes in this process is undone."""
    for registry in REGISTRIES.values():
        monkeypatch.setattr(registry, "data", dict(registry.data))
    monkeypatch.setattr(plugins, "_used", set())
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    methods = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(methods)
    PLUGGED_IN.clear()
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def test_a_function_of_the_package_gives_its_model_to_the_command_line(plugged, restored, monkeypatch):
    (plugged.parent / "code/my_models.py").write_text(MODEL)
    monkeypatch.syspath_prepend(plugged.parent / "code")
    monkeypatch.chdir(plugged)
    loaded = load_named_classifier("my_models:shifted")
    assert (type(loaded.classifier).__name__, loaded.sigma) == ("Shifted", 0.25)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no module PLUGIN; install its package (pip install -e FOLDER), or put the folder that"),
        ("import no_such_library", "fails with ModuleNotFoundError (No module named 'no_such_library', line 1 of"),
        ("1 / 0", "fails with ZeroDivisionError (division by zero, line 1 of PLUGIN.py); correct it"),
        ("DATASET = {}", "declares nothing; give it DATASETS, FINETUNING, TRAINED_CLASSIFIERS, FOLDER_LOADERS or MET"),
        ("DATASETS = ['stripes']", "DATASETS is a list; must be a dict"),
        ("FINETUNING = {'gaussian': 'a:b'}", "FINETUNING has 'gaussian', which is taken; choose another name"),
        ("METHODS = 'mine  -  gaussian'", "mine has 2 cells after its name; write 5, with two spaces between them"),
        ("DATASETS = {'mine': len}", 'DATASETS has <built-in function len>; name it as "package.module:object"'),
        (
            "METHODS = 'noise\\n  gaussian  -  gaussian  classifier  #123456  Mine'",
            "there is a method gaussian already; give yours another name",
        ),
    ],
)
def test_a_wrong_plugin_is_told_what_is_wrong(tmp_path, monkeypatch, request, content, message):
    name = f"plugin_{abs(hash(request.node.name))}"
    if content is not None:
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    before = {key: dict(registry.data) for key, registry in REGISTRIES.items()}, dict(METHODS)
    with pytest.raises(RRCMError) as caught:
        use_plugin(name)
    assert str(caught.value).startswith(f"plugin {name}: {message.replace('PLUGIN', name)}")
    assert ({key: dict(registry.data) for key, registry in REGISTRIES.items()}, dict(METHODS)) == before


@pytest.mark.slow
def test_settings_without_the_package_say_how_to_find_it(tmp_path):
    answer = stage(tmp_path, "compose", "--output", "params.yaml", "plugin=no_such_package.plugin")
    line = "error: plugin no_such_package.plugin: there is no module no_such_package; install its package ("
    assert answer.returncode == 1 and answer.stderr.startswith(line) and answer.stderr.count("\n") == 1
    assert not (tmp_path / "params.yaml").exists()
