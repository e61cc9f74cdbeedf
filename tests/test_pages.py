"""Marked places of texts say what the results say, and nothing else of a page changes."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import nbformat
import pytest

from tests.pages import PAGES, fill_pages, main, place_text, read_results

ROOT = Path(__file__).parents[1]

RESULTS = {
    "cifar10-add": {
        "data": {"source": "CIFAR-10 (JPEG copy)"},
        "variants": [
            {
                "variant": "BN + L1",
                "parameters": 41992,
                "seeds": 3,
                "test_accuracy": 0.79123,
                "sd": 0.0021,
                "reported": 0.7342,
                "recipe": {"lr": 0.02},
                "runs": [{"test_loss": 0.5}, {"test_loss": 0.6}, {"test_loss": 0.7}],
            },
            {
                "variant": "LN",
                "parameters": 41992,
                "seeds": 1,
                "test_accuracy": 0.7512,
                "sd": None,
                "reported": None,
                "recipe": {"lr": 0.1},
                "runs": [{"test_loss": 0.8125}],
            },
        ],
        "differences": [{"first": "LN", "second": "BN + L1", "mean": -0.04, "margin": 0.0123}],
        "main_effects": [{"first": "A, B", "second": "C, D", "mean": 0.0044, "margin": 0.0023}],
    },
    "digits": {
        "data": {"source": "digits"},
        "variants": [
            {
                "variant": "GN",
                "parameters": 10,
                "seeds": 1,
                "test_accuracy": 0.9,
                "sd": None,
                "reported": None,
                "recipe": {"lr": 0.1},
                "runs": [{"test_loss": 0.1}],
            }
        ],
    },
}


def spoil_accuracy(kept):
    kept["variants"][1]["test_accuracy"] += 0.0001


def spoil_spread(kept):
    kept["variants"][0]["sd"] = 0.0001


def spoil_run(kept):
    """Swapped digits in a single run, and the mean and spread that follow from them."""
    variant = kept["variants"][1]
    variant["runs"][0]["test_accuracy"] = 0.9494
    accuracies = [run["test_accuracy"] for run in variant["runs"]]
    variant |= {"test_accuracy": mean(accuracies), "sd": stdev(accuracies)}


def spoil_loss(kept):
    kept["variants"][1]["runs"][2]["test_loss"] /= 2


def spoil_difference(kept):
    kept["differences"][0]["mean"] *= -1


def leave_out_a_run(kept):
    kept["variants"][1]["runs"].append(kept["variants"][1]["runs"][0] | {"seed": 9})


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (spoil_accuracy, "GN"),
        (spoil_spread, r"BN \+ L1"),
        (spoil_run, "GN"),
        (spoil_loss, "GN"),
        (spoil_difference, r"BN \+ L1 − GN"),
        (leave_out_a_run, "GN"),
    ],
)
def test_results_that_were_edited_are_refused(tmp_path, capsys, spoil, what):
    kept = shutil.copytree(ROOT / "notebooks/results/mnist-l1", tmp_path / "results/mnist-l1")
    page = tmp_path / "README.md"
    page.write_text("none")
    command = [str(page), "--results", str(tmp_path / "results")]
    assert main(command) == 0
    results = json.loads((kept / "results.json").read_text())
    spoil(results)
    (kept / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=rf"says something else of {what} than .*: write it anew"):
        read_results(tmp_path / "results")
    assert main(command) == 1
    assert "results.json says something else of" in capsys.readouterr().err


PAGE = "BN: <!-- normlab: cifar10-add / BN + L1 / mean -->{}<!-- / -->, LN <!-- of course -->."


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("cifar10-add / BN + L1 / accuracy", "79.12 ± 0.21 %"),
        ("cifar10-add / LN / accuracy", "75.12 %"),
        ("cifar10-add / BN + L1 / mean", "79.12 %"),
        ("cifar10-add / BN + L1 / loss", "0.600"),
        ("cifar10-add / BN + L1 / difference", "+5.70"),
        ("cifar10-add / LN / difference", "–"),
        ("cifar10-add / BN + L1 / reported", "73.42 %"),
        ("cifar10-add / LN / parameters", "41,992"),
        ("cifar10-add / BN + L1 / seeds", "3"),
        ("cifar10-add / BN + L1 / rate", "0.02"),
        ("cifar10-add / BN + L1 / minus / LN", "+4.00"),
        ("cifar10-add / LN / minus / BN + L1", "−4.00"),
        ("cifar10-add / LN / against / BN + L1", "−4.00 ± 1.23"),
        ("cifar10-add / BN + L1 / against / LN", "+4.00 ± 1.23"),
        ("cifar10-add / A, B / against / C, D", "+0.44 ± 0.23"),
        ("cifar10-add / C, D / against / A, B", "−0.44 ± 0.23"),
        ("digits / GN / against / GN", "(one seed: no interval)"),
        ("cifar10-skip / LN / mean", "(not trained yet)"),
    ],
)
def test_each_quantity_is_that_of_the_results(what, text):
    assert place_text(what, RESULTS) == text


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("cifar10-ad / LN / mean", "unknown results 'cifar10-ad'.* did you mean 'cifar10-add'"),
        ("cifar10-add / XN / mean", "unknown variant 'XN'"),
        ("cifar10-add / LN / against / XN", "unknown variant 'XN'"),
        ("cifar10-add / LN / median", "unknown quantity 'median'"),
        ("cifar10-add / LN / over / BN + L1", "none of NAME / VARIANT / QUANTITY"),
        ("tables", "none of NAME / VARIANT / QUANTITY"),
    ],
)
def test_a_place_that_cannot_be_filled_says_why(what, why):
    with pytest.raises(ValueError, match=why):
        place_text(what, RESULTS)


def test_tables_have_a_row_for_each_variant():
    lines = place_text("cifar10-add / table", RESULTS).strip().splitlines()
    assert lines[2:] == [
        "| BN + L1 | 79.12 ± 0.21 | 73.42 | +5.70 | 3 | 41,992 |",
        "| LN | 75.12 | – | – | 1 | 41,992 |",
    ]
    rows = place_text("overview", RESULTS).strip().splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["BN + L1", "LN"]  # digits were not reported on
    assert all(row.startswith("| `cifar10-add`, CIFAR-10 (JPEG copy) | ") for row in rows)


def test_figures_are_named_relative_to_the_page(folder):
    results = read_results(folder / "results")
    text = place_text("cifar10-add / figures", results, beside=folder)
    sources = re.findall(r'(?:src="|\]\()([^")]+)', text)
    assert sources == [
        "results/cifar10-add/test-loss.png",
        "results/cifar10-add/test-accuracy.png",
        "results/cifar10-add/training-and-test.png",
        "results/cifar10-add/mistakes-bn-l1.png",
        "results/cifar10-add/mistakes-ln.png",
    ]
    below = place_text("cifar10-add / figures", results, beside=folder / "notebooks")
    assert "(../results/cifar10-add/test-loss.png)" in below


@pytest.fixture
def folder(tmp_path):
    for name, kept in RESULTS.items():
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "results.json").write_text(json.dumps(kept))
    (tmp_path / "README.md").write_text(PAGE.format("1 %"))
    cells = [
        nbformat.v4.new_markdown_cell("LN: <!-- normlab: cifar10-add / LN / mean -->?<!-- / -->"),
        nbformat.v4.new_code_cell("'<!-- normlab: cifar10-add / LN / mean -->?<!-- / -->'"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    return tmp_path


def test_pages_are_filled_once_and_code_is_left_alone(folder):
    pages = [folder / "README.md", folder / "one.ipynb"]
    results = read_results(folder / "results")
    assert fill_pages(pages, results, write=False) == pages
    assert "1 %" in pages[0].read_text()
    assert fill_pages(pages, results) == pages
    assert pages[0].read_text() == PAGE.format("79.12 %")
    markdown, code = nbformat.read(pages[1], as_version=4).cells
    assert markdown.source.endswith("-->75.12 %<!-- / -->")
    assert "?" in code.source
    assert fill_pages(pages, results) == []


def test_a_wrong_place_is_named_and_no_page_is_touched(folder):
    wrong = folder / "wrong.md"
    wrong.write_text("<!-- normlab: cifar10-add / XN / mean --><!-- / -->")
    with pytest.raises(
        ValueError, match=r"wrong\.md, line 1, place 'cifar10-add / XN / mean'.* 'XN'"
    ):
        fill_pages([folder / "README.md", wrong], read_results(folder / "results"))
    assert "1 %" in (folder / "README.md").read_text()


OPEN = "<!-- normlab: cifar10-add / LN / mean -->"


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        (f"one\n{OPEN}?\nmuch\n{OPEN}?<!-- / -->", 2, "its end mark, <!-- / -->, is missing"),
        (f"one {OPEN}?<!-- / -->\n\n{OPEN}?", 3, "its end mark, <!-- / -->, is missing"),
        (f"{OPEN}{OPEN}?<!-- / --><!-- / -->", 1, "its end mark, <!-- / -->, is missing"),
        (f"{OPEN}?<!-- / -->\n<!-- / -->", 2, "end mark: no place begins before it"),
        ("\n<!-- normlab: cifar10-add / LN / mean\n -->?<!-- / -->", 2, "its mark lacks the -->"),
        (f"<!-- normlab: cifar10-add / LN {OPEN}?<!-- / -->", 1, "its mark lacks the -->"),
    ],
)
@pytest.mark.parametrize("ending", ["md", "ipynb"])
def test_what_is_no_place_is_named_and_no_text_is_lost(text, line, why, ending, folder):
    page = folder / f"page.{ending}"
    cells = [nbformat.v4.new_code_cell(""), nbformat.v4.new_markdown_cell(text)]
    if ending == "ipynb":
        nbformat.write(nbformat.v4.new_notebook(cells=cells), page)
    else:
        page.write_text(text)
    before = page.read_bytes()
    cell = "" if ending == "md" else ", cell 2"
    with pytest.raises(ValueError, match=f"^page.{ending}{cell}, line {line}, .*{why}$"):
        fill_pages([page], read_results(folder / "results"))
    assert page.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        *("<!-- normlab: a ", "<!-- normlab: a -->\n", "<!-- ", "<!--  / "),
        "<!-- normlab: cifar10-skip / LN / mean -->?<!-- / -->\n",
    ],
)
def test_many_marks_are_gone_through_once(text, tmp_path):
    """If each were searched for to the end of the page, this would take an hour."""
    page = tmp_path / "page.md"
    page.write_text(text * 200_000)
    if "?" in text:
        assert fill_pages([page], {}) == [page]
        filled = page.read_text().count("-->(not trained yet)<!-- / -->\n")
        assert filled == 200_000
    elif "normlab" in text:
        with pytest.raises(ValueError, match="line 1, place 'a'"):
            fill_pages([page], {})
    else:
        assert fill_pages([page], {}) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither modes nor, for everybody, links")
@pytest.mark.parametrize("name", ["README.md", "one.ipynb"])
def test_a_page_keeps_its_line_ends_its_mode_and_its_link(name, folder):
    page, link = folder / name, folder / "elsewhere" / name
    content = page.read_bytes().replace(b"\n", b"\r\n") + (b"ended\r\n" if "md" in name else b"")
    page.write_bytes(
        content.replace(b"normlab: cifar10-add / BN + L1 / mean", b"normlab: overview")
    )
    page.chmod(0o640)
    link.parent.mkdir()
    link.symlink_to(page)
    before = page.read_bytes()
    assert fill_pages([link], read_results(folder / "results")) == [link]
    after = page.read_bytes()
    assert after != before
    assert after.count(b"\n") == after.count(b"\r\n") > before.count(b"\n") * ("md" in name)
    assert link.is_symlink()
    assert page.stat().st_mode & 0o777 == 0o640
    assert fill_pages([page], read_results(folder / "results")) == []


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"cells": [{}]}', '{"cells": 3}', "{", "[" * 100_000, "\ufeff{}"]
)
def test_what_is_no_notebook_is_named(content, tmp_path):
    page = tmp_path / "page.ipynb"
    page.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.ipynb is no notebook as Jupyter writes them"):
        fill_pages([page], {})
    page.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"page\.ipynb is not in UTF-8"):
        fill_pages([page], {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda kept: kept.pop("variants"), "has no variants"),
        (lambda kept: kept.update(variants={}), "has no variants"),
        (lambda kept: kept.update(variants=[3]), "has no variants"),
        (
            lambda kept: kept["variants"][0].update(test_accuracy=99.5),
            "test_accuracy cannot be 99.5",
        ),
        (
            lambda kept: kept["variants"][0].update(test_accuracy=-0.1),
            "test_accuracy cannot be -0.1",
        ),
        (lambda kept: kept["variants"][0].update(test_accuracy="0.9"), "cannot be '0.9'"),
        (lambda kept: kept["variants"][0].update(test_accuracy=math.nan), "NaN is no number"),
        (lambda kept: kept["variants"][1].update(reported=73.42), "reported cannot be 73.42"),
        (lambda kept: kept["variants"][1]["runs"][0].update(test_accuracy=2), "cannot be 2"),
        (lambda kept: kept["differences"][0].update(margin=-math.inf), "-Infinity is no number"),
    ],
)
def test_results_that_cannot_have_been_measured_are_refused(change, why, folder):
    file = folder / "results" / "cifar10-add" / "results.json"
    kept = json.loads(file.read_text())
    change(kept)
    file.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        read_results(folder / "results")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["variant", "parameters", "test_accuracy", "recipe", "runs"])
def test_what_the_results_lack_is_told_with_the_place(name, folder):
    file = folder / "results" / "cifar10-add" / "results.json"
    kept = json.loads(file.read_text())
    for variant in kept["variants"]:
        del variant[name]
    file.write_text(json.dumps(kept))
    page = folder / "page.md"
    parts = {"runs": "LN / loss", "recipe": "LN / rate"}
    page.write_text(f"<!-- normlab: cifar10-add / {parts.get(name, 'table')} -->?<!-- / -->")
    with pytest.raises(ValueError, match=rf"page\.md, line 1, .* no such thing \('{name}'\)"):
        fill_pages([page], read_results(folder / "results"))


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no results in"):
        read_results(tmp_path)


def test_the_command_tells_stale_pages_and_fills_them(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    command = ["README.md", "one.ipynb", "--results", "results"]
    assert main([*command, "--check"]) == 1
    assert capsys.readouterr().out == "stale: README.md, one.ipynb\n"
    assert main(command) == 0
    assert main([*command, "--check"]) == 0
    assert capsys.readouterr().out.endswith("stale: nothing\n")
    assert main(["none.md", "--results", "results"]) == 1
    assert "none.md" in capsys.readouterr().err


def test_no_place_in_a_sentence_begins_a_line():
    """Markdown would end the paragraph there: a line that begins with a comment is HTML."""
    texts = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path.name] = "\n\n".join("".join(cell["source"]) for cell in cells)
    for name, text in texts.items():
        within = re.findall(r"(?<=\S)\n(<!-- normlab: .+? -->)", text)
        assert not within, name
