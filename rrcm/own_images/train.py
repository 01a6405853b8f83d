"""`rrcm train`: look at a folder of images, choose settings, train the joint classifier, certify it, and write it.

It calls the functions of the pipeline's stages in a hidden folder beside the output. A stopped run continues from it.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rrcm.certification.certify_cascade import certify_cascade_split
from rrcm.config import Config, load_config, parse_config
from rrcm.data.sharding import write_shards
from rrcm.methods import CASCADE, JOINT
from rrcm.own_images.facts import Folder, Machine, look_at_folder, look_at_machine
from rrcm.own_images.result import HeldOut, Work, write_result
from rrcm.own_images.rules import TRUNKS, Network, Speed, Task, Trunk, choose, suits
from rrcm.own_images.settings import (
    complete,
    read_params,
    with_lengths,
    with_network,
    with_root,
    write_params,
)
from rrcm.own_images.show import print_note, print_result, print_row, print_settings, print_time
from rrcm.own_images.speed import estimate, measure_speed, reading_seconds, timm_trunks
from rrcm.training.checks import check_before_training
from rrcm.training.finetune import finetune
from rrcm.training.plan import Files, plan_training
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import check_output, claimed, expand_user, read_json, read_text, write_json

HOURS = 1.0
PREPARATION = 2.0  # writing the shards takes about this many times as long as looking at the images
REDUCED = 4  # a note is printed if the images lose so much of their side
PHOTOGRAPH = 64  # pixels of the shorter side; for larger images a note suggests ImageNet weights
ASKED, PARAMS = "asked.json", "params.yaml"  # in the hidden folder


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    folder: Path  # with the images
    output: Path  # model folder
    hours: float = HOURS  # at most
    params: Path | None = None  # settings to run; the command writes them if the file does not exist
    start: str | None = None  # timm model: a name, a snapshot folder, or hf-hub:owner/name
    weights: Path | None = None  # file with its weights, instead of a download

    @property
    def work(self) -> Path:
        """The hidden folder in which the run works."""
        return self.output.absolute().with_name(f".{self.output.name}.train")

    @property
    def takes_params(self) -> bool:
        """Whether the user gives the settings."""
        return self.params is not None and self.params.exists()


def train(request: Request) -> None:
    """Run the whole command, or continue where an earlier run was stopped.

    Prints the facts, the choice and the estimated time. Raises `RRCMError` before any work if the folder or the options
    do not fit.
    """
    check_request(request)
    with claimed(request.work):
        start = time.monotonic()
        folder, config = prepare(request)
        if config is None:
            print(f"written: {request.params}. The same command trains with these settings")
            return
        try:
            held_out = run(request, folder, config)
        except KeyboardInterrupt as interruption:
            raise KeyboardInterrupt(str(interruption) or "; the same command continues from here") from None
        shutil.rmtree(request.work)
    print_result(held_out, config, time.monotonic() - start)
    print(f"written: {request.output}, with README.md and index.html")


def check_request(request: Request) -> None:
    """Raise `RRCMError` for impossible options."""
    output, folder = request.output, request.folder.resolve()
    if not 0 < request.hours < math.inf:
        raise RRCMError(f"--hours {request.hours:g}: must be a positive number, such as 0.5")
    if output.exists() or output.is_symlink():
        raise RRCMError(f"--output {output}: exists; choose another name, or remove it")
    if folder in output.resolve().parents:
        raise RRCMError(f"--output {output}: is inside the folder of images; choose another place")
    check_output(output)
    if request.weights is not None and request.start is None:
        raise RRCMError(f"--weights {request.weights}: are of a model of timm; name it with --start")
    if request.weights is not None and not request.weights.is_file():
        raise RRCMError(f"--weights {request.weights}: no such file")
    if request.params is not None and not request.takes_params:
        check_output(request.params)
    if request.takes_params:
        read_params(request.params, folder)  # before the images are read


def prepare(request: Request) -> tuple[Folder, Config | None]:
    """Look at the folder, choose settings and print them. The settings are None if they were only to be written."""
    root, machine, start = request.folder.resolve(), look_at_machine(), time.monotonic()
    folder = look_at_folder(root, parse_config(complete(with_root(root))).data)
    looking = time.monotonic() - start
    print_row("folder", folder.description)
    print_row("machine", machine.description)
    for note in folder.notes + machine.notes:
        print_note(note)
    asked = describe_request(request, folder)
    if (request.work / ASKED).exists():
        if read_json(request.work / ASKED) != asked:
            raise RRCMError(
                f"{request.work}: holds an unfinished training with other options or images; give the same again, or "
                "remove it"
            )
        print_row("settings", "of the run that was stopped, which continues")
        config = load_config(request.work / PARAMS)
        print_settings(config)
        return folder, config
    config, speed = choose_settings(request, folder, machine)
    print_settings(config)
    print_time({"reading": PREPARATION * looking} | estimate(config, folder, speed))
    if request.params is not None and not request.takes_params:
        write_params(request.params, config)
        return folder, None
    write_params(request.work / PARAMS, config)
    write_json(request.work / ASKED, asked)  # last: it says that the settings are there
    return folder, config


def describe_request(request: Request, folder: Folder) -> dict[str, object]:
    """What an unfinished run must have in common with the command that continues it, as JSON values."""
    given = read_text(request.params) if request.takes_params else None
    asked = {"folder": str(request.folder.resolve()), "hours": request.hours, "params": given}
    start = {"start": request.start, "weights": request.weights and str(request.weights.resolve())}
    return asked | start | {"images": {name: str(value) for name, value in asdict(folder).items()}}


def choose_settings(request: Request, folder: Folder, machine: Machine) -> tuple[Config, Speed]:
    """The settings, which the user gives or the rules choose, and the speed on this machine."""
    root, reading = request.folder.resolve(), reading_seconds(request.folder, folder)

    def measure(config: Config) -> Speed:
        speed = measure_speed(config, folder)
        return Speed(speed.image, speed.vote, reading)

    if request.takes_params:
        print_row("settings", f"of {request.params}, whatever --hours and --start are")
        config = read_params(request.params, root)
        return config, measure(config)
    start, trunks = choose_start(request, folder)
    base, speeds = with_root(root), {}

    def measure_trunk(trunk: Trunk | Network) -> Speed:
        print_row("candidate", f"{trunk.description}: a few steps are timed")
        speeds[trunk] = measure(parse_config(complete(with_network(base, folder, trunk, start))))
        return speeds[trunk]

    choice = choose(Task(folder, machine, request.hours, start is not None), trunks, measure_trunk)
    if REDUCED * choice.trunk.image_size <= folder.side:
        side = choice.trunk.image_size
        print_note(f"there is no time for images of more than {side} x {side} pixels; more hours or a GPU would help")
    values = with_lengths(with_network(base, folder, choice.trunk, start), choice)
    return parse_config(complete(values)), speeds[choice.trunk]


def choose_start(request: Request, folder: Folder) -> tuple[tuple[str, str | None] | None, Sequence[Trunk | Network]]:
    """The timm model to start from, with the file of its weights, and the candidates for the network.

    The model is None if training starts from random weights: if none is given, or if the images are too small for it.
    """
    if (start := find_start(request)) is None:
        if folder.side >= PHOTOGRAPH:
            print_note("photographs may need fewer images and hours with ImageNet weights (--start)")
        return None, TRUNKS
    trunks = timm_trunks(*start, folder.channels)
    if suits(folder, side := trunks[0].image_size):
        return start, trunks
    made = f"{request.start} was made for {side} x {side} pixels, and the images have {folder.side}"
    print_note(f"{made}: training starts from random weights")
    return None, TRUNKS


def find_start(request: Request) -> tuple[str, str | None] | None:
    """The timm model that the user names and the file of its weights, with absolute paths."""
    if request.start is None:
        return None
    path = expand_user(request.start)
    name = str(path.resolve()) if path.exists() else request.start
    return name, request.weights and str(request.weights.resolve())


def run(request: Request, folder: Folder, config: Config) -> HeldOut:
    """Write the shards, train, certify and write the output. Parts that an earlier run has finished are kept."""
    method, output = config.methods[0], request.output.absolute()
    work = Work(*map(Path, ("shards", f"models/{method}/{JOINT}", "certificates", "timing.json")))
    with contextlib.chdir(request.work):  # checkpoints and live metrics go to folders below the working directory
        if not work.shards.exists():
            write_shards(config.data, config.seed, work.shards)
        check_before_training(config, work.shards)
        if not work.model.exists() or not work.timing.exists():
            finetune(plan_training(config, method, JOINT, Files(work.shards, Path("models"), work.model, work.timing)))
        if not (work.certificates / f"{CASCADE}.tsv").exists():
            certify_cascade_split(config, work.shards, [work.model], work.certificates, Path("certify.json"))
        return write_result(work, config, folder, output)
