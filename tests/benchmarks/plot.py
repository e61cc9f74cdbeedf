"""Draws the kept measurements: `python -m tests.benchmarks.plot` writes `speed.png` beside them."""

import json
import statistics
from pathlib import Path

from matplotlib import pyplot

from normlab.support.colours import COLOURS
from normlab.support.figures import save_figure

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """One panel for each kept JSON file."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    size = (5.6 * len(reports), 3.4)
    _, axes = pyplot.subplots(1, len(reports), figsize=size, layout="constrained", squeeze=False)
    for ax, report in zip(axes[0], reports, strict=True):
        draw(ax, report)
    save_figure(axes[0][0].figure, RESULTS / "speed.png")


def draw(ax, report: dict) -> None:
    """Bars of the median rate of each path, with the range over the repetitions."""
    for place, (path, results) in enumerate(report["measured"].items()):
        rates = [one["images"] / one["seconds"] for one in results]
        middle = statistics.median(rates)
        colour = COLOURS[1] if path.startswith("normlab") else COLOURS[0]
        ax.barh(place, middle, color=colour, height=0.65)
        ax.plot([min(rates), max(rates)], [place, place], color="black", linewidth=1)
        ax.text(max(rates), place, f"  {middle:,.0f}", va="center", fontsize=9)
    ax.set_yticks(range(len(report["measured"])), report["measured"])
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.set_xlabel("training images a second, tests and start included")
    title = f"{report['assignment']}, {results[0]['source']}\n{report['device']}, {report['date']}"
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
