"""Compare batch, layer and group normalization on small convolutional networks.

    import normlab as nl

    data = nl.load_dataset("digits")
    network = nl.build_network("mnist-l1", norm="gn", seed=0)
    run = nl.fit(network, data, nl.Recipe(epochs=5))
    nl.plot_curves({"GN": run}, "test_accuracy")

The files of this folder, in the order in which one reads them:

    norms         make_norm, and the table of the kinds of normalization
    model         the networks of the assignments, with a norm to choose
    training      the optimisation step, and the loops that train and test for an epoch
    penalties     the L1 penalty
    data          Dataset: images as tensors, and batches of them
    augment       shift, flip, rotate: whole batches at once
    recipes       Recipe: how a network is trained
    optimizers    Muon, gradient centralization
    history       Run: what a training was, and what it gave; History, of a loop of one's own
    analysis      predictions, misclassified images, confusion
    plots         curves and matrices, from plain data
    images        grids of images
    assignments   the five assignments
    fitting       fit: a network, images and a recipe become a Run
    experiment    run_assignment: all variants and seeds
    cli           the command `normlab`

Behind six doors lies the machinery, which can be left alone:

    support       checks, files, seeds, devices, figures, and what the files above are built on
    datasets      where images come from: bundled, downloaded, folders of pictures
    engines       ways through an epoch that take the step of `training` faster; `doctor`
    runs          runs on disk, resumed, side by side in processes, on a cluster
    comparisons   intervals, fairness, sweeps, reports
    lessons       what single notebooks show, and checks of what students write

Names are imported when they are first used (PEP 562), so that the command can answer `--help`
without waiting for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "norms": "NORMS make_norm",
    "model": "NETWORKS Network build_network",
    "training": "EpochResult test_epoch train_epoch train_step",
    "penalties": "l1_penalty",
    "data": "Dataset",
    "augment": "AUGMENTATIONS",
    "recipes": "Recipe",
    "history": "History Run",
    "analysis": "Mistakes class_accuracy confusion_matrix find_common_mistakes find_mistakes "
    "predict",
    "plots": "plot_confusion plot_curves plot_loss_and_accuracy plot_panels",
    "images": "plot_mistakes plot_samples",
    "assignments": "ASSIGNMENTS Assignment Variant",
    "fitting": "fit",
    "experiment": "Results run_assignment",
    "comparisons.comparison": "Difference compare main_effects mcnemar plot_compare",
    "comparisons.fairness": "Finding check_fair",
    "comparisons.intervals": "Interval interval",
    "comparisons.report": "write_report",
    "comparisons.review": "review_runs",
    "comparisons.submissions": "as_submitted",
    "comparisons.sweep_plots": "plot_sweep",
    "comparisons.sweeps": "run_sweep",
    "datasets.loading": "load_dataset",
    "engines.doctor": "doctor",
    "lessons.by_hand": "batch_norm example_batch group_norm instance_norm layer_norm",
    "lessons.checking": "Checked",
    "lessons.diagrams": "plot_norm_axes plot_shared",
    "lessons.explorer": "explore_norm",
    "lessons.layer_table": "summary",
    "lessons.invariance": "Rescaled rescale_weights",
    "lessons.mistake_checks": "check_mistakes",
    "lessons.norm_checks": "check_norm",
    "lessons.range_test": "RateTest find_rate plot_rates",
    "lessons.sharing": "shared_statistics",
    "lessons.sparsity": "penalty_share small_weights",
    "lessons.spreadsheet": "to_spreadsheet",
    "lessons.training_checks": "check_loop check_penalty",
    "lessons.watch_plots": "plot_activations plot_watch",
    "lessons.watching": "Watch watch",
    "support.figures": "save_figure",
    "support.grad_cam": "grad_cam",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'normlab' has no attribute {name!r}")
    value = getattr(import_module(f"normlab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
