"""What DVC watches: the code and the settings that decide a stage's result, and no more."""

import json
import re
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import pytest
import yaml
from conftest import REPOSITORY, compose, make_project
from dvc.repo import Repo
from dvc.stage import Stage
from pydantic import BaseModel

from benchmarks.edits import EDITS, Edit, changed_stages, make_committed, renew, replace, stages_after
from rrcm.config import Config, load_config, parse_config
from rrcm.derived import SECTIONS, derived_settings, training_noise
from rrcm.fingerprints import NO_RESULTS, TABLES, find_items, fingerprint_text
from rrcm.methods import COLUMNS, METHODS

SETTINGS = ["sigmas=[0.5]", "methods=[rrcm,consistency,consistency_matched,gaussian]"]
SETTINGS += ["+finetune.lr={sigma_0.5: 4e-3}"]  # DVC has to cope with such keys
ENDINGS = (".tsv", ".samples.tsv", ".json")
RUN = ["rrcm", "consistency", "consistency_matched", "gaussian"]


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """A DVC repository with the real dvc.yaml, whose stages are all up to date. The outputs are dummies."""
    folder = tmp_path_factory.mktemp("dvc")
    make_committed(REPOSITORY, folder, SETTINGS)
    return folder


@pytest.fixture
def repository(committed, tmp_path) -> Path:
    return Path(shutil.copytree(committed, tmp_path / "repository"))


def finetunings(*methods: str) -> set[str]:
    return {f"finetune@{method}-0.5" for method in methods}


def stages_of(folder: Path, *overrides: str) -> dict[str, Stage]:
    """The stages of dvc.yaml by name, with the tiny settings and these overrides."""
    shutil.copy(REPOSITORY / "dvc.yaml", folder)
    compose(folder / "params.yaml", *overrides)
    repo = Repo(str(folder)) if (folder / ".dvc").exists() else Repo.init(str(folder), no_scm=True)
    return {stage.name: stage for stage in repo.index.stages}


def inputs(stage: Stage) -> set[str]:
    return {dep.def_path for dep in stage.deps}


def outputs(stage: Stage) -> set[str]:
    return {out.def_path for out in stage.outs}


EXPECTED = {
    "a new row of the method table": {"plot"},
    "the formula of the consistency loss": finetunings("rrcm", "consistency", "consistency_matched"),
    "the noise of certification": {"clean-accuracy", "latency", *(f"certify@{method}-0.5" for method in RUN)},
    "a colour of the report": {"plot"},
    "a setting of one method": {"plot", *finetunings("gaussian")},
    "a setting of a method that is not run": {"plot"},
    "a setting of all fine-tunings": {"plot", *finetunings(*RUN)},
    "a setting of certification": {"plot", *(f"certify@{method}-0.5" for method in RUN)},
}  # all others: nothing


@pytest.mark.thorough
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_an_edit_reruns_what_it_changes(committed, tmp_path, edit: Edit):
    assert stages_after(edit, committed, tmp_path / "copy", SETTINGS) == EXPECTED.get(edit.name, set())


@pytest.mark.slow
@pytest.mark.parametrize(("methods", "stages"), [("[rrcm,gaussian]", []), ("[gaussian,cat_rs]", ["gaussian-0.25"])])
def test_soft_labels_are_a_stage_where_a_method_needs_them(tmp_path, methods, stages):
    found = {name: inputs(stage) for name, stage in stages_of(tmp_path, f"methods={methods}").items()}
    assert [name for name in found if name.startswith("soft-labels")] == [f"soft-labels@{name}" for name in stages]
    needing = {name for name, deps in found.items() if "data/soft_labels.safetensors" in deps}
    assert needing == ({"finetune@cat_rs-0.25", "finetune@cat_rs-0.5"} if stages else set())
    for name in stages:
        assert "models/gaussian/sigma_0.25" in found[f"soft-labels@{name}"]


@pytest.mark.slow
def test_a_joint_method_is_trained_once_and_certified_at_each_sigma(tmp_path):
    found = stages_of(tmp_path, "methods=[rrcm,rrcm_joint]")
    stages = {name: stage for name, stage in found.items() if "rrcm_joint" in name}
    certifications = [f"certify@rrcm_joint-{sigma}" for sigma in (0.25, 0.5)]
    assert set(stages) == {"finetune@rrcm_joint-joint", *certifications, "certify-cascade@rrcm_joint"}
    training = stages["finetune@rrcm_joint-joint"]
    assert training.cmd == "python stages/finetune.py rrcm_joint joint"
    assert "models/pretrain/rrcm" in inputs(training)
    assert outputs(training) == {"models/rrcm_joint/joint", "timings/finetune/rrcm_joint/joint.json"}
    assert all("models/rrcm_joint/joint" in inputs(stages[name]) for name in certifications)


@pytest.mark.slow
def test_a_method_that_can_pass_brings_the_joint_one_and_its_votes(tmp_path):
    stages = {name: inputs(stage) for name, stage in stages_of(tmp_path, "methods=[rrcm,rrcm_joint_pass]").items()}
    votes = "data/training_votes/rrcm_joint.safetensors"
    assert "models/rrcm_joint/joint" in stages["training-votes@rrcm_joint"]
    assert {"models/rrcm_joint/joint", votes} <= stages["finetune@rrcm_joint_pass-joint"]
    assert "finetune@rrcm_joint-joint" in stages and "certify@rrcm_joint-0.25" not in stages
    assert [name for name, deps in stages.items() if votes in deps] == ["finetune@rrcm_joint_pass-joint"]


@pytest.mark.slow
def test_a_student_depends_on_the_model_of_its_teacher_and_retrains_with_its_settings(tmp_path):
    found = stages_of(tmp_path, "methods=[rrcm_joint,gaussian,distill,distill_joint]")
    students = ["distill-0.25", "distill-0.5", "distill_joint-joint"]
    stages = {name: inputs(stage) for name, stage in found.items()}
    assert [name for name in stages if name.startswith("finetune@distill")] == [f"finetune@{name}" for name in students]
    assert all("models/rrcm_joint/joint" in stages[f"finetune@{name}"] for name in students)
    values, hashes = yaml.safe_load((tmp_path / "params.yaml").read_text()), []
    changes = [
        {},
        {"student": {"embed_dim": 16}},
        {"student": {"teacher": "gaussian_joint"}},
        {"pretrain": {"t_min": 1}},
    ]
    for change in changes:
        changed = {name: values[name] | change.get(name, {}) for name in SECTIONS if name not in ("methods", "sigmas")}
        hashes.append(derived_settings(values | changed)["settings"]["finetune"])
    for name, at in (("distill", "sigma_0_5"), ("distill_joint", "joint")):
        assert len({each[name][at] for each in hashes}) == len(hashes)
    assert len({each["gaussian"]["sigma_0_5"] for each in hashes}) == 1


@pytest.mark.slow
def test_a_cascade_depends_on_the_models_of_its_parts(tmp_path):
    found = stages_of(tmp_path, "methods=[rrcm,rrcm_joint,gaussian]", "cascade.methods=[rrcm,rrcm_joint]")
    stages = {name: stage for name, stage in found.items() if name.startswith("certify-cascade")}
    assert set(stages) == {"certify-cascade@rrcm", "certify-cascade@rrcm_joint"}
    for method, models in (("rrcm", "models/rrcm"), ("rrcm_joint", "models/rrcm_joint/joint")):
        stage, folder = stages[f"certify-cascade@{method}"], f"certificates/{method}"
        assert inputs(stage) == {f"fingerprints/certify_cascade/{method}.txt", "data/shards", models, "params.yaml"}
        files = {f"{folder}/{name}{end}" for name in ("cascade", "multi_scale") for end in ENDINGS}
        others = {f"{folder}/thresholds.tsv", f"timings/certify_cascade/{method}.json"}
        assert stage.cmd == f"python stages/certify_cascade.py {method}" and outputs(stage) == files | others


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "without"),
    [
        ("cascade.thresholds=[0.0]", ["thresholds.tsv"]),
        ("cascade.multi_scale=false", [f"multi_scale{e}" for e in ENDINGS]),
    ],
)
def test_a_cascade_has_no_outputs_that_the_settings_leave_out(tmp_path, override, without):
    found = []
    for overrides in ([], [override]):
        stages = stages_of(tmp_path, "methods=[rrcm]", "cascade.methods=[rrcm]", *overrides)
        found.append(outputs(stages["certify-cascade@rrcm"]))
    assert found[0] - found[1] == {f"certificates/rrcm/{name}" for name in without} and found[1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "denoisers", "classifiers"),
    [
        (["methods=[rrcm,gaussian]"], [], []),
        (["methods=[gaussian,dds]"], ["denoiser@trained"], ["gaussian-0.001"]),
        (["methods=[diffsmooth,densepure]"], ["denoiser@trained"], ["gaussian-0.001", "gaussian-0.25"]),
        (["methods=[dds]", "denoised.model=resnet18"], ["denoiser@trained"], []),
        (["methods=[dds]", "denoiser.public=hf-hub:a/b"], ["denoiser@public"], ["gaussian-0.001"]),
    ],
)
def test_methods_that_denoise_bring_their_parts(tmp_path, overrides, denoisers, classifiers):
    found = {name: inputs(stage) for name, stage in stages_of(tmp_path, *overrides).items()}
    config = load_config(tmp_path / "params.yaml")
    assert [name for name in found if name.startswith("denoiser")] == denoisers
    runs = {f"finetune@{method}-{sigma}" for method in config.methods for sigma in config.sigmas}
    trained = {name for name in found if name.startswith("finetune")}
    assert trained - runs == {f"finetune@{name}" for name in classifiers} - runs
    for name in (name for name in trained if "models/denoiser" in found[name]):
        needed = {path for path in found[name] if path.startswith("models/gaussian")}
        assert len(needed) == (0 if config.denoised.model else 1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "column", "value", "again"),
    [
        ("gaussian", "objective", "stability", {*finetunings("gaussian"), "plot"}),
        ("gaussian", "initial_weights", "rrcm", {*finetunings("gaussian"), "plot"}),
        ("gaussian", "label", "Cohen et al.", {"plot"}),
        ("consistency", "objective", "gaussian", {*finetunings("consistency", "consistency_matched"), "plot"}),
    ],
)
def test_a_changed_row_of_the_table_retrains_that_method_alone(repository, method, column, value, again):
    """With what follows from the row: `consistency_matched` is the same training with more compute."""
    path = repository / "rrcm/methods.py"
    text = path.read_text()
    (row,) = re.findall(rf"^  {method}  .*$", text, flags=re.MULTILINE)
    name, *cells = re.split("  +", row.strip())
    cells[COLUMNS.index(column)] = value
    path.write_text(text.replace(row, f"  {'  '.join([name, *cells])}"))
    compose_in(repository)
    renew(repository)
    assert changed_stages(repository) == again


def compose_in(repository: Path, *overrides: str) -> None:
    """Compose params.yaml by the code of the copy, which may have another table of methods."""
    from benchmarks.edits import run

    run(repository, "compose", *SETTINGS, *overrides)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("pretrain.lr=7e-3", {"pretrain@rrcm", "plot"}),
        ("pretrain.steps=361", {"pretrain@rrcm", *finetunings("consistency_matched"), "plot"}),
        ("pretrain.lr={default: 7e-3, dmae: 1e-3}", {"pretrain@rrcm", "plot"}),
        ("pretrain.temperature={rrcm: 1.0, default: 0.2}", {"plot"}),
        ("pretrain.dmae.sigma=0.5", {"plot"}),
        ("pretrain.objectives=[rrcm,moco_v3]", {"pretrain@moco_v3", "plot"}),
        ("model.projection_dim=32", {"pretrain@rrcm", "plot"}),
        ("data.labels_per_class=3", {*finetunings(*RUN), "plot"}),
        ("model.stem=convolutions", {"pretrain@rrcm", *finetunings(*RUN), "plot"}),
        ("seed=1", {"shard-data", "pretrain@rrcm", "clean-accuracy", "latency", "plot", *finetunings(*RUN)}),
    ],
)
def test_changed_settings_rerun_the_stages_that_they_concern(repository, override, again):
    """Scratch methods do not depend on pre-training, but for the compute that a matched one gets."""
    compose_in(repository, override)
    renew(repository)
    found = changed_stages(repository)
    if override == "seed=1":
        again = again | {f"certify@{method}-0.5" for method in RUN}
    assert found == again


def test_no_stage_writes_where_results_are_published(tmp_path):
    """So an experiment, whatever its settings, leaves them as they are."""
    written = {Path(out).parts[0] for stage in stages_of(tmp_path, *SETTINGS).values() for out in outputs(stage)}
    assert "certificates" in written and "results" not in written


@pytest.mark.slow
def test_the_methods_that_start_from_an_encoder_depend_on_it(tmp_path):
    stages = stages_of(tmp_path, *SETTINGS)
    found = {name for name, stage in stages.items() if "models/pretrain/rrcm" in inputs(stage)}
    assert {name for name in found if name.startswith("finetune")} == finetunings("rrcm")


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The paths of all settings of a section of the schema."""
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        nested = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        yield from leaves(nested, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]


# The denoiser has a stage of its own, which watches all of its settings. Cascades have tests of their own.
WATCHED = {*SECTIONS} - {"methods", "sigmas", "denoiser", "cascade"}
SCHEMA = sorted(path for path in leaves(Config) if path.split(".")[0] in WATCHED)
LEVELS = [0.25, 0.5]
TRAINED = {name for name, row in METHODS.items() if row.objective is not None}


def training(**columns: object) -> set[str]:
    """The methods that are trained and have these values in their rows."""
    return {name for name in TRAINED if all(getattr(METHODS[name], key) == value for key, value in columns.items())}


PRETRAINED = {name for name in TRAINED if METHODS[name].pretrained_here}
DENOISING = {name for name, row in METHODS.items() if row.denoises}
SOFT = {name for name in TRAINED if METHODS[name].needs_soft_labels}
MATCHED, ENSEMBLES = training(matched=True), training(classifier="ensemble")
JOINT = {name for name in TRAINED if METHODS[name].joint is not None}
PASSING = {name for name in TRAINED if METHODS[name].can_pass}
STUDENTS = {name for name in TRAINED if METHODS[name].is_student}
SHARING = PRETRAINED | DENOISING | SOFT | MATCHED
OWN_NUM_NOISE = {name for name in TRAINED if METHODS[name].objective in ("macer", "cat_rs", "smoothadv", "smoothmix")}
FINETUNING_OF = {  # the methods that are trained again; `methods_trained_again` has the rules for other settings
    "finetune.checkpoint_every": set(),
    "finetune.initial_weights": PRETRAINED,
    "finetune.ensemble_members": ENSEMBLES,
    "finetune.joint_interval": JOINT,
    "finetune.pass_bias": PASSING,
    "finetune.pass_votes": PASSING,
    "finetune.pass_share": PASSING,
    "finetune.time_condition": PRETRAINED,
    "finetune.pretrain_cost_shared_by": SHARING,
    "finetune.num_noise": (TRAINED - OWN_NUM_NOISE) | MATCHED | SOFT,
    "finetune.timm.model": training(initial_weights="timm"),
    "finetune.timm.weights": training(initial_weights="timm"),
    "pretrain.t_min": PRETRAINED,
    "pretrain.steps": MATCHED,
    "pretrain.batch_size": MATCHED,
    "model.pixel_mean": set(),
    "model.pixel_std": set(),
    "model.projection_dim": set(),
    "model.projector_hidden_dim": set(),
    "denoised.model": DENOISING,
}


def methods_trained_again(path: str) -> set[str]:
    """The methods that a setting concerns, by its place in the schema. A student needs whatever its teacher needs."""
    again = own_setting_of(path)
    return again | STUDENTS if "rrcm_joint" in again else again


def own_setting_of(path: str) -> set[str]:
    """The methods that a setting concerns themselves."""
    section, *rest = path.split(".")
    if path in FINETUNING_OF:
        return FINETUNING_OF[path]
    if section == "finetune" and rest[0] == "objectives":
        reference = MATCHED if rest[1] == "consistency" else set()  # they get the compute of its training
        voter = SOFT if rest[1] == "gaussian" else set()
        return training(objective=rest[1]) | reference | voter
    if section == "denoised" and len(rest) == 2:
        return {name for name in DENOISING if METHODS[name].classifier == rest[0]}
    return {
        "finetune": TRAINED,
        "model": TRAINED - DENOISING,
        "soft_labels": SOFT,
        "student": STUDENTS,
    }.get(section, set())


def changed_value(value: object) -> object:
    """Another value of a setting, of the same form."""
    if isinstance(value, Mapping):
        return {key: changed_value(item) for key, item in value.items()}
    if isinstance(value, bool):
        return not value
    if value is None:
        return "other"
    return value + ([1] if isinstance(value, list) else "x" if isinstance(value, str) else 1)


@pytest.fixture(scope="module")
def every_method(tmp_path_factory) -> dict:
    """Settings in which every method of the table is trained, at two noise levels."""
    path = compose(tmp_path_factory.mktemp("all") / "params.yaml")
    return yaml.safe_load(path.read_text()) | {"methods": [*METHODS], "sigmas": LEVELS}


@pytest.fixture(scope="module")
def hashes(every_method) -> dict:
    """What DVC compares with these settings."""
    return derived_settings({name: every_method[name] for name in SECTIONS})["settings"]


UNNAMEABLE = ("soft_labels.", "denoised.max", "student.teacher")  # `changed_value` would name no method


@pytest.mark.parametrize("path", [path for path in SCHEMA if not path.startswith(UNNAMEABLE)])
def test_a_setting_reruns_the_trainings_and_certifications_that_it_concerns(every_method, hashes, path):
    """Over all methods and all settings of the schema."""
    values = json.loads(json.dumps({name: every_method[name] for name in SECTIONS}))
    *above, name = path.split(".")
    section = values
    for key in above:
        section = section[key]
    if path == "denoised.diffsmooth.local_sigma":
        pytest.skip("names the classifier of denoised images, a training of its own")
    section[name] = changed_value(section[name])
    after = derived_settings(values)["settings"]
    again = {name for name, own in hashes["finetune"].items() if after["finetune"][name].items() - own.items()}
    assert again == methods_trained_again(path)
    certified = {method for method in METHODS if hashes["certify"][method] != after["certify"][method]}
    expected = set(METHODS) if path.startswith("certify.") else set()
    assert certified == expected


CASCADED = {"thresholds": [0.5], "choose_by": {"0.5": 1.0}, "choose_n": 10, "multi_scale": False, "sigmas": [0.25, 0.5]}


@pytest.mark.parametrize("setting", CASCADED)
def test_a_setting_of_cascades_reruns_them_alone(every_method, setting):
    values = json.loads(json.dumps({name: every_method[name] for name in SECTIONS}))
    values["sigmas"], values["cascade"]["methods"] = [0.25, 0.5, 1.0], ["rrcm", "consistency_joint"]
    before = derived_settings(values)["settings"]
    values["cascade"][setting] = CASCADED[setting]
    after = derived_settings(values)["settings"]
    again = {name for name in before if before[name] != after[name]}
    assert again == {"cascade"} and before["cascade"].items().isdisjoint(after["cascade"].items())


def test_given_thresholds_do_not_depend_on_how_they_would_be_chosen(every_method):
    values = json.loads(json.dumps({name: every_method[name] for name in SECTIONS}))
    values["cascade"] |= {"methods": ["rrcm"], "thresholds": [0.5]}
    before = derived_settings(values)["settings"]
    values["cascade"] |= {"choose_n": 7, "choose_by": {"0.5": 1.0}}
    assert derived_settings(values)["settings"] == before
    values["certify"]["n"] += 1
    assert derived_settings(values)["settings"]["cascade"] != before["cascade"]


def test_the_fingerprint_of_a_cascade_covers_its_code(every_method):
    lines = fingerprint_text(find_items(load_config_of(every_method))["certify_cascade/rrcm"]).splitlines()
    modules = {line.split()[0].removeprefix("rrcm.certification.") for line in lines}
    assert {f"cascade_{name}" for name in ("radii", "rules", "selection", "states", "thresholds", "votes")} <= modules
    others = {"cascade", "certify_cascade", "split_votes", "validation_votes", "stages/certify_cascade.py", "noise"}
    assert others <= modules


@pytest.fixture(scope="module")
def with_cascade(tmp_path_factory) -> Path:
    """As `committed`, with two methods at two sigmas, one of which is cascaded."""
    folder = tmp_path_factory.mktemp("cascade")
    make_committed(REPOSITORY, folder, CASCADE)
    return folder


CASCADE = ["sigmas=[0.25,0.5]", "methods=[rrcm,gaussian]", "cascade.methods=[rrcm]"]
CERTIFY_RRCM = {"certify@rrcm-0.25", "certify@rrcm-0.5"}


@pytest.mark.thorough
def test_an_edited_expert_reruns_the_cascade_of_its_method_alone(with_cascade, tmp_path):
    folder = Path(shutil.copytree(with_cascade, tmp_path / "copy"))
    (folder / "models/gaussian/sigma_0.25").write_text("other weights")
    assert changed_stages(folder) == {"certify@gaussian-0.25", "clean-accuracy", "latency", "plot"}
    (folder / "models/rrcm/sigma_0.25").write_text("other weights")
    again = {"certify@gaussian-0.25", "certify@rrcm-0.25", "certify-cascade@rrcm", "clean-accuracy", "latency", "plot"}
    assert changed_stages(folder) == again


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("edit", "again"),
    [
        (Edit("choose_n", settings=["cascade.choose_n=7"]), {"certify-cascade@rrcm", "plot"}),
        (
            Edit("the candidates", replace("rrcm/certification/cascade_thresholds.py", "0.1 . k", "0.2 * k")),
            {"certify-cascade@rrcm"},
        ),
        (Edit("n", settings=["certify.n=1500"]), {"certify-cascade@rrcm", "plot", "certify"}),
        (
            Edit("another method", settings=["cascade.methods=[gaussian]"]),
            {"certify-cascade@gaussian", "latency", "plot"},
        ),
    ],
    ids=lambda each: each.name if isinstance(each, Edit) else "",
)
def test_an_edit_reruns_the_cascades_that_it_changes(with_cascade, tmp_path, edit, again):
    found = stages_after(edit, with_cascade, tmp_path / "copy", CASCADE)
    assert {name.partition("@")[0] if name.startswith("certify@") else name for name in found} == again


@pytest.mark.slow
def test_a_setting_of_pretraining_reruns_the_objectives_that_it_concerns(every_method):
    values = json.loads(json.dumps({name: every_method[name] for name in SECTIONS}))
    values["pretrain"]["objectives"] = ["rrcm", "dmae", "rrcm_dmae"]
    before = derived_settings(values)["settings"]["pretrain"]
    for path in (path for path in SCHEMA if path.startswith(("pretrain.", "model."))):
        section, name, *rest = path.split(".")
        changed = json.loads(json.dumps(values))
        place = changed[section] if not rest else changed[section][name]
        key = rest[0] if rest else name
        if path == "pretrain.objectives":
            continue
        place[key] = changed_value(place[key])
        after = derived_settings(changed)["settings"]["pretrain"]
        again = {objective for objective in before if before[objective] != after[objective]}
        expected = {name} & before.keys() if rest and name != "views" else set(before)
        if name == "dmae":
            expected = {"dmae", "rrcm_dmae"}
        if path in ("pretrain.checkpoint_every", "model.pixel_mean", "model.pixel_std", "model.architecture"):
            expected = set()
        assert again == expected, path


def test_the_hash_of_a_training_covers_the_settings_it_is_trained_with(every_method):
    """What is hashed is what `Finetune.settings` gives the training."""
    from rrcm.derived import chosen_settings

    config = load_config_of(every_method)
    finetune = config.finetune.model_dump(mode="json")
    for method in TRAINED:
        for sigma in LEVELS:
            expected = config.finetune.settings(method, sigma).of_objective(METHODS[method].objective)
            found = chosen_settings(method, sigma, finetune)
            assert {name: found[name] for name in expected} == expected


def load_config_of(values: dict) -> Config:
    """The settings with every method, as far as they can be validated together."""
    values = json.loads(json.dumps(values))
    values["pretrain"]["objectives"] = sorted(
        {row.initial_weights for row in METHODS.values() if row.pretrained_here and not row.denoises}
    )
    values["finetune"]["timm"]["model"] = "vit_tiny_patch16_224"
    values["derived"] = derived_settings({name: values[name] for name in SECTIONS})
    return parse_config(values)


# What a stage may read without watching it: it decides no result, or finds what is watched as a file.
FREE = {"device", "threads", "seed", "profile", "launcher", "sigmas", "methods", "derived", "data.workers", "latency"}
FREE |= {"data.image_size", "data.channels", "finetune.checkpoint_every", "pretrain.checkpoint_every", "certify"}
FREE_OF_MATCHED = {"pretrain.lr", "pretrain.temperature"}  # chosen with the steps of rRCM, whose number is all it reads
SECTION_OF = {"Config": "", "FinetuneSettings": "finetune."}


WATCHED = ["pretrain/rrcm", "finetune/rrcm", "finetune/rrcm_joint", "finetune/consistency_matched", "certify/rrcm"]


@pytest.mark.thorough
@pytest.mark.parametrize("item", WATCHED)
def test_all_that_runs_and_all_that_is_read_is_watched(tmp_path, tiny_shards, monkeypatch, item):
    """A real run of each stage: its functions are in watched modules, and the settings it reads in its hash."""
    from rrcm.certification.certify import certify_split
    from rrcm.config import Section
    from rrcm.training.finetune import finetune
    from rrcm.training.plan import Files, plan_training
    from rrcm.training.pretrain import pretrain

    monkeypatch.setenv("RRCM_RUNS", str(tmp_path / "runs"))
    folder = make_project(tmp_path, tiny_shards, "sigmas=[0.5]", "methods=[rrcm,rrcm_joint,consistency_matched]")
    config, shards, models = load_config(folder / "params.yaml"), folder / "data/shards", folder / "models"
    kind, name = item.split("/")
    pretrained = models / "pretrain"
    outputs = Files(shards, pretrained, models / name, folder / "finetune.json")
    steps = {
        "pretrain": lambda: pretrain(config, "rrcm", shards, pretrained / "rrcm", folder / "pretrain.json"),
        "finetune": lambda: finetune(plan_training(config, name, training_noise(name, 0.5), outputs)),
        "certify": lambda: certify_split(config, 0.5, shards, models / name, folder / "a.tsv", folder / "certify.json"),
    }
    for step in steps if name.startswith("rrcm") else ["finetune"]:
        if step == kind:
            break
        steps[step]()
    files, read = set(), set()

    def record(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    plain = Section.__getattribute__

    def getattribute(self: Section, attribute: str) -> object:
        if attribute in type(self).model_fields:
            read.add((type(self).__name__, attribute))
        return plain(self, attribute)

    with monkeypatch.context() as patched:
        patched.setattr(Section, "__getattribute__", getattribute)
        sys.setprofile(record)
        try:
            steps[kind]()
        finally:
            sys.setprofile(None)
    package = str(REPOSITORY / "rrcm") + "/"
    ran = {file.removeprefix(package)[:-3].replace("/", ".") for file in files if file.startswith(package)}
    ran = {f"rrcm.{module}".removesuffix(".__init__") for module in ran} - TABLES - NO_RESULTS
    lines = fingerprint_text(find_items(config)[item]).splitlines()
    assert len(ran) > 5 and ran - {"rrcm"} <= {line.split()[0] for line in lines}

    values = {name: json.loads(config.model_dump_json())[name] for name in SECTIONS}
    before = derived_settings(values)["settings"][kind][name]
    for owner, attribute in sorted(read):
        path = SECTION_OF.get(owner, f"{owner.lower()}.") + attribute
        free = FREE | (FREE_OF_MATCHED if name == "consistency_matched" else set())
        if path in free or path.split(".")[0] in FREE or path not in SCHEMA:
            continue
        changed = json.loads(json.dumps(values))
        section, key = path.split(".")
        changed[section][key] = changed_value(changed[section][key])
        assert derived_settings(changed)["settings"][kind][name] != before, path
