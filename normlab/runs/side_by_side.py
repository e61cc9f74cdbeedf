"""Many jobs: those that are done are loaded, the others trained, side by side if worth it."""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from normlab.data import Dataset
from normlab.history import Run
from normlab.runs.folder import remove_runs
from normlab.runs.jobs import Job, Outcomes, find_runs, kept_runs, without_errors
from normlab.runs.processes import are_worthwhile, in_processes
from normlab.runs.trainer import fit_each
from normlab.runs.transfer import Ended, train_apart
from normlab.support.files import user_path


def runs_of_jobs(
    jobs: Sequence[Job],
    data: Dataset,
    *,
    place: Path,
    fresh: bool,
    kept: str | Path | None,
    keep_going: bool,
    device: torch.device,
    progress: bool,
    engine: str,
) -> dict[Path, Run]:
    """The runs of identified jobs, by their directories, which lie in `place`.

    Args:
        fresh, kept, device, progress, engine: as for `run_assignment`.
        keep_going: whether an error is raised after the other jobs, or at once.
    """
    runs: dict[Path, Run] = {}
    if fresh:
        remove_runs(*(job.directory for job in jobs))
    elif kept is not None:
        runs = kept_runs(jobs, place, user_path(kept), data, device)
    own = find_runs([job for job in jobs if job.directory not in runs], data, device)
    runs |= {job.directory: run for job, run in own.items()}
    left = [job for job in jobs if job.directory not in runs]
    if progress and runs:
        print(f"{len(runs)} of {len(jobs)} runs are loaded, {len(left)} trained")
    outcomes = train(left, jobs, data, device=device, progress=progress, engine=engine)
    with closing(without_errors(outcomes, len(left), keep_going=keep_going)) as trained:
        return runs | {job.directory: run for job, run in trained}


def train(
    left: Sequence[Job],
    jobs: Sequence[Job],
    data: Dataset,
    *,
    device: torch.device,
    progress: bool = True,
    engine: str = "auto",
    workers: Callable[[dict[Job, bytes]], Ended] | None = None,
) -> Outcomes:
    """Does the jobs that are left, side by side if all jobs together are worth it.

    Args:
        workers: do the jobs, whatever they are worth, instead of processes of this machine.
    """
    if workers is None and device.type == "cpu" and engine != "plain":
        apart = partial(in_processes, data, progress=progress)
        workers = apart if are_worthwhile(jobs, data) else None
    if workers is not None:
        left = yield from train_apart(left, data, workers)
    yield from fit_each(left, data, device=device, progress=progress, engine=engine)
