"""The command `normlab`: reading arguments and printing; the work is done elsewhere."""

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
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
        try:
            options.work(options)
        except KeyboardInterrupt as interrupt:
            print(f"\nnormlab: interrupted; {_what_is_kept(options)}", file=sys.stderr)
            return 128 + getattr(interrupt, "number", signal.SIGINT)
        except Exception as error:
            expected = isinstance(error, EXPECTED)
            said = str(error) or type(error).__name__
            said = said if expected else f"{error!r}; --traceback shows where it arose"
            if options.traceback:
                traceback.print_exc()
            print(f"normlab: {' '.join(said.split())}", file=sys.stderr)
            return options.status if expected else 1
    return 0


def _what_is_kept(options: argparse.Namespace) -> str:
    if getattr(options, "out", None) is None:
        return "nothing is lost"
    again = "the same command without --fresh" if options.fresh else "the same command"
    return f"what was finished is kept in {options.out}: {again} goes on from there"


def _parser() -> argparse.ArgumentParser:
    about = "Compare batch, layer and group normalization on small convolutional networks."
    parser = argparse.ArgumentParser(prog="normlab", description=about)
    parser.add_argument("--version", action="version", version=f"normlab {normlab.__version__}")
    parser.set_defaults(work=lambda _: parser.print_help(), traceback=False)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (arguments, work, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=f"To {about}.")
        command.set_defaults(work=work, status=2)  # 1 from where an error is no wrong use
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


def _run(options: argparse.Namespace) -> None:
    from normlab.assignments import find_assignment
    from normlab.comparisons.report import markdown_table, write_report
    from normlab.comparisons.submissions import as_submitted
    from normlab.experiment import run_assignment

    assignment = find_assignment(options.assignment or "mnist-l1")
    if options.as_submitted:
        assignment = as_submitted(assignment)
    # Without an assignment it must work anywhere at once, whatever data lies around.
    load = _loader(options, assignment, assignment.dataset if options.assignment else "digits")

    def load_and_tell() -> object:
        data = load()
        print(f"{assignment.title}, {data.source}", flush=True)
        return data

    place, taken = options.out / "runs", _taken(options, "engine")
    results = run_assignment(assignment, data=load_and_tell, directory=place, **taken)
    print(f"\n{markdown_table(results)}", flush=True)
    page, data = write_report(results, options.out), results.data
    print(f"\nFigures, tables and {page.name} are in {options.out}")
    if data.name == "digits":
        count = len(data.train_images) + len(data.test_images)
        other = f"`normlab run {assignment.name}` takes {assignment.dataset}"
        print(f"These are the {count:,} digits bundled with scikit-learn; {other} instead")


def _sweep(options: argparse.Namespace) -> None:
    from normlab.assignments import find_assignment
    from normlab.comparisons.sweep_plots import save_sweep_plot
    from normlab.comparisons.sweeps import TABLE, run_sweep, summary_table

    assignment = find_assignment(options.assignment)
    load = _loader(options, assignment, assignment.dataset, prefix="sweep-")
    figure = options.out / "sweep.png"
    taken = _taken(options, "norms", "batch_sizes", "lrs", "scaling", "dask")
    draw = partial(save_sweep_plot, figure, seconds=20)
    table = run_sweep(assignment, data=load, directory=options.out, after_each=draw, **taken)
    save_sweep_plot(figure, table)
    print(f"\n{summary_table(table)}\n\n{TABLE}, {figure.name} and the runs are in {options.out}")


def _taken(options: argparse.Namespace, *names: str) -> dict:
    """The options with these names, and those that `run` and `sweep` share."""
    names += ("seeds", "epochs", "device", "fresh")
    return {name: getattr(options, name) for name in names}


def _loader(
    options: argparse.Namespace, assignment: object, dataset: str, prefix: str = ""
) -> Callable:
    """A function that loads the images, if they are named rightly; sets the output folder."""
    from normlab.datasets.loading import DATASETS, check_dataset_name, check_root
    from normlab.support.checks import whole_number

    dataset, root, side = options.dataset or dataset, options.data_root, options.image_size
    check_dataset_name(dataset)
    check_root(root)
    if side is not None:
        whole_number(side, "--image-size")
    assignment.recipe_for(assignment.variants[0], seed=0, epochs=options.epochs)
    # Absolute, since workers are started elsewhere.
    place = dataset if dataset in DATASETS else user_path(dataset).resolve()
    options.out = options.out or Path("runs", f"{prefix}{assignment.name}-{Path(place).name}")
    return partial(_load, options, assignment, place, root and root.resolve(), side=side)


def _load(options: argparse.Namespace, *which: object, **how: object) -> object:
    from normlab.datasets.loading import load_assignment_data

    options.status = 1
    return load_assignment_data(*which, **how)


# --- list, summary, data ----------------------------------------------------------------------


def _list(options: argparse.Namespace) -> None:
    from normlab.assignments import ASSIGNMENTS
    from normlab.datasets.loading import DATASETS
    from normlab.model import NETWORKS
    from normlab.norms import NORMS

    options.status = 1
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


def _summary(options: argparse.Namespace) -> None:
    from normlab.model import build_network
    from normlab.support.summaries import summary

    how = {"groups": options.groups, "skip": not options.no_skip, "seed": 0}
    network = build_network(options.network, options.norm, **how)
    options.status = 1
    summary(network, network.description["input_shape"])


def _data(options: argparse.Namespace) -> None:
    from normlab.datasets.cache import cache_folder, cache_size, clear_cache
    from normlab.datasets.loading import check_dataset_name, load_dataset

    if options.name is None or options.clear_cache:
        size = f"{cache_size() / 1e6:,.0f} MB in {cache_folder()}"
        if options.clear_cache:
            clear_cache()
        print(f"{size}: removed" if options.clear_cache else f"{size}; --clear-cache removes it")
    if options.name is None:
        return
    check_dataset_name(options.name)
    options.status = 1
    data = load_dataset(options.name, options.data_root)
    shape = "×".join(map(str, data.input_shape))
    print(
        f"{data.source}: {len(data.train_images):,} training and {len(data.test_images):,} test "
        f"images of {shape}, {len(data.classes)} classes ({', '.join(data.classes)})\n"
        f"mean {', '.join(f'{m:.4f}' for m in data.mean)}; "
        f"standard deviation {', '.join(f'{s:.4f}' for s in data.std)}"
    )


def _doctor(options: argparse.Namespace) -> None:
    from normlab.engines.doctor import doctor
    from normlab.support.devices import pick_device

    device = pick_device(options.device)
    options.status = 1
    doctor(device)


def _review(options: argparse.Namespace) -> None:
    from normlab.comparisons.report import escaped, in_markdown
    from normlab.comparisons.review import review_runs

    table = review_runs(options.folders)
    rows = ([escaped(cell) for cell in row] for row in table.values.tolist())
    print(in_markdown([*table], rows, rule="---"))


# --- what each command takes ------------------------------------------------------------------

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
    "assignment": {
        **ASSIGNMENT,
        "nargs": "?",
        "help": f"{NAMES}; else mnist-l1 on digits",
    },
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
    "network": {"metavar": "NETWORK", "help": NAMES},
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
COMMANDS = {  # of each: its arguments, what does the work, and its help
    "run": (RUN, _run, "train all variants of an assignment and draw the comparison"),
    "sweep": (SWEEP, _sweep, "train all combinations of norms, batches and rates"),
    "list": ({}, _list, "show assignments, networks, data sets and norms"),
    "summary": (SUMMARY, _summary, "print a network's layers and parameters"),
    "data": (DATA, _data, "fetch or check a data set, or say what the cache holds"),
    "review": (REVIEW, _review, "tell what was trained in folders, if it is whole, and how fairly"),
    "doctor": (DOCTOR, _doctor, "tell what is here, whether it works, and how fast"),
}
