"""The worked example as a spreadsheet whose formulas compute every mean, variance and value."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from normlab.lessons.by_hand import example_batch
from normlab.lessons.diagrams import heading, tints
from normlab.lessons.sharing import shared_statistics
from normlab.norms import EPSILON, NORMS, make_norm
from normlab.support.files import atomic_write, user_path

if TYPE_CHECKING:
    from openpyxl.worksheet.worksheet import Worksheet
    from pandas import DataFrame, ExcelWriter

Place = tuple[int, int, int, int]  # image, channel, row, column

SHEETS = {  # by name: the norm and its groups
    **{"BN": ("bn", 1), "LN": ("ln", 1), "IN": ("in", 1)},
    **{f"GN {groups} group{'s' * (groups > 1)}": ("gn", groups) for groups in (1, 2, 4)},
}
SHAPE: Place = (4, 4, 2, 2)
PLACES = list(itertools.product(*map(range, SHAPE)))

# Where things stand; all sheets have the batch in the same cells.
BEFORE, AFTER, TOP = "CDEFGHIJ", "NOPQRSTU", 7  # columns of x and of its normalised values; row
TABLE, RUNNING = 18, 25  # row of the first mean, and of the first running mean
LEARNED = 23  # row of channel 1's scale (column B) and shift (column C) on the first sheet

# Of the cells x of a set, and of y, their normalised values; B18 is epsilon, B19 the momentum.
STATISTICS = {
    "sum": "=SUM({x})",
    "count": "=COUNT({x})",
    "mean": "=AVERAGE({x})",
    "variance": "=VARP({x})",  # divides by the count; older programs do not know its name VAR.P
    "√(variance + ε)": "=SQRT(E{row}+Batch!$B$18)",
    "mean after": "=ROUND(AVERAGE({y}),6)",
    "variance after": "=VARP({y})",
}
# What BN keeps for testing: running statistics, which start at 0 and 1, after this batch.
KEPT = {
    "mean": "=AVERAGE({x})",
    "variance over n − 1": "=VAR({x})",
    "running mean": "=(1-Batch!$B$19)*0+Batch!$B$19*B{row}",
    "running variance": "=(1-Batch!$B$19)*1+Batch!$B$19*C{row}",
}


def to_spreadsheet(path: str | Path) -> Path:
    """Writes the example worked out by hand as an .xlsx with live formulas, and returns its path.

    The first sheet holds the numbers of `example_batch`, epsilon, the momentum, and a scale and a
    shift for each channel, all to be changed; a sheet each for BN, LN, IN, and GN with 1, 2 and 4
    groups computes means, variances and normalised values from it.

    Args:
        path: of the file, ending in .xlsx; it is replaced as a whole or not at all.

    Raises `ImportError` where openpyxl is not installed, `ValueError` for another ending, `OSError`
    if the file cannot be written.
    """
    from pandas import ExcelWriter

    path = user_path(path)
    if path.suffix.lower() != ".xlsx":
        raise ValueError(f"the spreadsheet's name must end in .xlsx, not {path.name!r}")
    try:
        import openpyxl  # noqa: F401
    except ImportError as error:
        raise ImportError("to_spreadsheet needs openpyxl: pip install openpyxl") from error
    content = io.BytesIO()
    with atomic_write(path) as aside:
        with ExcelWriter(content, engine="openpyxl") as writer:
            _write_numbers(writer)
            for name, (kind, groups) in SHEETS.items():
                _write_norm(writer, name, kind, groups)
        aside.write_bytes(content.getvalue())
    return path


def _write_numbers(writer: ExcelWriter) -> None:
    """The numbers that the reader may change."""
    from pandas import DataFrame

    added = "is added to every variance, so that nothing is divided by 0"
    weight = "is the weight of the new batch in BN's running statistics"
    constants = DataFrame({"value": [EPSILON, 0.1], "": [added, weight]}, ["ε", "momentum"])
    learned = DataFrame({"scale": 1, "shift": 0}, [f"channel {c + 1}" for c in range(SHAPE[1])])
    numbers = _batch(example_batch().int().flatten().tolist())
    frames = {("A", TOP): numbers, ("A", TABLE): constants, ("A", LEARNED): learned}
    title = "A batch of four images. Change any yellow cell: all other sheets follow."
    sheet = _write(writer, "Batch", title, frames)
    cells = [*map(_at, PLACES), f"B{TABLE}", f"B{TABLE + 1}"]
    cells += [f"{column}{LEARNED + channel}" for column in "BC" for channel in range(SHAPE[1])]
    _paint(sheet, cells, "#FFF7CC")


def _write_norm(writer: ExcelWriter, name: str, kind: str, groups: int) -> None:
    """Input and result side by side in the colours of their sets, and a row for each set."""
    sets = shared_statistics(make_norm(kind, SHAPE[1], groups=groups), SHAPE)
    after = []
    for place, row in zip(PLACES, (TABLE + sets.flatten()).tolist(), strict=True):
        scale, shift = (f"Batch!${column}${LEARNED + place[1]}" for column in "BC")
        after.append(f"=({_at(place)}-$D${row})/$F${row}*{scale}+{shift}")
    members = [[place for place in PLACES if sets[place] == n] for n in range(int(sets.max()) + 1)]
    frames = {
        ("A", TOP): _batch([f"=Batch!{_at(place)}" for place in PLACES]),
        ("L", TOP): _batch(after),
        ("A", TABLE): _table(members, TABLE, STATISTICS),
    }
    if "N" in NORMS[kind].averaged:
        frames["A", RUNNING] = _table(members, RUNNING, KEPT)
    over = ", ".join(NORMS[kind].averaged)
    title = f"{heading(NORMS[kind], groups)}: cells of one colour share a mean, over {over}"
    sheet = _write(writer, name, title, frames)
    sheet["A3"], sheet["L3"] = (
        "x, from the first sheet",
        "(x − mean) / √(variance + ε) · scale + shift",
    )
    for row, (some, colour) in enumerate(zip(members, tints(len(members)), strict=True), TABLE):
        after = [_at(place, AFTER) for place in some]
        _paint(sheet, [*map(_at, some), *after, f"A{row}"], colour)
        for cell in (*after, *(f"{column}{row}" for column in "DEFGH")):
            sheet[cell].number_format = "0.000"


def _table(members: list[list[Place]], top: int, formulas: dict[str, str]) -> DataFrame:
    """A row for each set, from row `top` on."""
    from pandas import DataFrame

    rows = []
    for row, some in enumerate(members, start=top):  # of cells that form a rectangle, such as C7:D8
        x, y = (f"{_at(some[0], columns)}:{_at(some[-1], columns)}" for columns in (BEFORE, AFTER))
        rows.append([each.format(x=x, y=y, row=row) for each in formulas.values()])
    return DataFrame(rows, list(map(_name, members)), list(formulas))


def _at(place: Place, columns: str = BEFORE) -> str:
    """The cell of one number: (0, 0, 0, 0) is C7."""
    image, channel, row, column = place
    return f"{columns[2 * channel + column]}{TOP + 2 * image + row}"


def _name(members: list[Place]) -> str:
    """The images and channels of a set in words, but for those that it has all of."""
    words = []
    for axis, word in enumerate(("image", "channel")):
        found = sorted({str(place[axis] + 1) for place in members})
        if len(found) < SHAPE[axis]:
            words.append(f"{word}{'s' * (len(found) > 1)} {' and '.join(found)}")
    return ", ".join(words)


def _batch(values: list) -> DataFrame:
    """One value for each of `PLACES`, as a table with the images below and the channels beside."""
    from pandas import MultiIndex, Series

    names = ("image", "channel", "row", "column")
    axes = MultiIndex.from_tuples([[side + 1 for side in place] for place in PLACES], names=names)
    return Series(values, axes).unstack(["channel", "column"])  # noqa: PD010


def _write(writer: ExcelWriter, name: str, title: str, frames: dict) -> Worksheet:
    """A sheet of tables; the key of each is the place of its first row, without the headings."""
    from openpyxl.styles import Font

    for (column, row), frame in frames.items():
        headings = frame.columns.nlevels + (frame.columns.nlevels > 1)
        place = {"startrow": row - 1 - headings, "startcol": ord(column) - ord("A")}
        frame.to_excel(writer, sheet_name=name, **place)
    sheet = writer.sheets[name]
    sheet["A1"] = title
    sheet["A1"].font = Font(bold=True, size=14)
    sheet.page_setup.orientation = "landscape"
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    for letter in "ABCDEFGH":
        sheet.column_dimensions[letter].width = 24 if letter == "A" else 16
    return sheet


def _paint(sheet: Worksheet, cells: Iterable[str], colour: str) -> None:
    from openpyxl.styles import PatternFill

    for cell in cells:
        sheet[cell].fill = PatternFill("solid", fgColor=colour[1:])
