"""The command `normlab`: reading arguments and printing; the work is done elsewhere."""

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import normlab
from normlab.support.files import user_path
from normlab.support.output import lasting_output
from normlab.support.signals import ended_by_signals

# What is raised with a sentence of its own.
EXPECTED = (ArithmeticError, OSError, RuntimeError, TypeError, ValueError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 where the work failed, or 2 where it was used wrongly.

    If a signal ended it, it returns 128 and the signal's number.
    """
    with lasting_output(), ended_by_signals():
        options = _parser().parse_args(arguments)
        status = 2
        try:
            checked = options.check(options)
            status = 1
            options.work(options, *checked)
        except KeyboardInterrupt as interrupt:
            print(f"\nnormlab: interrupted; {_what_is_kept(options)}", file=sys.stderr)
            return 128 + getattr(interrupt, "number", signal.SIGINT)
        except EXPECTED as error:
            return _tell(options, str(error) or type(error).__name__, status)
        except Exception as error:
            return _tell(options, f"{error!r}; --traceback shows where it arose", 1)
    return 0


def _tell(options: argparse.Namespace, message: str, status: int) -> int:
    if options.traceback:
        traceback.print_exc()
    print(f"normlab: {' '.join(message.split())}", file=sys.stderr)
    return status


def _what_is_kept(options: argparse.Namespace) -> str:
    if getattr(options, "out", None) is None:
        return "nothing is lost"
    again = "the same command without --fresh" if options.fresh else "the same command"
    return f"what was finished is kept in {options.out}: {again} goes on from there"


def _parser() -> argparse.ArgumentParser:
    about = "Compare batch, layer and group normalization on small convolutional networks."
    parser = argparse.ArgumentParser(prog="normlab", description=about)
    parser.add_argument("--version", action="version", version=f"normlab {normlab.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (arguments, check, work, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=f"To {about}.")
        command.set_defaults(check=check, work=work)
        for argument, how in (arguments | TRACEBACK).items():
            command.add_argument(argument, **how)
    return parser


def _path(text: str) -> Path:
    """A path of the command line; a shell leaves the ~ of `--out=~/runs` as it is."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# --- run and sweep ----------------------------------------------------------------------------


def _check_run(options: argparse.Namespace) -> tuple:
    """The assignment, a function that loads its images, and the output folder."""
    from normlab.assignments import find_assignment
    from normlab.comparisons.submissions import as_submitted
    from normlab.engines.choice import ENGINES
    from normlab.support.checks import one_of

    assignment = find_assignment(options.assignment or "mnist-l1")
    if options.as_submitted:
        assignment = as_submitted(assignment)
    one_of(options.engine, ENGINES, "engine")
    # Without an assignment it must work anywhere at once, whatever data lies around.
    dataset = assignment.dataset if options.assignment else "digits"
    return assignment, *_check_training(options, assignment, dataset)


def _check_sweep(options: argparse.Namespace) -> tuple:
    """The assignment, a function that loads its images, and the output folder."""
    from normlab.assignments import find_assignment
    from normlab.comparisons.sweeps import check_axes

    assignment = find_assignment(options.assignment)
    load, out = _check_training(options, assignment, assignment.dataset)
    check_axes(assignment, options.norms, options.batch_sizes, options.lr, options.scaling)
    return assignment, load, out


def _check_training(options: argparse.Namespace, assignment, dataset: str) -> tuple:
    """A function that loads the images, and the output folder, if all options are in order."""
    from normlab.datasets.loading import (
        DATASETS,
        check_dataset_name,
        check_root,
        load_assignment_data,
    )
    from normlab.runs.jobs import seed_numbers
    from normlab.support.checks import whole_number
    from normlab.support.devices import pick_device

    dataset, root, side = options.dataset or dataset, options.data_root, options.image_size
    check_dataset_name(dataset)
    check_root(root)
    seed_numbers(options.seeds)
    if side is not None:
        whole_number(side, "--image-size")
    assignment.recipe_for(assignment.variants[0], seed=0, epochs=options.epochs)
    pick_device(options.device)
    # Absolute, since workers are started elsewhere.
    place = dataset if dataset in DATASETS else user_path(dataset).resolve()
    load = partial(load_assignment_data, assignment, place, root and root.resolve(), side=side)
    sweep = "sweep-" if options.work is _sweep else ""
    return load, options.out or Path("runs") / f"{sweep}{assignment.name}-{Path(place).name}"


def _common(options: argparse.Namespace) -> dict:
    return {name: getattr(options, name) for name in ("seeds", "epochs", "device", "fresh")}


def _run(options: argparse.Namespace, assignment, load, out: Path) -> None:
    from normlab.comparisons.report import markdown_table, write_report
    from normlab.experiment import run_assignment

    options.out = out
    data = load()
    print(f"{assignment.title}, {data.source}", flush=True)
    place = {"directory": out / "runs", "engine": options.engine}
    results = run_assignment(assignment, data=data, **place, **_common(options))
    print(f"\n{markdown_table(results)}", flush=True)
    page = write_report(results, out)
    print(f"\nFigures, tables and {page.name} are in {out}")
    if data.name == "digits":
        count = len(data.train_images) + len(data.test_images)
        other = f"`normlab run {assignment.name}` takes {assignment.dataset}"
        print(f"These are the {count:,} digits bundled with scikit-learn; {other} instead")


def _sweep(options: argparse.Namespace, assignment, load, out: Path) -> None:
    from normlab.comparisons.sweep_plots import save_sweep_plot
    from normlab.comparisons.sweep_tables import TABLE, summary_table
    from normlab.comparisons.sweeps import run_sweep

    options.out, figure = out, out / "sweep.png"
    table = run_sweep(
        assignment,
        norms=options.norms,
        batch_sizes=options.batch_sizes,
        lrs=options.lr,
        scaling=options.scaling,
        data=load,
        directory=out,
        dask=options.dask,
        after_each=partial(save_sweep_plot, figure, seconds=20),
        **_common(options),
    )
    save_sweep_plot(figure, table)
    print(f"\n{summary_table(table)}\n\n{TABLE}, {figure.name} and the runs are in {out}")


# --- list, summary, data ----------------------------------------------------------------------


def _list(options: argparse.Namespace) -> None:
    from normlab.assignments import ASSIGNMENTS
    from normlab.datasets.loading import DATASETS
    from normlab.model import NETWORKS
    from normlab.norms import NORMS

    print("Assignments")
    for assignment in ASSIGNMENTS.values():
        labels = ", ".join(variant.label for variant in assignment.variants)
        print(f"  {assignment.name:15} {assignment.title}: {labels}")
    print("\nNetworks")
    for name, design in NETWORKS.items():
        shape = "×".join(map(str, design.input_shape))
        print(f"  {name:15} images {shape}, gn with {design.groups} groups")
    print("\nData sets\n  " + ", ".join(DATASETS) + ", or a folder with train/CLASS and test/CLASS")
    print("\nNorms")
    for name, kind in NORMS.items():
        print(f"  {name:15} {kind.title}")


def _build(options: argparse.Namespace) -> tuple:
    from normlab.model import build_network

    how = {"groups": options.groups, "skip": not options.no_skip, "seed": 0}
    return (build_network(options.network, options.norm, **how),)


def _summary(options: argparse.Namespace, network) -> None:
    from normlab.support.summaries import summary

    summary(network, network.description["input_shape"])


def _check_dataset_name(options: argparse.Namespace) -> tuple:
    from normlab.datasets.loading import check_dataset_name

    check_dataset_name(options.name)
    return ()


def _data(options: argparse.Namespace) -> None:
    from normlab.datasets.loading import load_dataset

    data = load_dataset(options.name, options.data_root)
    shape = "×".join(map(str, data.input_shape))
    print(
        f"{data.source}: {len(data.train_images):,} training and {len(data.test_images):,} test "
        f"images of {shape}, {len(data.classes)} classes ({', '.join(data.classes)})\n"
        f"mean {', '.join(f'{m:.4f}' for m in data.mean)}; "
        f"standard deviation {', '.join(f'{s:.4f}' for s in data.std)}"
    )


def _check_device(options: argparse.Namespace) -> tuple:
    from normlab.support.devices import pick_device

    return (pick_device(options.device),)


def _doctor(options: argparse.Namespace, device) -> None:
    from normlab.engines.doctor import doctor

    doctor(device)


# --- what each command takes ------------------------------------------------------------------

FLAG = {"action": "store_true"}
TRACEBACK = {"--traceback": {**FLAG, "help": "show where an error arose"}}
ASSIGNMENT = {"metavar": "ASSIGNMENT", "help": "see `normlab list`"}
TRAINING = {
    "--dataset": {"help": "another data set, or a folder of images"},
    "--data-root": {"type": _path, "help": "the folder that holds the data"},
    "--image-size": {"type": int, "help": "resize all images to this side"},
    "--epochs": {"type": int, "help": "passes over the training images (20)"},
    "--seeds": {"type": int, "default": 1, "help": "runs of each variant (1)"},
    "--device": {"help": "cpu, cuda or mps (the fastest there is)"},
    "--out": {"type": _path, "help": "output folder (one in runs, named after both)"},
    "--fresh": {**FLAG, "help": "train anew what the output folder holds of it"},
}
RUN = {
    "assignment": {**ASSIGNMENT, "nargs": "?", "help": "without it: mnist-l1 on bundled digits"},
    "--as-submitted": {**FLAG, "help": "train in the manner of the submission"},
    **TRAINING,
    "--engine": {"default": "auto", "help": "auto, plain for the loop as taught, or untried"},
}
SWEEP = {
    "assignment": ASSIGNMENT,
    "--norms": {"nargs": "+", "help": "bn, ln, gn, … (the assignment's variants)"},
    "--batch-sizes": {"nargs": "+", "type": int, "help": "images a step (the recipe's)"},
    "--lr": {"nargs": "+", "type": float, "help": "learning rates (the recipe's)"},
    "--scaling": {"default": "none", "help": "of the rate with the batch: none, sqrt or linear"},
    **TRAINING,
    "--dask": {"metavar": "ADDRESS", "help": "train on the workers of this cluster"},
}
SUMMARY = {
    "network": {"metavar": "NETWORK", "help": "see `normlab list`"},
    "--norm": {"default": "bn", "help": "a norm that `normlab list` names (bn)"},
    "--groups": {"type": int, "help": "groups of gn (the assignment's)"},
    "--no-skip": {**FLAG, "help": "without skip connections"},
}
DATA = {
    "name": {"metavar": "NAME", "help": "a data set, or a folder of images"},
    "--data-root": {"type": _path, "help": "the folder that holds or receives it"},
}
DOCTOR = {"--device": TRAINING["--device"]}
# Of each command: its arguments, what checks them, what does the work, and its help.
COMMANDS = {
    "run": (RUN, _check_run, _run, "train all variants of an assignment and draw the comparison"),
    "sweep": (SWEEP, _check_sweep, _sweep, "train all combinations of norms, batches and rates"),
    "list": ({}, lambda _: (), _list, "show assignments, networks, data sets and norms"),
    "summary": (SUMMARY, _build, _summary, "print a network's layers and parameters"),
    "data": (DATA, _check_dataset_name, _data, "fetch or check a data set"),
    "doctor": (DOCTOR, _check_device, _doctor, "tell what is here, whether it works, and how fast"),
}
