"""The worked example as a spreadsheet whose formulas compute every mean, variance and value."""

from __future__ import annotations

import io
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

# Rows of the first number, of the first mean, and, on the first sheet, of channel 1's scale (column
# B) and shift (column C). All sheets have the batch in the same cells.
TOP, TABLE, LEARNED = 7, 18, 23


def _cells(columns: str) -> np.ndarray:
    """The names of a batch's cells in these columns, (N, C, H, W)."""
    table = [[f"{column}{TOP + row}" for column in columns] for row in range(N * H)]
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
    book, content = Workbook(), io.BytesIO()
    book.remove(book.active)
    _write_numbers(book)
    for name, (kind, groups) in SHEETS.items():
        _write_norm(book, name, kind, groups)
    with atomic_write(path) as aside:
        book.save(content)  # by way of temporary files, for which there must be room too
        aside.write_bytes(content.getvalue())
    return path


def _write_numbers(book: Workbook) -> None:
    """The numbers that the reader may change."""
    title = "A batch of four images. Change any yellow cell: all other sheets follow."
    sheet = _new_sheet(book, "Batch", title)
    _write_batch(sheet, BEFORE, "x", example_batch().int().flatten().tolist())
    added = "is added to every variance, so that nothing is divided by 0"
    weight = "is the weight of the new batch in BN's running statistics"
    rows = {TABLE: ["ε", EPSILON, added], TABLE + 1: ["momentum", 0.1, weight]}
    rows |= {LEARNED - 1: ["", "scale", "shift"]}
    rows |= {LEARNED + channel: [f"channel {channel + 1}", 1, 0] for channel in range(C)}
    for row, values in rows.items():
        _write_row(sheet, row, values)
    learned = [f"{column}{LEARNED + channel}" for column in "BC" for channel in range(C)]
    _paint(sheet, [*BEFORE.flat, f"B{TABLE}", f"B{TABLE + 1}", *learned], "#FFF7CC")


def _write_norm(book: Workbook, name: str, kind: str, groups: int) -> None:
    """Input and result side by side in the colours of their sets, and a row for each set."""
    over = ", ".join(NORMS[kind].averaged)
    title = f"{heading(NORMS[kind], groups)}: cells of one colour share a mean, over {over}"
    sheet, after = _new_sheet(book, name, title), []
    sets = shared_statistics(make_norm(kind, C, groups=groups), SHAPE).numpy()
    for place, cell in np.ndenumerate(BEFORE):
        row, learned = TABLE + sets[place], LEARNED + place[1]
        after.append(f"=({cell}-$D${row})/$F${row}*Batch!$B${learned}+Batch!$C${learned}")
    _write_batch(sheet, BEFORE, "x, from the first sheet", [f"=Batch!{x}" for x in BEFORE.flat])
    _write_batch(sheet, AFTER, "(x − mean) / √(variance + ε) · scale + shift", after)
    formulas = STATISTICS | (KEPT if "N" in NORMS[kind].averaged else {})
    _write_row(sheet, TABLE - 1, ["", *formulas])
    for number, colour in enumerate(tints(sets.max() + 1)):
        row, x, y = TABLE + number, BEFORE[sets == number], AFTER[sets == number]
        places = {"x": f"{x[0]}:{x[-1]}", "y": f"{y[0]}:{y[-1]}", "row": row}  # rectangles
        values = [formula.format(**places) for formula in formulas.values()]
        _write_row(sheet, row, [_name(sets == number), *values])
        _paint(sheet, [*x, *y, f"A{row}"], colour)
        for cell in (*y, *(f"{column}{row}" for column in "DEFGHIJK")):
            sheet[cell].number_format = "0.000"


def _name(chosen: np.ndarray) -> str:
    """The images and channels of a set (N, C, H, W) in words, but for those that it has all of."""
    words = []
    for word, axes in (("image", (1, 2, 3)), ("channel", (0, 2, 3))):
        found = [str(number + 1) for number in chosen.any(axes).nonzero()[0]]
        if len(found) < 4:
            words.append(f"{word}{'s' * (len(found) > 1)} {' and '.join(found)}")
    return ", ".join(words)


def _new_sheet(book: Workbook, name: str, title: str) -> Worksheet:
    from openpyxl.styles import Font

    sheet = book.create_sheet(name)
    sheet["A1"] = title
    sheet["A1"].font = Font(bold=True, size=14)
    sheet.page_setup.orientation = "landscape"
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    for letter in "ABCDEFGHIJK":
        sheet.column_dimensions[letter].width = 24 if letter == "A" else 16
    return sheet


def _write_batch(sheet: Worksheet, cells: np.ndarray, title: str, values: list) -> None:
    """The values of a batch in the order of its cells, and which image and channel they are of."""
    for cell, value in zip(cells.flat, values, strict=True):
        sheet[cell] = value
    for number in range(4):
        sheet[cells[0, number, 0, 0]].offset(row=-1).value = f"channel {number + 1}"
        sheet[cells[number, 0, 0, 0]].offset(column=-1).value = f"image {number + 1}"
    sheet[cells[0, 0, 0, 0]].offset(row=-2).value = title


def _write_row(sheet: Worksheet, row: int, values: list) -> None:
    for column, value in enumerate(values, start=1):
        sheet.cell(row, column, value)


def _paint(sheet: Worksheet, cells: Iterable[str], colour: str) -> None:
    from openpyxl.styles import PatternFill

    for cell in cells:
        sheet[cell].fill = PatternFill("solid", fgColor=colour[1:])
