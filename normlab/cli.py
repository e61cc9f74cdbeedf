"""The command `normlab`: reading arguments and printing; the work is done elsewhere."""

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from normlab.support.command_line import make_parser
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
        parser = make_parser()
        options = parser.parse_args(arguments)
        if options.command is None:
            parser.print_help()
            return 0
        try:
            WORKS[options.command](options)
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
    place, taken = options.out / "runs", _taken(options, "engine")
    results = run_assignment(assignment, data=load, directory=place, **taken)
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


def _load(options: argparse.Namespace, assignment: object, *which: object, side: int) -> object:
    from normlab.datasets.loading import load_assignment_data

    options.status = 1
    data = load_assignment_data(assignment, *which, side=side)
    if options.command == "run":
        print(f"{assignment.title}, {data.source}", flush=True)
    return data


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
    from normlab.lessons.layer_table import summary
    from normlab.model import build_network

    how = {"groups": options.groups, "skip": not options.no_skip, "seed": 0}
    network = build_network(options.network, options.norm, **how)
    options.status = 1
    summary(network, network.description["input_shape"])


def _data(options: argparse.Namespace) -> None:
    from normlab.datasets.cache import measured_cache
    from normlab.datasets.loading import check_dataset_name, described, load_dataset

    if options.name is None or options.clear_cache:
        print(measured_cache(clear=options.clear_cache))
    if options.name is None:
        return
    check_dataset_name(options.name)
    options.status = 1
    print(described(load_dataset(options.name, options.data_root)))


def _doctor(options: argparse.Namespace) -> None:
    from normlab.engines.doctor import doctor
    from normlab.support.devices import pick_device

    device = pick_device(options.device)
    options.status = 1
    doctor(device)


def _review(options: argparse.Namespace) -> None:
    from normlab.comparisons.review import print_review

    print_review(options.folders)


WORKS = {
    **{"run": _run, "sweep": _sweep, "list": _list},
    **{"summary": _summary, "data": _data, "doctor": _doctor, "review": _review},
}
