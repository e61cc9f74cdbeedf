"""Several jobs in one process: at once, one after another, and none twice."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from normlab.engines import choice
from normlab.engines.cpu import CpuEngine
from normlab.engines.cuda_graph import GraphEngine
from normlab.runs.folder import RunFolder, remove_runs
from normlab.runs.jobs import Job, warn_if_at_chance
from normlab.runs.trainer import fit_each
from normlab.support.locks import InUse, locked
from tests.test_fitting import RECIPE, assert_same_run, fit, on_training_batch


def job_of(network, recipe=RECIPE, directory=None, label=""):
    return Job(lambda: network, recipe, directory, label)


def three_jobs(tiny_network, folder=None, **changes):
    """Three networks to train at once; `changes` are the recipe of the second one."""
    recipes = (RECIPE, RECIPE.replace(**changes), RECIPE)
    return [
        job_of(tiny_network("gn", seed), recipe, folder and folder / str(seed), f"number {seed}")
        for seed, recipe in enumerate(recipes)
    ]


def fit_together(jobs, data):
    """The runs of jobs that are done at once, in their order; raises the error of one that failed.

    They are told by their labels.
    """
    outcomes = {
        job.label: outcome
        for job, outcome in fit_each(jobs, data, device="cpu", progress=False, at_once=len(jobs))
    }
    for outcome in outcomes.values():
        if isinstance(outcome, Exception):
            raise outcome
    return [outcomes[job.label] for job in jobs]


def test_several_at_once_give_what_each_gives_alone(tiny, tiny_network):
    runs = fit_together(three_jobs(tiny_network), tiny)
    for seed, run in enumerate(runs):
        alone = fit(tiny_network("gn", seed), tiny)
        assert_same_run(run, alone)
        assert (run.provenance["at_once"], alone.provenance["at_once"]) == (3, 1)


def test_graphs_with_dropout_draw_by_turns_what_each_draws_alone(tiny, tiny_network, monkeypatch):
    def jobs():
        networks = [tiny_network("gn", seed, dropout=0.3) for seed in range(3)]
        return [job_of(each, RECIPE, None, f"number {i}") for i, each in enumerate(networks)]

    monkeypatch.setattr(choice, "_fastest", lambda *_: (GraphEngine, "a test"))
    monkeypatch.setattr(GraphEngine, "IN_A_ROW", 1)
    for run, job in zip(fit_together(jobs(), tiny), jobs(), strict=True):
        assert run.provenance["engine"] == "cuda-graph"
        assert_same_run(run, *fit_together([job], tiny))


def test_the_first_epoch_s_seconds_contain_the_preparation(tiny, tiny_network, monkeypatch):
    def prepare(engine):
        time.sleep(0.2)
        return kept(engine)

    kept = CpuEngine.prepare
    monkeypatch.setattr(CpuEngine, "prepare", prepare)
    run = fit(tiny_network(), tiny)
    assert run.history[0]["seconds"] >= 0.2


def test_one_that_diverges_does_not_keep_the_others_from_their_end(tiny, tiny_network, tmp_path):
    for _ in range(2):  # the same call again finds the others done, and says the same
        jobs = three_jobs(tiny_network, tmp_path, lr=1e30)
        with pytest.raises(FloatingPointError, match=r"^number 1: the training loss became"):
            fit_together(jobs, tiny)
        finished = [RunFolder(job.directory).is_finished() for job in jobs]
        assert finished == [True, False, True]
    kept = fit(tiny_network("gn", 2), tiny, directory=tmp_path / "2")
    assert_same_run(kept, fit(tiny_network("gn", 2), tiny))


def test_an_interrupt_of_several_loses_no_finished_epoch_of_any(tiny, tiny_network, tmp_path):
    jobs = three_jobs(tiny_network, tmp_path)

    def interrupt(number, _):
        if number == 6 + 3:
            raise KeyboardInterrupt

    stop = on_training_batch(jobs[1].build(), interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit_together(jobs, tiny)
    stop()
    kept = [len(RunFolder(job.directory).history_so_far()) for job in jobs]
    assert kept == [2, 1, 1]
    for seed, run in enumerate(fit_together(jobs, tiny)):
        assert_same_run(run, fit(tiny_network("gn", seed), tiny))


class SmallMemory:
    """Stands in for a GPU that has room for so many trainings: `method` fails in one too many."""

    def __init__(self, monkeypatch, room, method="prepare", error=torch.OutOfMemoryError):
        self.opened, open_now = [], set()
        prepare, close, fails = CpuEngine.prepare, CpuEngine.close, getattr(CpuEngine, method)

        def opening(engine):
            open_now.add(engine)
            self.opened.append(len(open_now))
            return failing(engine) if method == "prepare" else prepare(engine)

        def failing(engine, *arguments):
            if len(open_now) > room and (method == "prepare" or engine.epoch == 1):
                raise error("MPS backend out of memory (MPS allocated: 18.13 GB)")
            return fails(engine, *arguments)

        def closing(engine):
            open_now.discard(engine)
            close(engine)

        monkeypatch.setattr(CpuEngine, method, failing)
        monkeypatch.setattr(CpuEngine, "prepare", opening)
        monkeypatch.setattr(CpuEngine, "close", closing)


@pytest.mark.parametrize("method", ["prepare", "collect"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])  # CUDA's and Apple's
@pytest.mark.parametrize("room", [1, 2])
def test_where_memory_is_short_fewer_are_trained_at_once(
    method, error, room, tiny, tiny_network, monkeypatch
):
    expected = [fit(tiny_network("gn", seed), tiny) for seed in range(3)]
    memory = SmallMemory(monkeypatch, room, method, error)
    runs = fit_together(three_jobs(tiny_network), tiny)
    for run, alone in zip(runs, expected, strict=True):
        assert_same_run(run, alone)
    assert memory.opened[0] == 1
    assert len(memory.opened) > 3


def test_one_that_is_too_large_by_itself_is_named(tiny, tiny_network, tmp_path, monkeypatch):
    jobs = three_jobs(tiny_network, tmp_path)

    def prepare(engine):
        if engine.network is jobs[1].build():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return ""

    monkeypatch.setattr(CpuEngine, "prepare", prepare)
    with pytest.raises(RuntimeError, match=r"too small for number 1 in batches of 16: use a small"):
        fit_together(jobs, tiny)
    finished = [RunFolder(job.directory).is_finished() for job in jobs]
    assert finished == [True, False, True]


@pytest.mark.parametrize(("accuracy", "warned"), [(0.95, 1), (0.965, 0), (1.0, 0)])
def test_chance_is_that_of_the_most_frequent_class(tiny, recwarn, accuracy, warned):
    labels = torch.zeros_like(tiny.train_labels)
    labels[:5] = 1  # 91 of 96 are of class 0: 0.948
    history = [{"train_accuracy": accuracy}] * 5
    warn_if_at_chance(job_of(None, label="it"), history, replace(tiny, train_labels=labels))
    assert len(recwarn) == warned


def test_to_ask_whether_a_run_is_done_changes_nothing(tiny, tiny_network, tmp_path):
    recipe = RECIPE.replace(epochs=1, dtype="float64")
    network = tiny_network()
    job = job_of(network, recipe, tmp_path).identified(tiny, torch.device("cpu"))
    assert job.find(tiny, torch.device("cpu")) is None
    fit(tiny_network(), tiny, recipe, tmp_path)
    assert network.training
    assert {(w.device.type, w.dtype) for w in network.parameters()} == {("cpu", torch.float32)}
    with pytest.raises(ValueError, match="'float64' is not available on device 'mps'"):
        job.identified(tiny, torch.device("mps"))


def test_two_trainings_of_one_process_in_one_folder_wait_for_each_other(
    tiny, tiny_network, tmp_path, capfd
):
    jobs = [job_of(tiny_network(seed=seed), RECIPE, tmp_path / "run") for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"two networks would be kept in .*run: give each its"):
        fit_together(jobs, tiny)
    runs, folder = [], tmp_path / "run"
    thread = threading.Thread(
        target=lambda: runs.append(fit(tiny_network(), tiny, directory=folder))
    )
    with locked(folder):
        with ThreadPoolExecutor() as other, pytest.raises(InUse):
            other.submit(remove_runs, folder).result()
        thread.start()
        said = ""
        while "waiting" not in said and thread.is_alive():
            said += capfd.readouterr().err
        assert runs == []
    thread.join()
    assert len(runs) == 1
