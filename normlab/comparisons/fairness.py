"""What sets variants apart beside their normalization, and whether they say so."""

from collections.abc import Iterator
from dataclasses import dataclass

from normlab.assignments import Variant
from normlab.experiment import Results
from normlab.history import Run
from normlab.penalties import WEIGHT_LAYERS
from normlab.recipes import DTYPES
from normlab.runs.identity import weights_digest
from normlab.runs.jobs import build_variant
from normlab.support.checks import check_instance

# Where variants may differ without a word: it is what they are compared for. "layers" is the digest
# of a module of one's own, norms included.
_OF_THE_NORM = {"norm", "groups", "layers", "code"}


@dataclass(frozen=True)
class Finding:
    """One thing in which variants differ, or in which some pass a limit of the assignment.

    Args:
        what: "parameters", "l1", "images seen", ….
        values: it, by label, for the variants concerned.
        declared: whether all variants agree that do not name it, in `changes` or `declares`.
        limit: what the assignment allows, where that is passed.
    """

    what: str
    values: dict[str, object]
    declared: bool = False
    limit: int | None = None

    def __str__(self) -> str:
        values = "; ".join(f"{label} {_shown(value)}" for label, value in self.values.items())
        if self.limit is not None:
            return f"{self.what}: over the limit of {self.limit:,}: {values}"
        return f"{self.what}: {'declared' if self.declared else 'NOT declared'}: {values}"


def check_fair(results: Results) -> list[Finding]:
    """What differs between the variants beside their norm, and limits that are passed.

    Looked at are the networks and their numbers of parameters, all fields of the recipes, the
    epochs that were trained, which images were seen and how many, the seeds, and the initial
    weights of the filters. An empty list says that the norm is all there is between them.
    """
    check_instance(results, Results, "results", "nl.run_assignment(…) gives them")
    variants = [v for v in results.assignment.variants if v.label in results.runs]
    facts = {variant.label: _facts(results, variant) for variant in variants}
    return [*differing(facts, variants), *limits(results)]


def differing(facts: dict[str, dict], variants: list[Variant]) -> list[Finding]:
    """Where the facts of variants, by their labels, are not the same."""
    found = []
    for what in dict.fromkeys(name for some in facts.values() for name in some):
        values = {label: some.get(what) for label, some in facts.items()}
        if any(value != values[variants[0].label] for value in values.values()):
            found.append(Finding(what, values, declared=_is_declared(what, values, variants)))
    return found


def _facts(results: Results, variant: Variant) -> dict[str, object]:
    runs = results.runs[variant.label]
    filters = ({"initial filters": _initial_filters(results, variant, run)} for run in runs)
    told = [facts_of(run.identity, len(run.history)) for run in runs]
    return facts_of_seeds([some | more for some, more in zip(told, filters, strict=True)])


def facts_of_seeds(each: list[dict]) -> dict[str, object]:
    """What could make a difference, by name; what differs between the seeds as a list."""
    facts: dict[str, object] = {"seeds": sorted(some["seed"] for some in each)}
    for name in (name for name in each[0] if name != "seed"):
        values = [some.get(name) for some in each]
        facts[name] = values[0] if all(value == values[0] for value in values) else values
    return facts


def facts_of(about: dict, epochs: int) -> dict[str, object]:
    """What the identity of a run tells, beside its norm, that could make a difference."""
    network = {k: v for k, v in about["network"].items() if k not in _OF_THE_NORM}
    if "program" in network:  # of a class of one's own, whose name is told
        network["class"] += f" ({network.pop('program')[:8]})"
    return {
        "parameters": about["parameters"],
        **network,
        **about["recipe"],
        "epochs": epochs,
        "images seen": epochs * about["data"]["train_images"],
        "images": about["data"]["fingerprint"][:8],
    }


def _initial_filters(results: Results, variant: Variant, run: Run) -> str:
    """The digest of the run's filters, if it began as the assignment begins it.

    Filters are the weights of convolutions and linear layers, without those of shortcuts, which
    only some variants have.
    """
    network = build_variant(results.assignment, variant, results.data, seed=run.recipe.seed)
    network.to(DTYPES[run.recipe.dtype])
    if run.identity["initial_weights"] != weights_digest(network.state_dict()):
        return "not the assignment's"
    layers = (layer for name, layer in network.named_modules() if "shortcut" not in name)
    weights = [layer.weight for layer in layers if isinstance(layer, WEIGHT_LAYERS)]
    return weights_digest({str(n): weight for n, weight in enumerate(weights)})[:8]


def _is_declared(what: str, values: dict[str, object], variants: list[Variant]) -> bool:
    """Whether all who do not say that they change it have the same."""
    if what == "skip":
        return True
    variants = [variant for variant in variants if what not in variant.declares]
    if what == "parameters":  # skips have parameters: only without them must all have as many
        kinds = {variant.skip: set() for variant in variants}
        for variant in variants:
            kinds[variant.skip].add(str(values[variant.label]))
        return all(len(counts) == 1 for counts in kinds.values())
    name = "epochs" if what == "images seen" else what
    return len({str(values[v.label]) for v in variants if name not in v.changes}) <= 1


def limits(results: Results) -> Iterator[Finding]:
    """What is beyond the assignment's limits."""
    kinds = {"parameters": lambda run: run.parameters, "epochs": lambda run: len(run.history)}
    for what, limit in results.assignment.limits.items():
        counts = {label: max(map(kinds[what], runs)) for label, runs in results.runs.items()}
        if over := {label: count for label, count in counts.items() if count > limit}:
            yield Finding(what, over, limit=limit)


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
