"""What figures' alternative texts say of intervals and zero, against what their cells print.

Understood are "all three intervals contain zero", "the two with BN lie above zero, the other four
contain it", "only that of GN and LN excludes zero, in favour of LN", and the like.
"""

import re
from collections import Counter
from typing import NamedTuple

VERDICT = re.compile(
    r"^(?P<first>.+?) [−-] (?P<second>.+?) = (?P<sign>[+−-])[\d.]+ ± [\d.]+ .*?"
    r": (?P<no>not )?significantly different",
    re.MULTILINE,
)
CLAIM = re.compile(
    r"(?P<who>[^;:,.]*?)\b(?P<verb>contains?|excludes?|(?:lies?|is|are) (?:above|below)) "
    r"(?:zero|0|it)\b"
)
NUMBERS = {"no": 0, "none": 0, "neither": 0, "one": 1, "two": 2, "both": 2, "three": 3, "four": 4}
NUMBERS |= {"five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "fifteen": 15}


class Verdict(NamedTuple):
    """The outcome for a pair: what its interval does, and the one with the higher mean."""

    pair: set[str]
    where: str  # "contain", "above" or "below"
    ahead: str

    def agrees(self, kind: str) -> bool:
        return kind == self.where or (kind == "exclude" and self.where != "contain")


def verdicts(printed: str) -> list[Verdict]:
    """Those of lines without words before the pair, which a figure does not show."""
    found = []
    for line in VERDICT.finditer(printed):
        first, second = (line[part].strip("()") for part in ("first", "second"))
        above = line["sign"] == "+"
        where = "contain" if line["no"] else "above" if above else "below"
        if ": " not in first:
            found.append(Verdict({first, second}, where, first if above else second))
    return found


def false_claims(text: str, printed: str) -> list[str]:
    """What is wrong in an alternative text, of a cell that printed this."""
    outcomes, said, wrong = verdicts(printed), Counter(), []
    if re.search(r"\blevel with\b", text):
        return ["level with: no interval shows that two are equal"]
    if not outcomes or not re.search(r"\b(zero|0)\b", text):
        return []
    for claim in CLAIM.finditer(text):
        kind = claim["verb"].split()[-1].removesuffix("s")
        who, named = without_names(claim["who"], set().union(*(each.pair for each in outcomes)))
        number = number_in(who, claim["verb"], len(outcomes))
        if number is None:
            return [f"how many? {claim.group()}"]
        said[kind] += number
        if number == 1 and any(named == each.pair and not each.agrees(kind) for each in outcomes):
            wrong.append(claim.group())
    for kind, number in said.items():
        due = sum(each.agrees(kind) for each in outcomes)
        wrong += [] if number == due else [f"{kind}: {due}"]
    ahead = {each.ahead for each in outcomes if each.where != "contain"}
    favoured = re.findall(r"in favour of ([^;,.]+)", text)
    wrong += [f"in favour of {name}" for name in favoured if {name} != ahead]
    return wrong if said else [f"not understood; to be said as in {__name__}"]


def without_names(text: str, names: set[str]) -> tuple[str, set[str]]:
    """The text without the variants, which may have numbers in them, and those that were in it."""
    found = set()
    for name in sorted(names, key=len, reverse=True):
        text, times = re.subn(rf"(?<!\w){re.escape(name)}(?!\w)", " ", text)
        found |= {name} if times else set()
    return text, found


def number_in(who: str, verb: str, everything: int) -> int | None:
    """How many intervals a subject stands for, or None where it does not say."""
    words = re.sub(r"\b(of|in) (the|all) \w+", " ", who.lower()).split()
    numbers = [NUMBERS.get(word, word) for word in words if word in NUMBERS or word.isdigit()]
    numbers = [int(number) for number in numbers]
    if "all" in words and (not numbers or "but" in words):
        return everything - sum(numbers)
    if numbers:
        return numbers[0]
    return 1 if re.match(r"\w+s\b", verb) else None
