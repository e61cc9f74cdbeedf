"""The command `normlab`: reading arguments and printing; the work is done elsewhere."""

import argparse
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import normlab
from normlab.support.files import user_path
from normlab.support.output import lasting_output

DESCRIPTION = "Compare batch, layer and group normalization on small convolutional networks."


# What is raised with a sentence of its own.
EXPECTED = (ArithmeticError, OSError, RuntimeError, TypeError, ValueError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 where the work failed, or 2 where it was used wrongly.

    If a signal ended it, it returns 128 and the signal's number.
    """
    with lasting_output(), _ended_by_signals():
        options = _parser().parse_args(arguments)
        status = 2
        try:
            plan = options.check(options)
            status = 1
            options.work(options, plan)
        except KeyboardInterrupt as interrupt:
            print(f"\nnormlab: interrupted; {options.after_interrupt(options)}", file=sys.stderr)
            return 128 + getattr(interrupt, "number", signal.SIGINT)
        except EXPECTED as error:
            return _tell(options, str(error) or type(error).__name__, status)
        except Exception as error:
            return _tell(options, f"{error!r}; --traceback shows where it arose", 1)
    return 0


class _Ended(KeyboardInterrupt):
    """A signal other than that of Ctrl-C ends the work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _End:
    """What to do at a signal: raises `_Ended` once, and again if that got lost in a destructor."""

    def __init__(self) -> None:
        self.last: weakref.ref | None = None

    def __call__(self, number: int, _: object) -> None:
        if self.last is None or self.last() is None:
            error = _Ended(number)
            self.last = weakref.ref(error)
            try:
                raise error
            finally:
                del error  # else this frame would keep it, as it keeps the frame


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside the block a request to end, and a terminal that is closed, are like Ctrl-C.

    Not if they are to be ignored, as after `nohup`. Once one has ended the work they are ignored:
    a shell may repeat them.
    """
    end, numbers = _End(), []
    if threading.current_thread() is threading.main_thread():  # no other one may ask for them
        known = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        numbers = [each for each in known if each and signal.getsignal(each) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN if end.last else signal.SIG_DFL)


def _tell(options: argparse.Namespace, message: str, status: int) -> int:
    if options.traceback:
        traceback.print_exc()
    print(f"normlab: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="normlab", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"normlab {normlab.__version__}")
    parser.set_defaults(check=lambda options: None, after_interrupt=lambda _: "nothing is lost")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_run, _add_sweep, _add_report, _add_list, _add_summary, _add_data):
        command = add(commands)
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
    return parser


def _path(text: str) -> Path:
    """A path of the command line; a shell leaves the ~ of `--out=~/runs` as it is."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_run(commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "run",
        help="train all variants of an assignment and draw the comparison",
        description="Trains all variants of an assignment and writes figures, tables and a page. "
        "Without an assignment it runs mnist-l1 on the bundled digits, which need no download.",
    )
    command.add_argument("assignment", nargs="?", metavar="ASSIGNMENT", help="see `normlab list`")
    command.add_argument(
        "--as-submitted", action="store_true", help="train in the manner of the submission"
    )
    _add_training(command)
    command.add_argument(
        "--engine", default="auto", help="auto for the fastest way, plain for the loop as taught"
    )
    _add_out(command, "runs/ASSIGNMENT-DATASET")
    command.set_defaults(check=_check_run, work=_run, after_interrupt=_how_to_resume)
    return command


def _add_training(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", help="another data set, or a folder of images")
    command.add_argument("--data-root", type=_path, help="the folder that holds the data")
    command.add_argument("--image-size", type=int, help="resize all images to this side")
    command.add_argument("--epochs", type=int, help="passes over the training images (20)")
    command.add_argument("--seeds", type=int, default=1, help="runs of each variant (1)")
    command.add_argument("--device", help="cpu, cuda or mps (the fastest there is)")


def _add_out(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("--out", type=_path, help=f"output folder ({default})")
    again = command.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on with what --out holds (the default)"
    )
    again.add_argument("--fresh", action="store_true", help="train anew what --out holds of it")


def _add_sweep(commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "sweep",
        help="train every combination of norms, batch sizes, rates and seeds",
        description="Trains every combination of norms, batch sizes, learning rates and seeds, as "
        "runs of their own, and writes a table and a figure that grow as they finish.",
    )
    command.add_argument("assignment", metavar="ASSIGNMENT", help="see `normlab list`")
    command.add_argument("--norms", nargs="+", help="bn, ln, gn, … (the assignment's variants)")
    command.add_argument("--batch-sizes", nargs="+", type=int, help="images a step (the recipe's)")
    command.add_argument("--lr", nargs="+", type=float, help="learning rates (the recipe's)")
    command.add_argument(
        "--scaling", default="none", help="of the rate with the batch size: none, sqrt or linear"
    )
    _add_training(command)
    command.add_argument("--dask", metavar="ADDRESS", help="train on the workers of this cluster")
    _add_out(command, "runs/sweep-ASSIGNMENT-DATASET")
    command.set_defaults(check=_check_sweep, work=_sweep, after_interrupt=_how_to_resume)
    return command


def _add_report(commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "report",
        help="fill numbers and tables of README and notebooks from kept results",
        description="Fills the marked places of Markdown files and notebooks from the results.json "
        "of each folder in --results.",
    )
    command.add_argument("pages", nargs="*", type=_path, help="README.md and notebooks/*.ipynb")
    command.add_argument("--results", type=_path, default=Path("notebooks/results"))
    command.add_argument(
        "--check", action="store_true", dest="dry", help="change nothing; status 1 if one is stale"
    )
    command.set_defaults(check=_check_report, work=_report)
    return command


def _add_list(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("list", help="show assignments, networks, data sets and norms")
    command.set_defaults(work=_list)
    return command


def _add_summary(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("summary", help="print a network's layers and parameters")
    command.add_argument("network", metavar="NETWORK", help="see `normlab list`")
    command.add_argument("--norm", default="bn", help="bn, ln, gn, ln-elementwise, in or none (bn)")
    command.add_argument("--groups", type=int, help="groups of gn (the assignment's)")
    command.add_argument("--no-skip", action="store_true", help="without skip connections")
    command.set_defaults(check=_build_for_summary, work=_summary)
    return command


def _add_data(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("data", help="fetch or check a data set")
    command.add_argument("name", metavar="NAME", help="a data set, or a folder of images")
    command.add_argument("--data-root", type=_path, help="the folder that holds or receives it")
    command.set_defaults(check=_check_dataset_name, work=_data)
    return command


# --- run --------------------------------------------------------------------------------------


def _check_run(options: argparse.Namespace):
    """The assignment, the name of its data and the output folder, or what is wrong with them."""
    from normlab.assignments import as_submitted, find_assignment
    from normlab.engines.choice import ENGINES
    from normlab.support.checks import one_of

    assignment = find_assignment(options.assignment or "mnist-l1")
    if options.as_submitted:
        assignment = as_submitted(assignment)
    one_of(options.engine, ENGINES, "engine")
    # Without an assignment it must work anywhere at once, whatever data lies around.
    dataset = options.dataset or (assignment.dataset if options.assignment else "digits")
    dataset, name = _check_training(options, assignment, dataset)
    return assignment, dataset, options.out or Path("runs") / f"{assignment.name}-{name}"


def _check_training(options: argparse.Namespace, assignment, dataset: str):
    """The data set's name or folder, and what to call it, if all options are in order."""
    from normlab.datasets.loading import DATASETS, check_dataset_name
    from normlab.runs.plans import seed_numbers
    from normlab.support.checks import whole_number
    from normlab.support.devices import pick_device

    check_dataset_name(dataset)
    seed_numbers(options.seeds)
    if options.image_size is not None:
        whole_number(options.image_size, "--image-size")
    assignment.recipe_for(assignment.variants[0], seed=0, epochs=options.epochs)
    pick_device(options.device)
    _check_root(options.data_root)
    # Absolute, since workers are started elsewhere.
    place = dataset if dataset in DATASETS else user_path(dataset).resolve()
    return place, Path(place).name


def _check_root(root: Path | None) -> None:
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"the data root {root} is not a folder")


def _run(options: argparse.Namespace, plan) -> None:
    from normlab.experiment import load_assignment_data, run_assignment

    assignment, dataset, out = plan
    options.out = out
    data = load_assignment_data(assignment, dataset, options.data_root, side=options.image_size)
    print(f"{assignment.title}, {data.source}", flush=True)
    results = run_assignment(
        assignment,
        data=data,
        seeds=options.seeds,
        epochs=options.epochs,
        directory=options.out / "runs",
        device=options.device,
        fresh=options.fresh,
        engine=options.engine,
    )
    _report_on(results, out)


def _report_on(results, out: Path) -> None:
    from normlab.comparisons.report import markdown_table, write_report

    print(f"\n{markdown_table(results)}", flush=True)
    page = write_report(results, out)
    print(f"\nFigures, tables and {page.name} are in {out}")
    assignment, data = results.assignment, results.data
    if data.name == "digits":
        print(
            f"These are the {len(data.train_images) + len(data.test_images):,} digits bundled with "
            f"scikit-learn; `normlab run {assignment.name}` takes {assignment.dataset} instead and "
            "downloads it if need be"
        )


def _how_to_resume(options: argparse.Namespace) -> str:
    if options.out is None:
        return "nothing was trained yet"
    again = "the same command without --fresh" if options.fresh else "the same command"
    return f"what was finished is kept in {options.out}: {again} goes on from there"


# --- sweep ------------------------------------------------------------------------------------


def _check_sweep(options: argparse.Namespace):
    """The assignment, a function that loads its images, and the output folder."""
    from normlab.assignments import find_assignment
    from normlab.comparisons.sweeps import check_axes

    assignment = find_assignment(options.assignment)
    dataset, name = _check_training(options, assignment, options.dataset or assignment.dataset)
    check_axes(assignment, options.norms, options.batch_sizes, options.lr, options.scaling)
    root = options.data_root and options.data_root.resolve()
    load = partial(_load_images, assignment, dataset, root, options.image_size)
    return assignment, load, options.out or Path("runs") / f"sweep-{assignment.name}-{name}"


def _load_images(assignment, dataset: str | Path, root: Path | None, side: int | None):
    """Here, and on each worker of a cluster, whose data root may be missing."""
    from normlab.experiment import load_assignment_data

    _check_root(root)
    return load_assignment_data(assignment, dataset, root, side=side)


def _sweep(options: argparse.Namespace, plan) -> None:
    from normlab.comparisons.sweep_tables import TABLE, summary_table
    from normlab.comparisons.sweeps import run_sweep

    assignment, load, options.out = plan
    figure = options.out / "sweep.png"
    table = run_sweep(
        assignment,
        norms=options.norms,
        batch_sizes=options.batch_sizes,
        lrs=options.lr,
        scaling=options.scaling,
        seeds=options.seeds,
        epochs=options.epochs,
        data=load,
        directory=options.out,
        device=options.device,
        fresh=options.fresh,
        dask=options.dask,
        after_each=partial(_draw_sweep, figure, between=20),
    )
    _draw_sweep(figure, table)
    print(f"\n{summary_table(table)}\n\n{TABLE}, {figure.name} and the runs are in {options.out}")


def _draw_sweep(figure: Path, table, *, between: float = 0) -> None:
    """Draws a table, unless its figure is younger than so many seconds."""
    from normlab.comparisons.sweep_plots import plot_sweep
    from normlab.plots import save_if_drawn

    if not figure.is_file() or time.time() - figure.stat().st_mtime >= between:
        save_if_drawn(partial(plot_sweep, table), figure)


# --- report -----------------------------------------------------------------------------------


def _check_report(options: argparse.Namespace):
    pages = options.pages or [Path("README.md"), *sorted(Path("notebooks").glob("*.ipynb"))]
    for page in pages:
        if not page.is_file():
            raise FileNotFoundError(f"there is no page {page}")
    return pages


def _report(options: argparse.Namespace, pages: list[Path]) -> None:
    from normlab.comparisons.pages import fill_pages, read_results

    changed = fill_pages(pages, read_results(options.results), write=not options.dry)
    names = ", ".join(map(str, changed)) or "nothing"
    if changed and options.dry:
        raise RuntimeError(f"stale: {names}; `normlab report` fills them anew")
    print(f"{len(pages)} pages read, changed: {names}")


# --- list, summary, data ----------------------------------------------------------------------


def _list(options: argparse.Namespace, plan: None) -> None:
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


def _build_for_summary(options: argparse.Namespace):
    from normlab.model import build_network

    return build_network(
        options.network, options.norm, groups=options.groups, skip=not options.no_skip, seed=0
    )


def _summary(options: argparse.Namespace, network) -> None:
    from normlab.support.summaries import summary

    summary(network, network.description["input_shape"])


def _check_dataset_name(options: argparse.Namespace) -> None:
    from normlab.datasets.loading import check_dataset_name

    check_dataset_name(options.name)


def _data(options: argparse.Namespace, plan: None) -> None:
    from normlab.datasets.loading import load_dataset

    data = load_dataset(options.name, options.data_root)
    shape = "×".join(map(str, data.input_shape))
    print(
        f"{data.source}: {len(data.train_images):,} training and {len(data.test_images):,} test "
        f"images of {shape}, {len(data.classes)} classes ({', '.join(data.classes)})\n"
        f"mean {', '.join(f'{m:.4f}' for m in data.mean)}; "
        f"standard deviation {', '.join(f'{s:.4f}' for s in data.std)}"
    )
