"""What DVC watches: all code and settings that decide a stage's result, and no more."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, compose
from dvc.repo import Repo

from rrcm.config import Pretrain, load_config
from rrcm.methods import PER_OBJECTIVE
from rrcm.objectives import PRETRAINING
from rrcm.utils.resume import source_files

MODULES = {
    "shard-data": "rrcm.data.sharding",
    "pretrain": "rrcm.training.pretrain",
    "denoiser": "rrcm.training.denoiser",
    "finetune": ("rrcm.training.ensemble", "rrcm.training.denoised"),
    "soft-labels": "rrcm.certification.soft_labels",
    "certify": "rrcm.certification.certify",
    "latency": "rrcm.evaluation.latency",
    "attack": "rrcm.evaluation.attack",
    "conditional-denoiser": "rrcm.training.denoiser",
    "generate": "rrcm.evaluation.generation",
    "plot": "rrcm.report.build",
}
# Modules that can stop a stage but not change what it computes. Settings and the method table are watched by value.
NO_RESULTS = {
    "config",
    "methods",
    "utils.app",
    "utils.describe",
    "utils.errors",
    "utils.files",
    "utils.progress",
    "utils.provenance",
}
NO_RESULTS |= {"utils.resume", "utils.tensors", "data.verification"}


def definition(stage: str) -> dict:
    """The stage in dvc.yaml."""
    found = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"][stage]
    return found.get("do", found)


@pytest.mark.parametrize("stage", MODULES)
def test_a_stage_watches_the_code_that_its_module_imports(stage):
    watched = set()
    for dep in definition(stage)["deps"]:
        path = REPOSITORY / dep
        if dep.startswith("rrcm/"):
            files = [path] if path.suffix == ".py" else path.glob("*.py")
            watched |= {str(file.relative_to(REPOSITORY)) for file in files}
    modules = [MODULES[stage]] if isinstance(MODULES[stage], str) else MODULES[stage]
    needed = {
        str(path.relative_to(REPOSITORY))
        for module in modules
        for name, path in source_files(module).items()
        if name.removeprefix("rrcm.") not in NO_RESULTS
        and (path.name != "__init__.py" or re.search(r"^from rrcm", path.read_text(), re.MULTILINE))
    } - {"rrcm/__init__.py"}
    assert watched - {"rrcm/config.py", "rrcm/methods.py"} == needed


def test_pretraining_watches_every_setting_that_concerns_its_objective():
    params = definition("pretrain")["params"]
    watched = {name.removeprefix("pretrain.") for name in params if name.startswith("pretrain.")}
    own = {*PER_OBJECTIVE, *PRETRAINING}
    assert watched == set(Pretrain.model_fields) - {"objectives"} - own
    assert "derived.pretrain.${item.objective}" in params


def test_finetuning_watches_the_columns_of_the_table_that_decide_a_result():
    from rrcm.methods import APPEARANCE, Method

    (cells,) = (entry["rrcm/methods.py"] for entry in definition("finetune")["params"] if isinstance(entry, dict))
    assert {cell.rsplit(".", 1)[1] for cell in cells} == set(Method.__dataclass_fields__) - APPEARANCE


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """A DVC repository with the real dvc.yaml, whose stages are all up to date. The outputs are dummies."""
    folder = tmp_path_factory.mktemp("dvc")
    for name in ("rrcm", "stages"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", folder)
    (folder / "external").mkdir()
    (folder / "external/empty").touch()
    compose(folder / "params.yaml", *METHODS)
    repo = Repo.init(str(folder), no_scm=True)
    for stage in repo.index.stages:
        for out in stage.outs:
            path = Path(out.fs_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.write_text(out.def_path)
            else:
                path.mkdir()
                (path / "file").write_text(out.def_path)
    with contextlib.chdir(folder):
        repo.commit(force=True)
        assert repo.status() == {}
    return folder


METHODS = ["sigmas=[0.5]", "methods=[rrcm,consistency,consistency_matched,gaussian]"]
METHODS += ["finetune.lr={default: 5e-3, sigma_0.5: 4e-3}"]  # DVC has to cope with such keys


@pytest.fixture
def repository(committed, tmp_path) -> Path:
    return Path(shutil.copytree(committed, tmp_path / "repository"))


def changed(folder: Path) -> set[str]:
    """Stages that DVC would run again for what changed in their own code and settings."""
    with contextlib.chdir(folder), Repo() as repo:
        return {name for name, what in repo.status().items() if any("changed deps" in each for each in what)}


@pytest.mark.parametrize(("methods", "stages"), [("[rrcm,gaussian]", []), ("[gaussian,cat_rs]", ["gaussian-0.25"])])
def test_soft_labels_are_a_stage_where_a_method_needs_them(tmp_path, methods, stages):
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    compose(tmp_path / "params.yaml", f"methods={methods}")
    index = Repo.init(str(tmp_path), no_scm=True).index
    found = {stage.name: {dep.def_path for dep in stage.deps} for stage in index.stages}
    assert [name for name in found if name.startswith("soft-labels")] == [f"soft-labels@{name}" for name in stages]
    needing = {name for name, deps in found.items() if "data/soft_labels.safetensors" in deps}
    assert needing == ({"finetune@cat_rs-0.25", "finetune@cat_rs-0.5"} if stages else set())
    for name in stages:
        assert "models/gaussian/sigma_0.25" in found[f"soft-labels@{name}"]


@pytest.mark.parametrize("objectives", [[], ["rrcm"]])
def test_images_are_generated_where_the_settings_say_so(tmp_path, objectives):
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    compose(tmp_path / "params.yaml", *([f"generate.objectives={objectives}"] if objectives else []))
    index = Repo.init(str(tmp_path), no_scm=True).index
    found = {stage.name: {dep.def_path for dep in stage.deps} for stage in index.stages}
    wanted = {f"{kind}@{name}" for name in objectives for kind in ("conditional-denoiser", "generate")}
    assert {name for name in found if name.startswith(("conditional", "generate"))} == wanted
    for name in wanted:
        assert "models/pretrain/rrcm" in found[name]


@pytest.mark.parametrize(
    ("overrides", "denoisers", "classifiers"),
    [
        (["methods=[rrcm,gaussian]"], [], []),
        (["methods=[gaussian,dds]"], ["denoiser@trained"], ["gaussian-0.001"]),
        (["methods=[diffsmooth,densepure]"], ["denoiser@trained"], ["gaussian-0.001", "gaussian-0.25"]),
        (["methods=[dds]", "denoised.model=resnet18"], ["denoiser@trained"], []),
        (["methods=[dds]", "denoiser.public.source=hf-hub:a/b"], ["denoiser@public"], ["gaussian-0.001"]),
    ],
)
def test_methods_that_denoise_bring_their_parts(tmp_path, overrides, denoisers, classifiers):
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    config = load_config(compose(tmp_path / "params.yaml", *overrides))
    index = Repo.init(str(tmp_path), no_scm=True).index
    found = {stage.name: {dep.def_path for dep in stage.deps} for stage in index.stages}
    assert [name for name in found if name.startswith("denoiser")] == denoisers
    runs = {f"finetune@{method}-{sigma}" for method in config.methods for sigma in config.sigmas}
    trained = {name for name in found if name.startswith("finetune")}
    assert trained - runs == {f"finetune@{name}" for name in classifiers} - runs
    for name in (name for name in trained if "models/denoiser" in found[name]):
        needed = {path for path in found[name] if path.startswith("models/gaussian")}
        assert len(needed) == (0 if config.denoised.model else 1)


def edit(path: Path, pattern: str, replacement: str) -> None:
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.DOTALL)
    assert count == 1
    path.write_text(text)


@pytest.mark.parametrize(
    ("column", "value", "again"),
    [
        ("objective", '"gaussian"', {"finetune@consistency-0.5", "plot"}),
        ("budget", '"total"', {"finetune@consistency-0.5", "plot"}),
        ("label", '"Jeong & Shin"', {"plot"}),
    ],
)
def test_a_changed_row_of_the_table_retrains_that_method_alone(repository, column, value, again):
    edit(repository / "rrcm/methods.py", rf'("consistency": \{{.*?"{column}": )"[^"]*"', rf"\g<1>{value}")
    assert changed(repository) == again


def test_a_new_row_of_the_table_retrains_nothing(repository):
    edit(repository / "rrcm/methods.py", r"\nTABLE = \{", '\nTABLE = {\n    "new": {"objective": "gaussian"},')
    assert changed(repository) == {"plot"}


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("pretrain.lr=7e-3", {"pretrain@rrcm", "plot"}),
        ("pretrain.steps=31", {"pretrain@rrcm", "finetune@consistency_matched-0.5", "plot"}),
        ("pretrain.lr={default: 7e-3, dmae: 1e-3}", {"pretrain@rrcm", "plot"}),
        ("pretrain.temperature={rrcm: 0.2, default: 1.0}", {"plot"}),
        ("pretrain.dmae.sigma=0.5", {"plot"}),
        ("pretrain.objectives=[rrcm,moco_v3]", {"pretrain@moco_v3", "plot"}),
        ("finetune.lr=4e-3", {"plot", *(f"finetune@{m}-0.5" for m in METHODS[1][9:-1].split(","))}),
        ("seed=1", {"shard-data", "pretrain@rrcm", *(f"finetune@{m}-0.5" for m in METHODS[1][9:-1].split(","))}),
    ],
)
def test_changed_settings_rerun_the_stages_that_they_concern(repository, override, again):
    """Scratch methods do not depend on pre-training, but for the compute that a matched one gets."""
    compose(repository / "params.yaml", *METHODS, override)
    found = changed(repository)
    if override == "seed=1":
        assert found >= again
    else:
        assert found == again


def test_a_changed_encoder_retrains_the_methods_that_start_from_it(repository):
    (repository / "models/pretrain/rrcm/file").write_text("other weights")
    assert {name for name in changed(repository) if name.startswith("finetune")} == {"finetune@rrcm-0.5"}
