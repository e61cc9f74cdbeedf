"""The worked example as a spreadsheet whose formulas compute every mean, variance and value."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from normlab.lessons.by_hand import example_batch
from normlab.lessons.diagrams import heading, tints
from normlab.lessons.sharing import shared_statistics
from normlab.norms import EPSILON, NORMS, make_norm
from normlab.support.files import atomic_write, user_path

if TYPE_CHECKING:
    from openpyxl import Workbook
    from openpyxl.worksheet.worksheet import Worksheet

SHEETS = {  # by name: the norm and its groups
    **{"BN": ("bn", 1), "LN": ("ln", 1), "IN": ("in", 1)},
    **{f"GN {groups} group{'s' * (groups > 1)}": ("gn", groups) for groups in (1, 2, 4)},
}
N, C, H, W = SHAPE = (4, 4, 2, 2)

# Rows of the first mean, and, on the first sheet, of channel 1's scale (column B) and shift (C).
TABLE, LEARNED = 18, 23


def _cells(columns: str) -> np.ndarray:
    """The names of a batch's cells in these columns, (N, C, H, W), the same on all sheets."""
    table = [[f"{column}{row}" for column in columns] for row in range(7, 7 + N * H)]
    return np.array(table).reshape(N, H, C, W).transpose(0, 2, 1, 3)


BEFORE, AFTER = _cells("CDEFGHIJ"), _cells("NOPQRSTU")

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
    "variance over n − 1": "=VAR({x})",
    "running mean": "=(1-Batch!$B$19)*0+Batch!$B$19*D{row}",
    "running variance": "=(1-Batch!$B$19)*1+Batch!$B$19*I{row}",
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
    path = user_path(path)
    if path.suffix.lower() != ".xlsx":
        raise ValueError(f"the spreadsheet's name must end in .xlsx, not {path.name!r}")
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise ImportError("to_spreadsheet needs openpyxl: pip install openpyxl") from error
    book = Workbook()
    book.remove(book.active)
    _write_numbers(book)
    for name, (kind, groups) in SHEETS.items():
        _write_norm(book, name, kind, groups)
    with atomic_write(path) as aside:
        book.save(aside)
    return path


def _write_numbers(book: Workbook) -> None:
    """The numbers that the reader may change."""
    title = "A batch of four images. Change any yellow cell: all other sheets follow."
    cells = dict(zip(BEFORE.flat, example_batch().int().flatten().tolist(), strict=True))
    cells |= {"A18": "ε", "B18": EPSILON}
    cells |= {"C18": "is added to every variance, so that nothing is divided by 0"}
    cells |= {"A19": "momentum", "B19": 0.1}
    cells |= {"C19": "is the weight of the new batch in BN's running statistics"}
    cells |= {f"B{LEARNED - 1}": "scale", f"C{LEARNED - 1}": "shift"}
    for channel, row in enumerate(range(LEARNED, LEARNED + C), start=1):
        cells |= {f"A{row}": f"channel {channel}", f"B{row}": 1, f"C{row}": 0}
    sheet = _write(book, "Batch", title, cells)
    _paint(sheet, [cell for cell, value in cells.items() if not isinstance(value, str)], "#FFF7CC")


def _write_norm(book: Workbook, name: str, kind: str, groups: int) -> None:
    """Input and result side by side in the colours of their sets, and a row for each set."""
    over = ", ".join(NORMS[kind].averaged)
    title = f"{heading(NORMS[kind], groups)}: cells of one colour share a mean, over {over}"
    cells = {"C5": "x, from the first sheet", "N5": "(x − mean) / √(variance + ε) · scale + shift"}
    sets = shared_statistics(make_norm(kind, C, groups=groups), SHAPE).numpy()
    for place, cell in np.ndenumerate(BEFORE):
        row, learned = TABLE + sets[place], LEARNED + place[1]
        normalised = f"({cell}-$D${row})/$F${row}*Batch!$B${learned}+Batch!$C${learned}"
        cells |= {cell: f"=Batch!{cell}", AFTER[place]: f"={normalised}"}
    formulas = STATISTICS | (KEPT if "N" in NORMS[kind].averaged else {})
    for number in range(sets.max() + 1):
        row, x, y = TABLE + number, BEFORE[sets == number], AFTER[sets == number]
        places = {"x": f"{x[0]}:{x[-1]}", "y": f"{y[0]}:{y[-1]}", "row": row}  # rectangles
        cells[f"A{row}"] = _name(sets == number)
        for column, (what, formula) in zip("BCDEFGHIJK", formulas.items(), strict=False):
            cells |= {f"{column}{TABLE - 1}": what, f"{column}{row}": formula.format(**places)}
    sheet = _write(book, name, title, cells)
    for number, colour in enumerate(tints(sets.max() + 1)):
        chosen, row = sets == number, TABLE + number
        _paint(sheet, [*BEFORE[chosen], *AFTER[chosen], f"A{row}"], colour)
        for cell in (*AFTER[chosen], *(f"{column}{row}" for column in "DEFGHIJK")):
            sheet[cell].number_format = "0.000"


def _name(chosen: np.ndarray) -> str:
    """The images and channels of a set (N, C, H, W) in words, but for those that it has all of."""
    words = []
    for word, axes in (("image", (1, 2, 3)), ("channel", (0, 2, 3))):
        found = [str(number + 1) for number in chosen.any(axes).nonzero()[0]]
        if len(found) < 4:
            words.append(f"{word}{'s' * (len(found) > 1)} {' and '.join(found)}")
    return ", ".join(words)


def _write(book: Workbook, name: str, title: str, cells: dict[str, object]) -> Worksheet:
    """A sheet of these cells, and the numbers of the images and channels beside the batches."""
    from openpyxl.styles import Font

    sheet = book.create_sheet(name)
    sheet["A1"], sheet["A1"].font = title, Font(bold=True, size=14)
    sheet.page_setup.orientation = "landscape"
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    for letter in "ABCDEFGHIJK":
        sheet.column_dimensions[letter].width = 24 if letter == "A" else 16
    for cell, value in cells.items():
        sheet[cell] = value
    for batch, number in itertools.product((BEFORE, AFTER), range(4)):
        if batch[0, 0, 0, 0] in cells:
            sheet[batch[0, number, 0, 0]].offset(row=-1).value = f"channel {number + 1}"
            sheet[batch[number, 0, 0, 0]].offset(column=-1).value = f"image {number + 1}"
    return sheet


def _paint(sheet: Worksheet, cells: Iterable[str], colour: str) -> None:
    from openpyxl.styles import PatternFill

    for cell in cells:
        sheet[cell].fill = PatternFill("solid", fgColor=colour[1:])
