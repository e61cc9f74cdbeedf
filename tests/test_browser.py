"""Notebooks in a real browser: JupyterLab, headless Chromium, "Run All Cells" in smoke mode."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WHOLE, WITH_FORM = "01_mnist_l1.ipynb", "00_normalization_by_hand.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MINUTES = 5

IDLE = """() => {
    const notebook = window.jupyterapp?.shell.currentWidget;
    return notebook?.context?.sessionContext.session?.kernel?.status === "idle";
}"""
ALL_DONE = """() => {
    const cells = Array.from(window.jupyterapp.shell.currentWidget.content.model.cells);
    return cells.every(cell => cell.type !== "code" || cell.executionCount > 0);
}"""
PICTURE = """() => document.querySelector(".jp-OutputArea img.widget-image")?.src"""
CHANGED = """before => {
    const src = document.querySelector(".jp-OutputArea img.widget-image")?.src;
    return src && src !== before;
}"""
SAVED = "() => !window.jupyterapp.shell.currentWidget.context.model.dirty"


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab over an empty folder; its address, and the folder."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
    options = ["--no-browser", "--allow-root", "--port=0", "--IdentityProvider.token=secret"]
    options += ["--LabApp.expose_app_in_browser=True"]  # to ask it whether all cells are done
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={tmp_path}"]
    around = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    around |= {"JUPYTER_CONFIG_DIR": str(tmp_path / ".config"), "NORMLAB_SMOKE": "1"}
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen(command, env=around, stdout=log, stderr=log)
        try:
            yield _address(server, tmp_path / "log"), tmp_path
        finally:
            server.terminate()
            server.wait(timeout=30)


def _address(server: subprocess.Popen, log: Path) -> str:
    """Waits until the server answers."""
    for _ in range(120):
        found = re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/", log.read_text())
        if found:
            with urllib.request.urlopen(found[0] + "api?token=secret", timeout=30):
                return found[0]
        assert server.poll() is None, log.read_text()
        time.sleep(0.5)
    raise TimeoutError(log.read_text())


@contextmanager
def all_run(address: str, name: str) -> Iterator:
    """The page of a notebook in JupyterLab of which all cells have been run."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"{address}lab/tree/{name}?token=secret&reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        page.wait_for_function(IDLE, timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_function(ALL_DONE, timeout=MINUTES * 60_000)
        page.wait_for_function(IDLE, timeout=60_000)
        yield page
        if os.environ.get("NORMLAB_SCREENSHOT"):
            page.screenshot(path=os.environ["NORMLAB_SCREENSHOT"])
        page.keyboard.press("Control+s")
        page.wait_for_function(SAVED, timeout=60_000)
        browser.close()


def clean_outputs(path: Path) -> list:
    """The outputs of a notebook that was saved, without errors and without widgets' state."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return outputs


pytestmark = pytest.mark.browser
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@needs_chromium
def test_run_all_in_jupyterlab_shows_figures_and_saves_a_clean_notebook(lab):
    address, folder = lab
    shutil.copy(NOTEBOOKS / WHOLE, folder)
    with all_run(address, WHOLE) as page:
        page.locator(".jp-OutputArea-output img").first.scroll_into_view_if_needed()
    outputs = clean_outputs(folder / WHOLE)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8


@needs_chromium
def test_the_sliders_of_the_form_change_the_picture_and_leave_no_state_behind(lab):
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")
    address, folder = lab
    notebook = nbformat.read(NOTEBOOKS / WITH_FORM, as_version=4)
    needed = ("import normlab as nl", "nl.explore_norm(")
    notebook.cells = [cell for cell in notebook.cells if any(x in cell.source for x in needed)]
    nbformat.write(notebook, folder / WITH_FORM)
    with all_run(address, WITH_FORM) as page:
        page.wait_for_function(CHANGED, arg="", timeout=30_000)
        sliders = page.locator(".jp-OutputArea .noUi-handle")
        assert sliders.count() == 5  # images, channels, rows, columns, groups
        before = page.evaluate(PICTURE)
        sliders.first.press("ArrowLeft")
        page.wait_for_function(CHANGED, arg=before, timeout=30_000)
    clean_outputs(folder / WITH_FORM)
