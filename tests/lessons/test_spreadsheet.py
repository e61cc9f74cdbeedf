"""The spreadsheet's formulas, evaluated here, give what torch gives; also for other numbers."""

import math
import re
import shutil
import statistics
import subprocess

import pytest
import torch
from torch import nn

import normlab as nl

openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed")

LAYERS = {
    "BN": lambda: nn.BatchNorm2d(4),
    "LN": lambda: nn.GroupNorm(1, 4),
    "IN": lambda: nn.InstanceNorm2d(4, affine=True),
    "GN 1 group": lambda: nn.GroupNorm(1, 4),
    "GN 2 groups": lambda: nn.GroupNorm(2, 4),
    "GN 4 groups": lambda: nn.GroupNorm(4, 4),
}

REFERENCE = re.compile(
    r"(?:(?:'([^']+)'|(\w+))!)?\$?([A-Z]{1,2})\$?(\d+)(?::\$?([A-Z]{1,2})\$?(\d+))?(?![\w(])"
)


FUNCTIONS = {
    "SUM": math.fsum,
    "COUNT": len,
    "AVERAGE": statistics.fmean,
    "VARP": statistics.pvariance,
    "VAR": statistics.variance,
    "SQRT": math.sqrt,
    "ROUND": round,
}


class Evaluated:
    """The values of a workbook's formulas, as a spreadsheet program would compute them."""

    def __init__(self, book) -> None:
        self.book = book

    def value(self, sheet: str, cell: str) -> float | str:
        content = self.book[sheet][cell].value
        if not (isinstance(content, str) and content.startswith("=")):
            return content
        assert not re.search(r"[\^&<>%]", content), "the evaluator knows no such operator"
        expression = REFERENCE.sub(lambda found: self.looked_up(found, sheet), content[1:])
        expression = re.sub(r"(?<!=)=(?!=)", "==", expression)
        around = {"__builtins__": {}, "value": self.value, "values": self.values}
        return eval(expression, around | FUNCTIONS)

    def looked_up(self, found: re.Match, sheet: str) -> str:
        quoted, plain, letter, row, last_letter, last_row = found.groups()
        sheet = quoted or plain or sheet
        if last_letter:
            return f"values({sheet!r}, '{letter}{row}:{last_letter}{last_row}')"
        return f"value({sheet!r}, '{letter}{row}')"

    def values(self, sheet: str, cells: str) -> list[float]:
        return [
            self.value(sheet, cell.coordinate) for row in self.book[sheet][cells] for cell in row
        ]

    def batch(self, sheet: str, cells: str) -> torch.Tensor:
        """The 8×8 cells of a batch as (N, C, H, W)."""
        numbers = torch.tensor(self.values(sheet, cells), dtype=torch.float64)
        return numbers.view(4, 2, 4, 2).transpose(1, 2)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return nl.to_spreadsheet(tmp_path_factory.mktemp("sheet") / "by-hand.xlsx")


@pytest.fixture
def book(path):
    return openpyxl.load_workbook(path)


def test_the_sheets(book):
    assert book.sheetnames == ["Batch", *LAYERS]
    x = Evaluated(book).batch("Batch", "C7:J14")
    assert torch.equal(x, nl.example_batch().double())


def check_against_torch(book, x: torch.Tensor) -> None:
    evaluated = Evaluated(book)
    learned = [[evaluated.value("Batch", f"{c}{23 + row}") for row in range(4)] for c in "BC"]
    for name, make in LAYERS.items():
        layer = make().double()
        with torch.no_grad():
            for parameter, values in zip((layer.weight, layer.bias), learned, strict=True):
                parameter.copy_(torch.tensor(values))
            expected = layer(x)
        torch.testing.assert_close(evaluated.batch(name, "C7:J14"), x)
        torch.testing.assert_close(evaluated.batch(name, "N7:U14"), expected)
        if name == "BN":
            for row in range(4):
                mean, variance = (evaluated.value("BN", f"{c}{18 + row}") for c in "JK")
                assert mean == pytest.approx(float(layer.running_mean[row]))
                assert variance == pytest.approx(float(layer.running_var[row]))


def test_all_values_are_those_of_torch(book):
    check_against_torch(book, nl.example_batch().double())


@pytest.mark.skipif(not shutil.which("soffice"), reason="LibreOffice is not installed")
def test_libreoffice_computes_the_same(path, tmp_path):
    command = ["soffice", f"-env:UserInstallation=file://{tmp_path}/profile", "--headless"]
    command += ["--convert-to", "xlsx", "--outdir", str(tmp_path), str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    recomputed = openpyxl.load_workbook(tmp_path / path.name, data_only=True)
    check_against_torch(recomputed, nl.example_batch().double())


def test_they_follow_the_yellow_cells(book):
    sheet = book["Batch"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, 4, 2, 2), dtype=torch.float64, generator=generator)
    for row, numbers in enumerate(x.transpose(1, 2).reshape(8, 8).tolist(), start=7):
        for letter, number in zip("CDEFGHIJ", numbers, strict=True):
            sheet[f"{letter}{row}"] = number
    for channel in range(4):
        sheet[f"B{23 + channel}"], sheet[f"C{23 + channel}"] = 0.5 + channel, channel - 1.5
    check_against_torch(book, x)


@pytest.mark.parametrize("name", LAYERS)
def test_each_mean_and_variance_has_a_row_and_a_colour(name, book):
    evaluated = Evaluated(book)
    shared = nl.shared_statistics(LAYERS[name](), (4, 4, 2, 2))
    x, sheet = nl.example_batch().double(), book[name]
    for number in range(int(shared.max()) + 1):
        row, members = 18 + number, x[shared == number]
        found = [evaluated.value(name, f"{letter}{row}") for letter in "BCDE"]
        wanted = members.sum(), len(members), members.mean(), members.var(correction=0)
        assert found == pytest.approx([float(number) for number in wanted])
        assert evaluated.value(name, f"G{row}") == 0
        assert evaluated.value(name, f"H{row}") == pytest.approx(1, abs=1e-4)
        colour = sheet[f"A{row}"].fill.fgColor.rgb
        for cells in ("C7:J14", "N7:U14"):
            fills = [cell.fill.fgColor.rgb == colour for line in sheet[cells] for cell in line]
            coloured = torch.tensor(fills).view(4, 2, 4, 2).transpose(1, 2)
            assert torch.equal(coloured, shared == number)


def test_no_formula_needs_a_function_that_old_programs_lack(book):
    formulas = [
        cell.value
        for sheet in book
        for row in sheet.iter_rows()
        for cell in row
        if isinstance(cell.value, str) and cell.value.startswith("=")
    ]
    assert len(formulas) > 6 * 128
    used = {name for formula in formulas for name in re.findall(r"([A-Z.]+)\(", formula)}
    assert used <= set(FUNCTIONS)


def test_the_name_must_say_what_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.xlsx, not 'by-hand\.csv'"):
        nl.to_spreadsheet(tmp_path / "by-hand.csv")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, full_disk):
    path = tmp_path / "by-hand.xlsx"
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(OSError, match="cannot write"):
        nl.to_spreadsheet(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
