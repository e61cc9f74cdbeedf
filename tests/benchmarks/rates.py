"""How well `find_rate` suggests: `python -m tests.benchmarks.rates ASSIGNMENT`.

For each variant of an assignment: the suggestion, the processor's seconds it took, and the last
epoch's test accuracy by the assignment's recipe, with its own rate and with the suggested one.
"""

import argparse
import time

import normlab as nl
from normlab.datasets.loading import load_assignment_data


def main() -> None:
    """Prints a Markdown table, a row for each variant."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rates", description=__doc__)
    parser.add_argument("assignment", choices=nl.ASSIGNMENTS)
    parser.add_argument("--dataset", help="another than the assignment's, such as digits")
    parser.add_argument("--data-root")
    parser.add_argument("--images", type=int, help="to train on, and half as many to test on")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    assignment = nl.ASSIGNMENTS[options.assignment]
    data = load_assignment_data(assignment, options.dataset, options.data_root)
    if options.images:
        data = data.subset(options.images, options.images // 2)
    print(f"{data.source}, {options.epochs} epochs, test accuracy of the last (%)\n")
    print("| variant | suggested | seconds | tuned rate | accuracy | with the suggested |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for variant in assignment.variants:
        print(_row(assignment, variant, data, options.epochs), flush=True)


def _row(assignment: nl.Assignment, variant: nl.Variant, data: nl.Dataset, epochs: int) -> str:
    recipe = assignment.recipe_for(variant, seed=0, epochs=epochs)

    def network() -> nl.Network:
        return nl.build_network(
            assignment.network,
            variant.norm,
            groups=variant.groups,
            skip=variant.skip,
            dropout=assignment.dropout,
            input_shape=data.input_shape,
            seed=0,
        )

    started = time.process_time()
    rate = nl.find_rate(network(), data, recipe, device="cpu").suggestion
    seconds = time.process_time() - started
    accuracies = [
        nl.fit(network(), data, recipe.replace(lr=lr), device="cpu", progress=False).last
        for lr in (recipe.lr, rate)
    ]
    tuned, suggested = (f"{100 * last['test_accuracy']:.2f}" for last in accuracies)
    return f"| {variant.label} | {rate} | {seconds:.0f} | {recipe.lr} | {tuned} | {suggested} |"


if __name__ == "__main__":
    main()
