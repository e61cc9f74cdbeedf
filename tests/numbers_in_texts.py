"""Numbers in the sentences of README and notebooks, and what they may come from."""

import math
import re
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w.,^])\d+(?:,\d{3})*(?:\.\d+)?(?![\w.]*\w)")
PRINTED = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
INTERVAL = re.compile(r"(\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)")


def value_of(number: str) -> float:
    return float(number.replace(",", ""))


def numbers_printed(text: str) -> list[str]:
    """The numbers of an output, and in percent those that may be shares."""
    found = PRINTED.findall(text)
    shares = [n for n in found if re.fullmatch(r"[01]\.\d\d+", n) and value_of(n) <= 1]
    return found + [f"{100 * value_of(n):.{len(n) - 4}f}" for n in shares]


def is_rounded(number: str, printed: str) -> bool:
    """Whether that is what was printed, with as many digits or fewer."""
    digits, there = (len(each.partition(".")[2]) for each in (number, printed))
    enough = digits <= there or "e" in printed
    apart = abs(value_of(printed) - value_of(number))
    return enough and apart <= 0.5 * 10**-digits + 1e-9  # halves go up or down


def sentences(text: str) -> list[str]:
    """Those without a year, which is of a citation, and without code, links and filled places.

    Nor with a notebook's number, which is its name.
    """
    text = re.sub(r"<!-- normlab: .+? -->.*?<!-- / -->", "", text, flags=re.S)
    text = re.sub(r"\[\d+\]\(\w+\.ipynb[^)]*\)", " ", text)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|</?[a-z][^<>]*>|\$[^$]*\$", " ", text, flags=re.S)
    text = re.sub(r"[Nn]otebook \d+", " ", text)
    return [s for s in re.split(r"(?<=[.:;])\s", text) if not re.search(r"\b(19|20)\d\d\b", s)]


def numbers_said(text: str) -> list[str]:
    """The numbers of a text that stand for something measured."""
    return [
        found.group()
        for sentence in sentences(text)
        for found in NUMBER.finditer(sentence)
        if "." in found.group()
        or value_of(found.group()) > 10
        or re.match(r"\s(%|points)", sentence[found.end() :])
    ]


def is_among(number: str, printed: Iterable[str]) -> bool:
    """Whether that is one of these numbers, rounded."""
    return any(is_rounded(number, each) for each in printed)


def changed(number: str) -> set[str]:
    """What a slip makes of the number: its last digits swapped, the last one higher by one."""
    swapped = re.sub(r"(\d)(\D?)(?!\1)(\d)$", r"\3\2\1", number)
    return {swapped, f"{number[:-1]}{(int(number[-1]) + 1) % 10}"} - {number}


def holds(number: str, reason: str) -> bool:
    """Whether a formula ("= …") gives the number, a file ("in …") has it; others are words."""
    kind, _, what = reason.partition(" ")
    if kind == "in":
        return is_among(number, PRINTED.findall((ROOT / what).read_text(encoding="utf-8")))
    return kind != "=" or is_rounded(number, exactly(eval(what, dict(vars(math)))))


def exactly(value: float) -> str:
    """The number with more digits than any text has."""
    return f"{value:.6f}"


def following_from(kept: dict) -> list[str]:
    """What a reader can work out from results: differences, spreads, mistakes to the hundred."""
    means = [100 * variant["test_accuracy"] for variant in kept["variants"]]
    told = [100 * variant["reported"] for variant in kept["variants"] if variant["reported"]]
    found = [variant["parameters"] for variant in kept["variants"]] + means + told
    found += [abs(a - b) for values in (means, told) for a, b in combinations(values, 2)]
    for runs in (variant["runs"] for variant in kept["variants"]):
        accuracies = [100 * run["test_accuracy"] for run in runs]
        found.append(max(accuracies) - min(accuracies))
        mistakes = [round(kept["data"]["test_images"] * (1 - a / 100)) for a in accuracies]
        found += [*mistakes, *(round(count, -2) for count in mistakes)]
    return [exactly(value) for value in found]
