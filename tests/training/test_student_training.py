"""Students: what trains and what does not, their model folders, and settings that do not fit."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import compose, files_of, kill_when, make_project, stage

from rrcm import load_base_classifier
from rrcm.certification.export import export_model
from rrcm.config import load_config, parse_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.derived import SECTIONS, derived_settings
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.encoders import build_encoder
from rrcm.models.folders import read_model_config
from rrcm.models.joint import JointSigmas
from rrcm.models.kinds import load_model_folder, load_scales
from rrcm.training.budget import build_joint_objective
from rrcm.training.finetune import build_trainer
from rrcm.training.plan import Files, plan_training
from rrcm.training.start import load_start
from rrcm.training.teacher import with_teacher
from rrcm.utils.distributed import DistEnv
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import sha256_folder
from rrcm.utils.pixels import to_unit_range

CPU, SIGMAS, STUDENT = torch.device("cpu"), [0.25, 0.5], "distill_joint"
RUN = ["methods=[gaussian_joint,distill_joint,distill]", "student.teacher=gaussian_joint"]
RUN += ["student.embed_dim=16", "student.depth=1", "finetune.epochs=2", "finetune.warmup_epochs=0"]


@pytest.fixture
def planned(tmp_path, tiny_shards):
    """The plan of a joint student whose teacher has random weights."""
    folder = make_project(tmp_path, tiny_shards, *RUN)
    config = load_config(folder / "params.yaml")
    torch.manual_seed(7)
    network = NoiseConditionedClassifier(build_encoder(config.model, config.data), 10, 1.0)
    torch.nn.init.normal_(network.head.weight)
    (folder / "models/gaussian_joint/joint").mkdir(parents=True)
    own = {"method": "gaussian_joint", "sigma": JointSigmas(tuple(SIGMAS)), "dtype": "bf16"}
    save_model(folder / "models/gaussian_joint/joint", network, **own)
    output = folder / "models/distill_joint/joint"
    return plan_training(config, "distill_joint", "joint", Files(folder / "data/shards", folder, output, folder / "t"))


@pytest.mark.slow
def test_a_student_has_its_own_sizes_and_a_frozen_teacher(planned):
    start = load_start(planned, 10, CPU)
    assert start.classifier.encoder.embed_dim == 16 and len(start.classifier.encoder.blocks) == 1
    assert planned.teacher.parts[-2:] == ("gaussian_joint", "joint")
    assert start.inputs == {"teacher": sha256_folder(planned.teacher)}
    assert planned.model.embed_dim == 16 and planned.identity["model"]["embed_dim"] == 16
    teacher = start.teacher.classifier
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    pixels = torch.rand(3, 1, 8, 8)
    alone = load_model_folder(planned.teacher, sigma=0.5).classifier(pixels)
    assert torch.equal(start.teacher(pixels, t=torch.full((3,), 1.0)), alone.detach())
    assert not torch.equal(start.teacher(pixels, t=torch.full((3,), 0.5)), alone)
    shutil.rmtree(planned.teacher)
    with pytest.raises(RRCMError, match=r"models/gaussian_joint/joint.*: no such f"):
        load_start(planned, 10, CPU)


@pytest.mark.slow
def test_its_teacher_is_in_no_optimizer_and_no_checkpoint(planned):
    """So the trainer saves and steps the student alone, and its identity has the teacher's hash."""
    start = load_start(planned, 10, CPU)
    objective = with_teacher(build_joint_objective(planned.common, planned.method, planned.joint), start.teacher)
    own = {id(p) for p in start.classifier.parameters()}
    best, images = SimpleNamespace(classifier=start.classifier), ShardedDataset(planned.files.shards, "train")
    trainer = build_trainer(planned, objective, start, best, images, DistEnv(0, 1, CPU))
    assert {id(p) for p in trainer.parameters} == own and set(trainer.modules) == {"classifier", "best"}
    (planned.teacher / "history.csv").write_text("another training\n")
    other = build_trainer(planned, objective, load_start(planned, 10, CPU), best, images, DistEnv(0, 1, CPU))
    assert other.run_state.folder != trainer.run_state.folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return yaml.safe_load(compose(tmp_path_factory.mktemp("students") / "params.yaml", *RUN).read_text())


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        (
            {"student": {"teacher": "gausian_joint"}},
            "student.teacher = 'gausian_joint': no such method; did you mean gaus",
        ),
        (
            {"student": {"teacher": "rrcm_joint"}},
            "student.teacher rrcm_joint: must be among methods ['gaussian_joint', ",
        ),
        ({"student": {"teacher": "dds"}}, "student.teacher dds: is several networks; name a method with one network, "),
        (
            {"student": {"teacher": "distill_joint"}},
            "student.teacher distill_joint: is a student; name a method with one",
        ),
        (
            {"methods": ["gaussian", "distill_joint"], "student": {"teacher": "gaussian"}},
            "student.teacher gaussian: must be joint, as distill_joint is; name one, such as gaussian_joint",
        ),
        ({"student": {"embed_dim": 15}}, "student.embed_dim 15 must be even and a multiple of num_heads 2"),
        ({"student": {"patch_size": 3}}, "data.image_size 8 must be a multiple of student.patch_size 3"),
        (
            {"student": {"architecture": "cnn", "embed_dim": 20}},
            "student.embed_dim 20 must be a multiple of 8 for a cnn",
        ),
        (
            {"methods": ["distill_joint_pass"]},
            "methods.0 = 'distill_joint_pass': distill has no form that can pass, as it",
        ),
        (
            {"methods": ["distill_matched"]},
            "methods.0 = 'distill_matched': distill has no matched form, as its teacher has",
        ),
        (
            {"finetune": {"num_chunks": 2}, "student": {"architecture": "lenet"}},
            "finetune.num_chunks must be 1 with stu",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings, change_of, said):
    changed = {key: settings[key] | value if isinstance(value, dict) else value for key, value in change_of.items()}
    values = settings | changed
    values["derived"] = {} if "methods.0" in said else derived_settings({name: values[name] for name in SECTIONS})
    with pytest.raises(RRCMError) as caught:
        parse_config(values)
    assert str(caught.value).startswith(f"params.yaml: {said}") and "\n" not in str(caught.value)


def succeed(answer) -> None:
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny_shards) -> Path:
    """A project with a joint teacher and its students, joint and for one sigma; do not change it."""
    folder = make_project(tmp_path_factory.mktemp("taught"), tiny_shards, *RUN)
    for run in (["gaussian_joint", "joint"], ["distill_joint", "joint"], ["distill", "0.5"]):
        succeed(stage(folder, "finetune", *run))
    return folder


@pytest.mark.thorough
def test_the_model_folder_of_a_student_has_its_network_and_names_its_teacher(taught):
    teacher = read_model_config(taught / "models/gaussian_joint/joint")
    for name, share, sigma in (("distill_joint/joint", 1, None), ("distill/sigma_0.5", 1 / 2, 0.5)):
        config = read_model_config(taught / "models" / name)
        assert config["architecture"]["embed_dim"] == 16 and config["architecture"]["depth"] == 1
        assert config["teacher"] == {"method": "gaussian_joint", "sha256": teacher["sha256"]}
        assert config["compute"]["teacher"] == share * teacher["compute"]["finetune"]
        assert config["parameters"] < teacher["parameters"] / 4 and config.get("sigma") == sigma
    # two passes through the teacher for each image, and six through a much smaller network
    compute = read_model_config(taught / "models/distill_joint/joint")["compute"]["finetune"]
    assert 2 / 6 < compute / teacher["compute"]["finetune"] < 3 / 6


@pytest.mark.thorough
def test_a_student_learns_and_is_certified_cascaded_and_exported_like_any_other(taught, tmp_path):
    images = read_split(ShardedDataset(taught / "data/shards", "test"), 8)
    noisy = to_unit_range(images[0]) + 0.25 * torch.randn(len(images[0]), 1, 8, 8)
    teacher, student = (
        load_base_classifier(taught / f"models/{m}/joint", sigma=0.25) for m in ("gaussian_joint", STUDENT)
    )
    answers = student.classifier(noisy).argmax(1)
    assert (answers == images[1]).float().mean() > 0.3
    assert (answers == teacher.classifier(noisy).argmax(1)).float().mean() > 0.3
    succeed(stage(taught, "certify", STUDENT, "0.5", "--certificates", str(tmp_path)))
    scales, can_pass = load_scales([taught / f"models/{STUDENT}/joint"], SIGMAS)
    assert len(scales) == 2 and not can_pass
    assert export_model(student, 0.25, "torchscript", tmp_path / "program").equal > 0.999


@pytest.mark.thorough
def test_a_killed_student_ends_with_the_same_bytes(taught, tmp_path):
    folder = Path(shutil.copytree(taught, tmp_path / "again", symlinks=True))
    model = folder / f"models/{STUDENT}/joint"
    expected = files_of(model)
    shutil.rmtree(model)
    kill_when(folder, f"runs/finetune-{STUDENT}-joint-*/[0-9]*.safetensors", "finetune", STUDENT, "joint")
    answer = stage(folder, "finetune", STUDENT, "joint")
    succeed(answer)
    assert "resuming" in answer.stderr and files_of(model) == expected
