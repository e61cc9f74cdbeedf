"""The worked example as a spreadsheet whose formulas compute every mean, variance and value."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normlab.lessons.by_hand import example_batch
from normlab.lessons.diagrams import tints
from normlab.lessons.sharing import shared_statistics
from normlab.norms import EPSILON, NORMS, make_norm
from normlab.support.files import atomic_write, user_path

if TYPE_CHECKING:
    from openpyxl.cell import Cell
    from openpyxl.worksheet.worksheet import Worksheet

# A sheet for each: its name, the kind of norm, its groups.
SHEETS = (
    ("BN", "bn", 1),
    ("LN", "ln", 1),
    ("GN 1 group", "gn", 1),
    ("GN 2 groups", "gn", 2),
    ("GN 4 groups", "gn", 4),
    ("IN", "in", 1),
)

# Where things stand. All sheets have the batch in the same cells.
TOP, LEFT = 6, 2  # row and column of the batch's first number
AFTER = 8 + 2  # columns from a number to its normalised value
TABLE = 17  # row of the first mean
EPSILON_AT, MOMENTUM_AT = "Batch!$C$17", "Batch!$C$18"
LEARNED = 21  # row of channel 1's scale (column C) and shift (column D) on the first sheet

INPUT, HEADING, FONT = "#FFF7CC", "#E8E8E8", "Calibri"


def to_spreadsheet(path: str | Path) -> Path:
    """Writes the example worked out by hand as an .xlsx with live formulas, and returns its path.

    The first sheet holds the numbers of `example_batch`, epsilon, the momentum, and a scale and a
    shift for each channel, all to be changed; a sheet each for BN, LN, IN, and GN with 1, 2 and 4
    groups computes means, variances and normalised values from it; the last one counts.

    Args:
        path: of the file, ending in .xlsx; it is replaced as a whole or not at all.

    Raises:
        ImportError: openpyxl is not installed.
        ValueError: the path does not end in .xlsx.
        OSError: the file cannot be written.
    """
    path = user_path(path)
    if path.suffix.lower() != ".xlsx":
        raise ValueError(f"the spreadsheet's name must end in .xlsx, not {path.name!r}")
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise ImportError("to_spreadsheet needs openpyxl: pip install openpyxl") from error
    book = Workbook()
    _fill_batch(book.active)
    for name, kind, groups in SHEETS:
        _fill_norm(book.create_sheet(name), kind, groups)
    _fill_counts(book.create_sheet("Counts"))
    with atomic_write(path) as aside:
        book.save(aside)
    return path


# --- the sheets ------------------------------------------------------------------------------


def _fill_batch(sheet: Worksheet) -> None:
    """The numbers that the reader may change."""
    sheet.title = "Batch"
    _head(sheet, "A batch of four images", "Change any yellow cell: all other sheets follow.")
    x = example_batch()
    _frame(sheet, LEFT, "the numbers, 4 channels of 2×2 pixels for each image")
    for place in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        _write(sheet, _at(place), int(x[tuple(place)]), colour=INPUT, place=place)
    added = "is added to every variance, so that nothing is divided by 0"
    weight = "is the weight of the new batch in BN's running statistics"
    for row, name, value, meaning in ((17, "ε", EPSILON, added), (18, "momentum", 0.1, weight)):
        _write(sheet, f"A{row}", name, bold=True, centred=False)
        _write(sheet, f"C{row}", value, colour=INPUT)
        _write(sheet, f"D{row}", meaning, centred=False)
    _headings(sheet, LEARNED - 1, {"A": "learned", "C": "scale", "D": "shift"})
    for channel in range(4):
        _write(sheet, f"A{LEARNED + channel}", f"channel {channel + 1}", centred=False)
        _write(sheet, f"C{LEARNED + channel}", 1, colour=INPUT)
        _write(sheet, f"D{LEARNED + channel}", 0, colour=INPUT)


def _fill_norm(sheet: Worksheet, kind: str, groups: int) -> None:
    """Input and result side by side in the colours of their sets, and a row for each set."""
    shape = tuple(example_batch().shape)
    sets = shared_statistics(make_norm(kind, shape[1], groups=groups), shape)
    colours = tints(int(sets.max()) + 1)
    title = NORMS[kind].title.capitalize()
    if kind == "gn":
        title += f", {groups} group{'s' * (groups > 1)}"
    over = ", ".join(NORMS[kind].averaged)
    _head(sheet, f"{title}: each mean is over {over}", "Cells of one colour share a mean.")
    _frame(sheet, LEFT, "x, from the first sheet")
    _frame(sheet, LEFT + AFTER, "(x − mean) / √(variance + ε) · scale + shift")
    for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        number = int(sets[tuple(place)])
        x, row = _at(place), TABLE + number
        _write(sheet, x, f"=Batch!{x}", colour=colours[number], place=place)
        scale, shift = (f"Batch!${letter}${LEARNED + place[1]}" for letter in "CD")
        value = f"=({x}-$F${row})/$H${row}*{scale}+{shift}"
        after = _at(place, AFTER)
        _write(sheet, after, value, colour=colours[number], form="0.000", place=place)
    _fill_statistics(sheet, sets, colours)
    _fill_steps(sheet)
    if kind == "bn":
        _fill_running(sheet, sets)


def _fill_statistics(sheet: Worksheet, sets: Tensor, colours: list[str]) -> None:
    """A row for each set: how its mean and variance come about, and what they are afterwards."""
    titles = ("sum", "count", "mean", "variance", "√(variance + ε)")
    _headings(sheet, TABLE - 1, {"A": "shared by", **dict(zip("DEFGH", titles, strict=True))})
    _headings(sheet, TABLE - 1, {"L": "mean after", "M": "variance after"})
    for number, colour in enumerate(colours):
        row, range_, after = TABLE + number, _range(sets, number), _range(sets, number, AFTER)
        _write(sheet, f"A{row}", _name(sets, number), colour=colour)
        _write(sheet, f"D{row}", f"=SUM({range_})")
        _write(sheet, f"E{row}", f"=COUNT({range_})")
        _write(sheet, f"F{row}", f"=AVERAGE({range_})", form="0.000")
        # VARP divides by the count. It has a newer name, VAR.P, that older programs do not know.
        _write(sheet, f"G{row}", f"=VARP({range_})", form="0.000")
        _write(sheet, f"H{row}", f"=SQRT(G{row}+{EPSILON_AT})", form="0.000")
        _write(sheet, f"L{row}", f"=ROUND(AVERAGE({after}),6)", form="0.000")
        _write(sheet, f"M{row}", f"=VARP({after})", form="0.000")
        sheet.merge_cells(f"A{row}:C{row}")


def _fill_steps(sheet: Worksheet) -> None:
    """The way of the first number, one operation a row."""
    first, mean, variance, root = _at([0, 0, 0, 0]), f"F{TABLE}", f"G{TABLE}", f"H{TABLE}"
    steps = {
        "x, the first number": f"={first}",
        "x − mean": f"={first}-{mean}",
        "variance + ε": f"={variance}+{EPSILON_AT}",
        "√(variance + ε)": f"={root}",
        "(x − mean) / √(variance + ε)": f"=({first}-{mean})/{root}",
        "· scale + shift": f"=S{TABLE + 4}*Batch!$C${LEARNED}+Batch!$D${LEARNED}",
    }
    _headings(sheet, TABLE - 1, {"O": "step by step"})
    sheet.merge_cells(f"O{TABLE - 1}:S{TABLE - 1}")
    for row, (name, formula) in enumerate(steps.items(), start=TABLE):
        _write(sheet, f"O{row}", name, centred=False)
        _write(sheet, f"S{row}", formula, form="0.000")


def _fill_running(sheet: Worksheet, sets: Tensor) -> None:
    """What BN keeps for testing: running statistics, which start at 0 and 1, after this batch."""
    top = TABLE + 7
    titles = {"F": "mean", "G": "variance over n − 1", "H": "running mean", "I": "running variance"}
    _headings(sheet, top - 1, {"A": "kept for testing", **titles})
    for number in range(int(sets.max()) + 1):
        row = top + number
        _write(sheet, f"A{row}", _name(sets, number))
        _write(sheet, f"F{row}", f"=F{TABLE + number}", form="0.000")
        _write(sheet, f"G{row}", f"=VAR({_range(sets, number)})", form="0.000")
        for new, old, column in (("F", 0, "H"), ("G", 1, "I")):
            value = f"=(1-{MOMENTUM_AT})*{old}+{MOMENTUM_AT}*{new}{row}"
            _write(sheet, f"{column}{row}", value, form="0.000")
        sheet.merge_cells(f"A{row}:C{row}")
    rule = "(1 − momentum) · old + momentum · new; the old values are 0 and 1"
    _write(sheet, f"A{top + 5}", rule, centred=False)


def _fill_counts(sheet: Worksheet) -> None:
    """How many means there are and how many numbers are learned, for sizes of one's own."""
    _head(sheet, "How many means, how many learned numbers", "Change the yellow cells.")
    sizes = {"N, images": 4, "C, channels": 4, "H, rows": 2, "W, columns": 2, "G, groups": 2}
    for row, (name, value) in enumerate(sizes.items(), start=4):
        _write(sheet, f"A{row}", name, centred=False)
        _write(sheet, f"C{row}", value, colour=INPUT)
    _headings(sheet, 10, {"D": "means", "E": "numbers a mean", "F": "learned"})
    n, c, h, w, g = (f"$C${row}" for row in range(4, 9))
    group = f'=IF(MOD({c},{g})=0,{{}},"G must divide C")'
    rows = {
        "BN": (f"={c}", f"={n}*{h}*{w}", f"=2*{c}"),
        "LN": (f"={n}", f"={c}*{h}*{w}", f"=2*{c}"),
        "LN, element-wise": (f"={n}", f"={c}*{h}*{w}", f"=2*{c}*{h}*{w}"),
        "GN": (group.format(f"{n}*{g}"), group.format(f"{c}/{g}*{h}*{w}"), f"=2*{c}"),
        "IN": (f"={n}*{c}", f"={h}*{w}", f"=2*{c}"),
    }
    for row, (name, formulas) in enumerate(rows.items(), start=11):
        _write(sheet, f"A{row}", name, centred=False)
        for letter, formula in zip("DEF", formulas, strict=True):
            _write(sheet, f"{letter}{row}", formula, form="#,##0")


# --- cells and their looks -------------------------------------------------------------------


def _at(place: list[int], shift: int = 0) -> str:
    """The cell of one number, `shift` columns to the right: (0, 0, 0, 0) is B6."""
    from openpyxl.utils import get_column_letter

    image, channel, row, column = place
    return f"{get_column_letter(LEFT + shift + 2 * channel + column)}{TOP + 2 * image + row}"


def _range(sets: Tensor, number: int, shift: int = 0) -> str:
    """The cells of one set, which form a rectangle: B6:C7."""
    places = (sets == number).nonzero().tolist()
    return f"{_at(places[0], shift)}:{_at(places[-1], shift)}"


def _name(sets: Tensor, number: int) -> str:
    """The images and channels of one set in words."""
    places = (sets == number).nonzero()
    words = []
    for axis, word, count in ((0, "image", sets.shape[0]), (1, "channel", sets.shape[1])):
        found = (places[:, axis].unique() + 1).tolist()
        if len(found) == 1:
            words.append(f"{word} {found[0]}")
        elif len(found) < count:
            words.append(f"{word}s {' and '.join(map(str, found))}")
    return ", ".join(words)


def _head(sheet: Worksheet, title: str, hint: str) -> None:
    from openpyxl.styles import Font

    _write(sheet, "A1", title, centred=False).font = Font(name=FONT, bold=True, size=14)
    _write(sheet, "A2", hint, centred=False)
    sheet.sheet_view.showGridLines = False
    sheet.page_setup.orientation = "landscape"
    sheet.page_setup.fitToHeight = 1
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    for column in "ABCDEFGHIJKLMNOPQRS":
        sheet.column_dimensions[column].width = 10 if column != "J" else 3


def _frame(sheet: Worksheet, left: int, caption: str) -> None:
    """The headings around a batch whose first column is `left`."""
    from openpyxl.utils import get_column_letter

    _write(sheet, f"{get_column_letter(left)}{TOP - 2}", caption, bold=True, centred=False)
    for channel in range(4):
        letters = [get_column_letter(left + 2 * channel + side) for side in (0, 1)]
        _write(sheet, f"{letters[0]}{TOP - 1}", f"channel {channel + 1}", colour=HEADING)
        sheet.merge_cells(f"{letters[0]}{TOP - 1}:{letters[1]}{TOP - 1}")
    letter = get_column_letter(left - 1)
    for image in range(4):
        row = TOP + 2 * image
        _write(sheet, f"{letter}{row}", f"image {image + 1}", colour=HEADING)
        sheet.merge_cells(f"{letter}{row}:{letter}{row + 1}")
        sheet.row_dimensions[row].height = sheet.row_dimensions[row + 1].height = 19


def _headings(sheet: Worksheet, row: int, titles: dict[str, str]) -> None:
    from openpyxl.styles import Alignment

    for letter, title in titles.items():
        cell = _write(sheet, f"{letter}{row}", title, colour=HEADING, bold=True)
        cell.alignment = Alignment(horizontal="center", vertical="center", wrap_text=True)
        if letter == "A":  # names are long
            sheet.merge_cells(f"A{row}:{'B' if 'C' in titles else 'C'}{row}")
    sheet.row_dimensions[row].height = 32


def _write(
    sheet: Worksheet,
    address: str,
    value: str | float,
    *,
    colour: str | None = None,
    bold: bool = False,
    centred: bool = True,
    form: str = "General",
    place: list[int] | None = None,
) -> Cell:
    """Writes one cell; with `place` it is a pixel, and its channel gets a border."""
    from openpyxl.styles import Alignment, Border, Font, PatternFill, Side

    cell = sheet[address]
    cell.value, cell.number_format = value, form
    cell.font = Font(name=FONT, size=11, bold=bold)
    if centred:
        cell.alignment = Alignment(horizontal="center", vertical="center")
    if colour:
        cell.fill = PatternFill("solid", fgColor=colour[1:])
    if place:
        thick, thin = Side("medium", color="555555"), Side("thin", color="FFFFFF")
        _, _, row, column = place
        cell.border = Border(
            top=thin if row else thick,
            bottom=thick if row else thin,
            left=thin if column else thick,
            right=thick if column else thin,
        )
    return cell
