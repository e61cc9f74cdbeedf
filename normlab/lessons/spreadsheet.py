"""The worked example as a spreadsheet whose formulas compute every mean, variance and value."""

from pathlib import Path

from normlab.support.files import user_path, write_bytes

# To be changed in a spreadsheet program: the tests compare all that it computes with torch.
_FILE = Path(__file__).with_name("normalization_by_hand.xlsx")


def to_spreadsheet(path: str | Path) -> Path:
    """Writes the example worked out by hand as an .xlsx with live formulas, and returns its path.

    The first sheet holds the numbers of `example_batch`, epsilon, the momentum, and a scale and a
    shift for each channel, all to be changed; a sheet each for BN, LN, IN, and GN with 1, 2 and 4
    groups computes means, variances and normalised values from it.

    Args:
        path: of the file, ending in .xlsx; it is replaced as a whole or not at all.

    Raises `ValueError` for another ending, `OSError` if the file cannot be written.
    """
    path = user_path(path)
    if path.suffix.lower() != ".xlsx":
        raise ValueError(f"the spreadsheet's name must end in .xlsx, not {path.name!r}")
    write_bytes(path, _FILE.read_bytes())
    return path
