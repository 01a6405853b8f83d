"""The console command `rrcm`. Modules that take long to import are imported when a command runs."""

import json
import os
import sys
import time
from collections.abc import Collection, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrcm.utils.app import exit_on_error, make_app, other_checkout, resume_gc, run_app
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import check_output

if TYPE_CHECKING:
    from rrcm.certification.cascade_rules import CascadeRule
    from rrcm.certification.certify_images import FolderCertificates
    from rrcm.certification.stopping import StoppingRule
    from rrcm.data.images import Listing
    from rrcm.models.load import LoadedClassifier

STARTED = time.monotonic()
app = make_app(completion=True)


def _seconds_to_start() -> float:
    """The seconds since this module was imported, which is the first thing that a command does."""
    return time.monotonic() - STARTED


def complete_path(incomplete: str) -> list[str]:
    """Paths that begin with `incomplete`, folders with a slash. A single folder is followed by its contents, so that
    the shell adds no blank after it.
    """
    folder, slash, start = incomplete.rpartition("/")
    try:
        entries = sorted(Path(f"{folder}{slash}").expanduser().iterdir())
    except OSError:
        return []
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries]
    hidden = start.startswith(".")
    paths = [f"{folder}{slash}{name}" for name in names if name.startswith(start) and name.startswith(".") == hidden]
    return paths + complete_path(paths[0]) if len(paths) == 1 and paths[0].endswith("/") else paths


def complete_method(incomplete: str) -> list[str]:
    """Methods of this package whose names begin with `incomplete`."""
    from rrcm.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def complete_named_file(incomplete: str) -> list[str]:
    """NAME=FILE: methods as names, then paths. Bash asks for the part after the equals sign alone."""
    name, sign, path = incomplete.partition("=")
    if sign:
        return [f"{name}={each}" if name else each for each in complete_path(path)]
    return [f"{method}=" for method in complete_method(incomplete)] + complete_path(incomplete)


def _choices(*names: str):
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


# The options of the commands. Those without a default here have one in the command.
Images = Annotated[
    Path,
    typer.Argument(help="Folder with images, subfolders included.", show_default=False, autocompletion=complete_path),
]
Models = Annotated[
    list[str],
    typer.Option(
        metavar="FOLDER|FILE|NAME|CODE",
        help="A model folder, a fine-tuned checkpoint of the rRCM authors, a timm model (its name, hf-hub:owner/name, "
        "or a snapshot folder), a program of torch.export (.pt2), or a function of your own code that returns a torch "
        "module: file.py:function or module:function. For a cascade: a joint model, or one model per sigma in order.",
        autocompletion=complete_path,
    ),
]
Sigmas = Annotated[
    list[float] | None,
    typer.Option(
        help="Noise in pixel units (pixels in [0, 1]). Repeat it for a cascade. Default: the noise of the training."
    ),
]
Cascade = Annotated[
    bool, typer.Option("--cascade", help="Certify the label-aware cascade of several sigmas as one classifier.")
]
Threshold = Annotated[
    list[float] | None,
    typer.Option(
        help="Cascades only: the least sigma Phi^-1(p) with which a sigma accepts a class. Repeat it for each sigma "
        "but the smallest. Default: 0."
    ),
]
Thresholds = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.json",
        help="Cascades only: take sigmas and thresholds from this record of a cascade.",
        autocompletion=complete_path,
    ),
]
Stopping = Annotated[
    str,
    typer.Option(
        metavar="sequential|fixed",
        help="Stop as soon as the radius is decided, or always draw all samples.",
        autocompletion=_choices("sequential", "fixed"),
    ),
]
Bound = Annotated[
    str,
    typer.Option(
        metavar="binary|margin",
        help="How to bound the runner-up: by one minus the bound on the top class, as in all papers, or by its own "
        "votes. The margin bound also certifies classes with less than half of the votes.",
        autocompletion=_choices("binary", "margin"),
    ),
]
MostSamples = Annotated[int, typer.Option(help="Maximum number of noisy samples per image.")]
SelectionSamples = Annotated[int, typer.Option(help="Samples that choose the class.")]
Alpha = Annotated[float, typer.Option(help="Maximum probability that a certificate is wrong.")]
RadiusStep = Annotated[
    float | None,
    typer.Option(
        help="Sequential stopping only: radii are multiples of this step, in pixel units. A larger step needs fewer "
        "samples. Default: a fifth of the smallest sigma."
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="auto|fp32|bf16", help="Precision of the network.", autocompletion=_choices("auto", "fp32", "bf16")
    ),
]
Runtime = Annotated[
    str,
    typer.Option(
        metavar="torch|openvino",
        help=r"Library that runs the network. openvino is for CPUs and needs rrcm\[openvino]; if it cannot run the "
        "network, torch does.",
        autocompletion=_choices("torch", "openvino"),
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Noisy samples per forward pass. Default: chosen automatically.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, or a GPU such as cuda:1.", autocompletion=_choices("auto", "cpu", "cuda"))
]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Limit = Annotated[int | None, typer.Option(help="Take only this many images, evenly spaced over the folder.")]
SkipUnreadable = Annotated[bool, typer.Option("--skip-unreadable", help="Go on without images that cannot be read.")]
Classes = Annotated[
    Path | None,
    typer.Option(help="Text file with one class name per line, in the model's order.", autocompletion=complete_path),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="File with a state dict for a timm model or for a model of your own code.", autocompletion=complete_path
    ),
]
FinalNorm = Annotated[
    bool, typer.Option(help="Authors' checkpoints only: their CIFAR-10 models skip the last LayerNorm.")
]
OutsideRange = Annotated[
    bool, typer.Option("--outside-range", help="Joint models only: allow a sigma that their training did not cover.")
]
EstimateOnly = Annotated[
    bool, typer.Option("--estimate", help="Only estimate the time, in a few seconds. Nothing is written.")
]
Output = Annotated[
    Path,
    typer.Option(
        help="Certificates (TSV): idx, label, predict, radius, correct, time (always 0).", autocompletion=complete_path
    ),
]
Gallery = Annotated[
    Path,
    typer.Option(help="Figure of the images with classes and radii, .png, .svg or .pdf.", autocompletion=complete_path),
]
Page = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.html",
        help="Also write the results as one web page, which needs no network.",
        show_default=False,
        autocompletion=complete_path,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rrcm {version('rrcm')}")
        raise typer.Exit


@app.callback()
def rrcm(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Certified image classifiers by randomized smoothing."""


@app.command()
@exit_on_error
def certify(
    context: typer.Context,
    folder: Images,
    model: Models,
    sigma: Sigmas = None,
    cascade: Cascade = False,
    threshold: Threshold = None,
    thresholds: Thresholds = None,
    stopping: Stopping = "sequential",
    bound: Bound = "binary",
    n: MostSamples = 100_000,
    n0: SelectionSamples = 100,
    alpha: Alpha = 0.001,
    radius_step: RadiusStep = None,
    precision: Precision = "fp32",
    runtime: Runtime = "torch",
    batch_size: BatchSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    limit: Limit = None,
    skip_unreadable: SkipUnreadable = False,
    classes: Classes = None,
    weights: Weights = None,
    final_norm: FinalNorm = True,
    outside_range: OutsideRange = False,
    estimate: EstimateOnly = False,
    output: Output = Path("certificates.tsv"),
    gallery: Gallery = Path("gallery.png"),
    page: Page = None,
) -> None:
    """Certify the images of FOLDER: print and save each image's class and certified L2 radius, and draw a gallery.

    With --cascade, one classifier of several sigmas certifies small radii like a small sigma and large radii like a
    large sigma. If a run is stopped, the same command continues it.
    """
    from rrcm.certification.certify_images import certify_folder, folder_files, output_paths
    from rrcm.certification.estimate import estimate_time
    from rrcm.certification.model_options import ModelOptions, choose_classifier
    from rrcm.certification.record import record_path
    from rrcm.certification.runtimes import check_runtime
    from rrcm.report.certified_images import draw_gallery
    from rrcm.report.figures import encode
    from rrcm.utils.files import claimed, write_together

    resume_gc()
    check_runtime(runtime, precision)
    written = [*output_paths(output), gallery, *([page] if page else [])]
    images = _find_images(folder, written, gallery, page)  # fails before a model is downloaded
    options = ModelOptions(
        model, sigma or [], cascade, threshold or [], thresholds, classes, weights, final_norm, outside_range
    )
    chosen = choose_classifier(options)
    settings = {"stopping": stopping, "bound": bound, "n0": n0, "n": n, "alpha": alpha}
    settings["radius_step"] = chosen.default_step if radius_step is None else radius_step
    rule = chosen.rule(settings)
    smoothing = {"seed": seed, "precision": precision, "batch_size": batch_size}
    classifier, scales = chosen.smooth(device, runtime=runtime, **smoothing), chosen.scales
    _print_notes(chosen.notes())
    if estimate:
        print(estimate_time(images, scales[0], classifier, rule, limit, start=_seconds_to_start()))
        return
    context.with_resource(claimed(*written))  # until the command ends
    certified = certify_folder(
        images, scales[0], classifier, rule, output, limit=limit, skip_unreadable=skip_unreadable
    )
    picture = encode(draw_gallery(certified, scales[0], rule), gallery.suffix)
    files = folder_files(output, certified, scales, model, chosen.recorded(settings), chosen.chosen)
    if page is not None:
        files[page] = _make_page(certified, scales[0], model, files[record_path(output)])
    write_together(files | {gallery: picture})
    _print_certificates(certified, rule)
    print(f"written: {', '.join(map(str, written))}")
    certified.run.finish()


@app.command()
@exit_on_error
def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...",
            help="Image files, and folders with images, subfolders included. A dash reads names from standard input.",
            show_default=False,
            autocompletion=complete_path,
        ),
    ],
    model: Models,
    sigma: Sigmas = None,
    cascade: Cascade = False,
    threshold: Threshold = None,
    thresholds: Thresholds = None,
    n: MostSamples = 1000,
    n0: Annotated[int, typer.Option(help="Cascades only: samples at each sigma that choose the class.")] = 100,
    alpha: Annotated[
        float, typer.Option(help="Maximum probability that the answer is not the smoothed classifier's class.")
    ] = 0.001,
    precision: Precision = "fp32",
    batch_size: BatchSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    limit: Limit = None,
    skip_unreadable: SkipUnreadable = False,
    classes: Classes = None,
    weights: Weights = None,
    final_norm: FinalNorm = True,
    outside_range: OutsideRange = False,
    estimate: EstimateOnly = False,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv|.jsonl",
            help="File for the answers, as CSV or JSON lines. Default: CSV on standard output.",
            autocompletion=complete_path,
        ),
    ] = None,
) -> None:
    """Predict the classes of IMAGES by majority vote, without radii: a class or "abstain", and the vote shares.

    This takes 1,000 samples per image, whereas a certificate takes up to 100,000.
    """
    from rrcm.certification.estimate import estimate_time
    from rrcm.certification.model_options import ModelOptions, choose_classifier
    from rrcm.certification.predict_images import (
        check_format,
        list_files,
        predict_files,
        prediction_rule,
        print_answers,
    )

    resume_gc()
    check_format(output)
    listing = list_files(images, sys.stdin)  # fails before a model is downloaded
    options = ModelOptions(
        model, sigma or [], cascade, threshold or [], thresholds, classes, weights, final_norm, outside_range
    )
    chosen = choose_classifier(options)
    classifier = chosen.smooth(device, seed=seed, precision=precision, batch_size=batch_size)
    _print_notes(chosen.notes())
    settings = {"n": n, "n0": n0, "alpha": alpha}
    rule = prediction_rule(classifier, **settings)
    if estimate:
        print(estimate_time(listing, chosen.scales[0], classifier, rule, limit, start=_seconds_to_start()))
        return
    settings |= {"limit": limit, "skip_unreadable": skip_unreadable}
    print_answers(predict_files(listing, chosen.scales[0], classifier, **settings), output)


@app.command()
@exit_on_error
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Any model that `rrcm certify --model` takes.",
            show_default=False,
            autocompletion=complete_path,
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the program and its README.md.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="onnx|torch-export|torchscript",
            help=r"Format of the program. onnx needs the packages of rrcm\[onnx].",
            autocompletion=_choices("onnx", "torch-export", "torchscript"),
        ),
    ],
    sigma: Annotated[
        float | None,
        typer.Option(help="Noise in pixel units, for joint models. Default: the noise of the training."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with images: certify 20 of them with the model and with the program, and compare.",
            autocompletion=complete_path,
        ),
    ] = None,
    classes: Classes = None,
    weights: Weights = None,
    final_norm: FinalNorm = True,
    outside_range: OutsideRange = False,
) -> None:
    """Export MODEL at one sigma as a program that runs without this package. It maps noisy images to logits.

    The command compares the logits and votes of the program with the model's. A README.md beside it says how to vote.
    """
    from rrcm.certification.export import check_export, export_model
    from rrcm.certification.model_options import ModelOptions, choose_classifier

    resume_gc()
    sigmas = [] if sigma is None else [sigma]
    options = ModelOptions([model], sigmas, False, [], None, classes, weights, final_norm, outside_range)
    check_export(format, output)
    chosen = choose_classifier(options)
    chosen.smooth("cpu")  # raises errors of the model and of the sigma
    _print_notes(chosen.notes())
    print(export_model(chosen.scales[0], chosen.sigmas[0], format, output, check))
    print(f"written: {output}")


def _print_notes(notes: Iterable[str | None]) -> None:
    for note in notes:
        if note:
            print(f"note: {note}", file=sys.stderr)


def _make_page(certified: "FolderCertificates", loaded: "LoadedClassifier", models: list[str], record: bytes) -> bytes:
    """The page of the certificates, from the content of their record."""
    from rrcm.report.certified_page import render_certified_page

    text = record.decode()
    return render_certified_page(certified, loaded, models, json.loads(text), text).encode()


def _find_images(folder: Path, written: Collection[Path], gallery: Path, page: Path | None) -> "Listing":
    """The images in a folder. Raises `RRCMError` if there are none, or if one of the paths cannot be `written`."""
    from rrcm.certification.certify_images import find_images
    from rrcm.data.images import describe_left_out
    from rrcm.report.figures import ENDINGS, FORMATS
    from rrcm.report.html import check_page

    for path in written:
        check_output(path)
    if page is not None:
        check_page(page)
    for name, path in (("gallery", gallery), ("page", page)):
        if list(written).count(path) > 1:
            raise RRCMError(f"{path}: is the path of both the certificates and the {name}; give two paths")
    if gallery.suffix not in FORMATS:
        raise RRCMError(f"{gallery}: the gallery must end in {ENDINGS}")
    images = find_images(folder, [gallery])
    if {(folder / file).resolve() for file in images.files} & {path.resolve() for path in written}:
        raise RRCMError(f"{next(iter(written))}: is one of the images; choose another path")
    if left_out := describe_left_out(images.left_out):
        print(f"note: left out {left_out}", file=sys.stderr)
    return images


def _print_certificates(certified: "FolderCertificates", rule: "StoppingRule | CascadeRule") -> None:
    from rrcm.report.certified_images import certificate_summary, certificate_table, note_on_labels
    from rrcm.report.fonts import note_on_letters

    frame = certified.frame
    print(f"{certificate_table(frame)}\n\n{certificate_summary(certified, rule)}")
    _print_notes([note_on_labels(frame), note_on_letters([*frame["file"], *frame["class"]])])


@app.command()
@exit_on_error
def train(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder that has a folder of images for each class, or train/ and test/ with such folders.",
            show_default=False,
            autocompletion=complete_path,
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Model folder to write. It must not exist yet.", autocompletion=complete_path)
    ],
    hours: Annotated[
        float, typer.Option(help="Time for the whole command, which decides the size of the network and the length.")
    ] = 1.0,
    params: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Settings to train with. If the file does not exist, the command writes the chosen settings to it and "
            "trains nothing.",
            autocompletion=complete_path,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="timm model whose weights training starts from: its name, hf-hub:owner/name, or a snapshot folder. "
            "The weights of a name are downloaded unless --weights is given. Default: random weights, no download.",
            autocompletion=complete_path,
        ),
    ] = None,
    weights: Weights = None,
) -> None:
    """Train a classifier on the images of FOLDER and certify it. The size, the noise and the length are chosen.

    If a run is stopped, the same command continues it.
    """
    from rrcm.own_images.train import Request
    from rrcm.own_images.train import train as run

    resume_gc()
    run(Request(folder, output, hours, params, start, weights))


@app.command()
@exit_on_error
def compare(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=FILE...",
            help="Name for the legend and certificate file.",
            show_default=False,
            autocompletion=complete_named_file,
        ),
    ],
    radii: Annotated[
        str, typer.Option(help="Radii of the table, in pixel units.")
    ] = "0,0.25,0.5,0.75,1,1.25,1.5,1.75,2",
    output: Annotated[
        Path, typer.Option(help="Figure of the exact curves, .png, .svg or .pdf.", autocompletion=complete_path)
    ] = Path("compare.png"),
    reference: Annotated[
        str | None,
        typer.Option(
            help="One of the names. Also print the differences to it on common images, with 95 % intervals.",
            autocompletion=complete_method,
        ),
    ] = None,
    page: Page = None,
) -> None:
    """Compare ACR and certified accuracy of certificate files (idx, label, predict, radius, correct, time)."""
    from rrcm.report.compare import compare as draw

    resume_gc()
    draw(files, radii, output, reference, page)


@app.command()
@exit_on_error
def board(
    entries: Annotated[
        Path,
        typer.Argument(
            metavar="LIST",
            help="YAML or JSON file that lists names, data sets and certificate files, such as results/board.yaml.",
            show_default=False,
            autocompletion=complete_path,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="The page, .html. A .csv beside it has the same numbers.", autocompletion=complete_path),
    ] = Path("board.html"),
) -> None:
    """Build one page of many certificate files, grouped by data set, with tables, curves, costs and links."""
    from contextlib import ExitStack

    from rrcm.publication.objects import find_file
    from rrcm.report.board import make_board

    resume_gc()
    if output.suffix != ".html":
        raise RRCMError(f"--output {output}: must end in .html")
    with ExitStack() as stack:
        opened: dict[Path, Path] = {}
        make_board(entries, output, lambda path: find_file(path, stack, opened))
    print(f"written: {output}, {output.with_suffix('.csv')}")


@app.command()
@exit_on_error
def audit(
    file: Annotated[
        Path,
        typer.Argument(
            help="Certificates (TSV) with the votes and the record beside them.", autocompletion=complete_path
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER|FILE|NAME|CODE",
            help="The model that was certified. For a cascade, repeat it in the order of the sigmas. Default, for "
            "the certificates of a result: ROOT/models/METHOD/sigma_S or joint.",
            autocompletion=complete_path,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of shards or pictures. Default, for the certificates of a result: ROOT/shards or "
            "ROOT/data/shards.",
            autocompletion=complete_path,
        ),
    ] = None,
    weights: Weights = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of random rows whose votes are repeated.")] = 100,
    every_row: Annotated[bool, typer.Option("--all", help="Repeat the votes of all rows.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of rows. Default: random.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|bf16",
            help="Default: as published. fp32 is faster on old CPUs, but detects fewer forgeries.",
            autocompletion=_choices("fp32", "bf16"),
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: as published.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as published.")] = None,
    device: Device = "auto",
) -> None:
    """Audit a certificate file: recompute its radii from its votes, and let the model vote again.

    The verdict is the last line. The exit status is 0 only if it is "verified".
    """
    import secrets
    import time

    from rrcm.certification.audit import audit_file, find_inputs, verdict
    from rrcm.certification.revote import Settings

    resume_gc()
    start = time.monotonic()
    seed = secrets.randbelow(2**31) if seed is None else seed
    print(f"rows are chosen with --seed {seed}", file=sys.stderr)
    settings = Settings(precision, batch_size, threads, device)
    inputs = find_inputs(file, model, images)
    chosen = {"rows": None if every_row else rows, "seed": seed}
    outcome = audit_file(file, *inputs, **chosen, settings=settings, weights=weights)
    for problem in outcome.problems:
        print(f"  {printable(problem)}", file=sys.stderr)
    print(printable(verdict(file, outcome, time.monotonic() - start)))
    if outcome.problems:
        raise typer.Exit(1)


def main() -> None:
    """The console command. It runs the code that is installed, and says so in a checkout with other code."""
    completes = "_RRCM_COMPLETE" in os.environ  # a shell asks for completions, and shows nothing else
    if not completes and (folder := other_checkout([Path.cwd(), *Path.cwd().parents])):
        code, folder = printable(Path(__file__).parents[1]), printable(folder)
        print(f"note: this is the rrcm of {code}; the code of {folder} does not run", file=sys.stderr)
    run_app(app)


if __name__ == "__main__":
    main()
