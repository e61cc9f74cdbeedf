"""What a run is, by which it is found again and told from every other one; and where it comes from.

An identity says what is computed: network, recipe, data. A provenance says where, when and with
which versions; it does not change what a run is.
"""

import ast
import hashlib
import inspect
import json
import platform
import re
import textwrap
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

from normlab.data import Dataset
from normlab.model import Network, build_network
from normlab.norms import NORMS
from normlab.recipes import DTYPES, OPEN_ENDED, Recipe
from normlab.runs.probe import are_apart, probe
from normlab.support.module_state import with_gradient_hooks
from normlab.support.summaries import count_parameters

# An identity names all of these. A field that `Recipe` or `build_network` gets later is named only
# where it is not at its default: so kept runs, and the digests in tables, stay what they are.
RECIPE_FIELDS = (
    *("epochs", "batch_size", "optimizer", "lr", "momentum", "nesterov", "weight_decay"),
    *("centred", "schedule", "l1", "label_smoothing", "augment", "dtype", "seed"),
)
NETWORK_ARGUMENTS = ("name", "norm", "groups", "dropout", "skip", "classes", "input_shape")
LOGITS = "logits_by_drawn_weights"  # those of `probe`
# Identities of earlier versions lack these; some have "logits", by the weights at the beginning.
# The last one is there of networks of one's own only.
OPTIONAL = ("frozen", "gradient_hooks", "logits", LOGITS, "numbers")


def identity(network: nn.Module, data: Dataset, recipe: Recipe) -> dict:
    """What a run computes, as JSON can hold it.

    Of hooks of gradients it tells where they are, not what they do: no backward pass is tried.
    """
    weights, dtype = list(network.named_parameters()), DTYPES[recipe.dtype]
    state = {  # as it is trained; whole numbers stay such
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    about = {
        "recipe": _named("recipe", recipe.as_dict(), RECIPE_FIELDS),
        "network": _describe(network),
        "parameters": count_parameters(network),
        "initial_weights": weights_digest(state),
        "frozen": [name for name, weight in weights if not weight.requires_grad],
        "gradient_hooks": with_gradient_hooks((*network.named_modules(), *weights)),
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "train_images": len(data.train_images),
            f"{data.test_name}_images": len(data.test_images),
        },
        LOGITS: probe(network, data.input_shape, dtype),
    }
    if "class" in about["network"]:
        about["numbers"] = _numbers(network)
    return about


def digest_of(identity: dict) -> str:
    """Twelve hexadecimal digits that differ between runs that differ.

    They leave out the logits, which are compared with a tolerance: two runs that differ in these
    alone have the same digits, and the second one is refused in the folder of the first.
    """
    left_out = {"logits", LOGITS, "numbers"}
    covered = {k: v for k, v in identity.items() if k not in left_out and v != []}
    covered["network"] = {k: v for k, v in covered["network"].items() if k != "program"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:12]


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes and values of a state dict, wherever its tensors are."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def recipe_in(identity: dict) -> Recipe:
    """The recipe of a kept run, without the fields that this version does not know."""
    known = Recipe.__dataclass_fields__
    return Recipe(**{k: v for k, v in identity["recipe"].items() if k in known})


# --- networks ---------------------------------------------------------------------------------


def _describe(network: nn.Module) -> dict:
    """The arguments that build the network, or what there is to know of one of one's own."""
    arguments = network.description if isinstance(network, Network) else {"norm": None}
    # With a norm of one's own, or a layer changed, the arguments do not build this network.
    if arguments["norm"] in NORMS and repr(build_network(**arguments, seed=0)) == repr(network):
        return _named("network", json.loads(json.dumps(arguments)), NETWORK_ARGUMENTS)
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(network))
    kinds = {type(layer) for layer in network.modules()}
    own = list(filter(is_own, kinds))
    sources = sorted(map(_sources, own))
    program = "".join(_program(text) for texts in sources for text in texts)
    program += " ".join(sorted(text for kind in own for text in _constants(kind)))
    # "code" is the text as it is, which is all that kept runs of earlier versions tell.
    texts = {"layers": layers, "code": "".join(map("".join, sources)), "program": program}
    digests = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}
    return {"class": type(network).__name__} | digests


def _sources(thing: type | Callable) -> list[str]:
    """The source of a class or function; of a class without a file that of its methods, or code."""
    try:
        return [inspect.getsource(thing)]
    except (OSError, TypeError):
        if code := getattr(thing, "__code__", None):
            constants = [value for value in code.co_consts if not inspect.iscode(value)]
            return [f"{code.co_name} {code.co_code.hex()} {code.co_names} {constants}"]
        methods = filter(inspect.isfunction, vars(thing).values())
        return [thing.__qualname__, *(text for each in methods for text in _sources(each))]


def _program(source: str) -> str:
    """What a source says, without comments, docstrings and how it is laid out."""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:  # of what is no source
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _numbers(network: nn.Module) -> dict[str, float]:
    """The numbers that layers of one's own hold: the size of a noise does not show in logits."""
    own = {path: layer for path, layer in network.named_modules() if is_own(type(layer))}
    held = ((f"{path}.{name}", value) for path, o in own.items() for name, value in vars(o).items())
    found = {path.lstrip("."): v for path, v in held if isinstance(v, int | float)}
    return {path: value for path, value in found.items() if path.split(".")[-1] != "training"}


def is_own(kind: type) -> bool:
    """Whether a class is neither torch's nor normlab's."""
    return kind.__module__.split(".")[0] not in ("torch", "normlab")


def _constants(kind: type) -> list[str]:
    """The global numbers and texts that the methods of a class name, with their values."""
    methods = filter(inspect.isfunction, vars(kind).values())
    names = (
        (name, each.__globals__.get(name)) for each in methods for name in each.__code__.co_names
    )
    return sorted({f"{name} = {v!r}" for name, v in names if isinstance(v, int | float | str)})


# --- differences ------------------------------------------------------------------------------


def differences(kept: dict, wanted: dict, where: str = "") -> list[str]:
    """What differs between the identities of a kept run and of one to be trained, a phrase each.

    A field of the recipe, or an argument of `build_network`, that only one of them names counts as
    its default in the other; what only one of them tells of a network of one's own, or of logits,
    is no difference. Logits may differ by `LOGITS_APART`.

    Args:
        where: the key under which both lie in larger dicts, with a dot.
    """
    found = []
    both = kept.keys() & wanted.keys()
    for key in sorted((kept.keys() | wanted.keys()) - (set(OPTIONAL) - both)):
        one, other = kept.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(*_comparable(key, one, other), f"{where}{key}.")
        elif one != other and ("digest" in key or len(str(one)) > 60):
            found.append(f"{where}{key} differs")
        elif one != other:
            found.append(f"{where}{key} is {one!r} there and {other!r} here")
    return found


def is_beginning(kept: dict, wanted: dict) -> bool:
    """Whether the kept training is the wanted one with fewer epochs, at rates that know of none."""
    recipe, epochs = kept.get("recipe"), wanted["recipe"]["epochs"]
    if wanted["recipe"]["schedule"] not in OPEN_ENDED or not isinstance(recipe, dict):
        return False
    fewer = isinstance(recipe.get("epochs"), int) and recipe["epochs"] < epochs
    return fewer and not differences(kept | {"recipe": recipe | {"epochs": epochs}}, wanted)


def _comparable(part: str, kept: dict, wanted: dict) -> tuple[dict, dict]:
    """Two parts of identities with the same fields, of which those count that are not equal."""
    both = kept.keys() & wanted.keys()
    if part == "recipe" or (part == "network" and "name" in both):
        # Kept values never go into a recipe or a network: they may be unknown here, or damaged. A
        # field that this version does not know counts only where it is switched on.
        wanted = _completed(part, wanted)
        usual = _completed(part, {name: wanted[name] for name in wanted.keys() & kept.keys()})
        return usual | {k: v for k, v in kept.items() if k in wanted or v}, wanted
    if part == LOGITS:
        both = {mode for mode in both if are_apart(kept[mode], wanted[mode])}
    elif part == "network" and "class" in both:
        both = both - {"code"} if "program" in both else both
    elif part != "numbers":
        return kept, wanted
    return {name: kept[name] for name in both}, {name: wanted[name] for name in both}


def _completed(part: str, named: dict) -> dict:
    """All fields of the recipe, or arguments of the network, of which only some are `named`."""
    if part == "recipe":
        return named | recipe_in({"recipe": named}).as_dict()
    return json.loads(json.dumps(build_network(**named, seed=0).description))


def _named(part: str, values: dict, always: tuple[str, ...]) -> dict:
    """The values that are always named, and of the others those that are not their defaults."""
    named = {name: values[name] for name in always}
    usual = _completed(part, named)
    return named | {k: v for k, v in values.items() if k in named or v != usual[k]}


# --- provenance -------------------------------------------------------------------------------


def provenance(data: Dataset, device: torch.device) -> dict:
    """Where, when and with which versions a run is trained."""
    from normlab import __version__

    return {
        "normlab": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "data_source": data.source,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
