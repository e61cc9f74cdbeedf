"""What each command of the command line takes."""

import argparse
from pathlib import Path

import normlab
from normlab.support.files import user_path


def _path(text: str) -> Path:
    """A path of the command line; a shell leaves the ~ of `--out=~/runs` as it is."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


FLAG = {"action": "store_true"}
TRACEBACK = {"--traceback": {**FLAG, "help": "show where an error arose"}}
# Written out, so that help does not wait for torch; tests/test_cli.py compares.
NAMES = "mnist-l1, mnist-eva6, cifar10-norms, cifar10-add or cifar10-skip"
DATASETS = "digits, mnist, fashion-mnist, cifar10, svhn or a folder of images"
NORMS = "bn, ln, gn, ln-elementwise, in or none"
ASSIGNMENT = {"metavar": "ASSIGNMENT", "help": NAMES}
TRAINING = {
    "--dataset": {"help": DATASETS},
    "--data-root": {"type": _path, "help": "the folder that holds the data"},
    "--image-size": {"type": int, "help": "resize all images to this side"},
    "--epochs": {"type": int, "help": "passes over the training images (20)"},
    "--seeds": {"type": int, "default": 1, "help": "runs of each variant (1)"},
    "--device": {"help": "cpu, cuda or mps (the fastest there is)"},
    "--out": {"type": _path, "help": "output folder (one in runs, named after both)"},
    "--fresh": {**FLAG, "help": "train anew what the output folder holds of it"},
}
RUN = {
    "assignment": {**ASSIGNMENT, "nargs": "?", "help": f"{NAMES}; else mnist-l1 on digits"},
    "--as-submitted": {**FLAG, "help": "train in the manner of the submission"},
    **TRAINING,
    "--engine": {"default": "auto", "help": "auto, plain for the loop as taught, or untried"},
}
SWEEP = {
    "assignment": ASSIGNMENT,
    "--norms": {"nargs": "+", "help": f"{NORMS} (the assignment's variants)"},
    "--batch-sizes": {"nargs": "+", "type": int, "help": "images a step (the recipe's)"},
    "--lr": {"nargs": "+", "type": float, "dest": "lrs", "help": "learning rates (the recipe's)"},
    "--scaling": {"default": "none", "help": "of the rate with the batch: none, sqrt or linear"},
    **TRAINING,
    "--dask": {"metavar": "ADDRESS", "help": "train on the workers of this cluster"},
}
SUMMARY = {
    "network": {"metavar": "NETWORK", "help": "see `normlab list`"},
    "--norm": {"default": "bn", "help": f"{NORMS} (bn)"},
    "--groups": {"type": int, "help": "groups of gn (the assignment's)"},
    "--no-skip": {**FLAG, "help": "without skip connections"},
}
DATA = {
    "name": {"metavar": "NAME", "nargs": "?", "help": f"{DATASETS}; without it the cache"},
    "--data-root": {"type": _path, "help": "the folder that holds or receives it"},
    "--clear-cache": {**FLAG, "help": "remove all downloads and decoded images"},
}
DOCTOR = {"--device": TRAINING["--device"]}
REVIEW = {
    "folders": {"nargs": "+", "type": _path, "metavar": "FOLDER", "help": "with runs at any depth"}
}
COMMANDS = {  # of each: its arguments, and its help
    "run": (RUN, "train all variants of an assignment and draw the comparison"),
    "sweep": (SWEEP, "train all combinations of norms, batches and rates"),
    "list": ({}, "show assignments, networks, data sets and norms"),
    "summary": (SUMMARY, "print a network's layers and parameters"),
    "data": (DATA, "fetch or check a data set, or say what the cache holds"),
    "doctor": (DOCTOR, "tell what is here, whether it works, and how fast"),
    "review": (REVIEW, "tell what was trained in folders, if it is whole, and how fairly"),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of `normlab COMMAND …`; `command` names which, `status` is that of an error."""
    about = "Compare batch, layer and group normalization on small convolutional networks."
    parser = argparse.ArgumentParser(prog="normlab", description=about)
    parser.add_argument("--version", action="version", version=f"normlab {normlab.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, (arguments, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=f"To {about}.")
        command.set_defaults(status=2)  # 1 from where an error is no wrong use
        for argument, how in (arguments | TRACEBACK).items():
            command.add_argument(argument, **how)
    return parser
