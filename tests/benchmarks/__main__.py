"""How fast each path trains an assignment, against what a student would run instead.

    python -m tests.benchmarks cifar10-norms --data-root DATA
    python -m tests.benchmarks mnist-l1 --data-root DATA --images 0 --device cuda

Every measurement is a process of its own; the paths take turns, so that a machine that slows down
slows all of them. The table gives the median and the range over the repetitions, and ratios of
medians to the quicker form of the students' loop. The results are kept as JSON.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import torchvision

from normlab.assignments import find_assignment
from normlab.support.files import write_json
from tests.benchmarks.paths import OURS, PATHS


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    options = _options()
    device = _device_name(options.device)  # whatever may fail, before anything is measured
    assignment = find_assignment(options.assignment)
    labels = [v.label for v in assignment.variants if v.norm != "ln-elementwise"][:3]
    paths = [path for path in _installed() if not options.paths or path in options.paths]
    measured: dict[str, list[dict]] = {path: [] for path in paths}
    for repetition in range(options.repeats):
        for path, results in measured.items():
            job = {
                "path": path,
                "assignment": assignment.name,
                "variants": labels,
                "epochs": options.epochs if path in OURS else 1,
                "seeds": options.seeds if path in OURS else 1,
                "images": options.images if path in OURS else options.peer_images,
                "dropout": options.dropout,
                "device": options.device,
                "data_root": options.data_root,
            }
            results.append(_run(job))
            print(f"{repetition + 1}/{options.repeats} {path}: {results[-1]}", flush=True)
    report = _report(options, device, labels, measured)
    print(f"\n{table(report)}")
    if options.out:
        write_json(Path(options.out), report)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("assignment")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--images", type=int, default=20000, help="training images, 0 for all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="of each variant, for normlab")
    parser.add_argument("--peer-images", type=int, default=4000, help="for the others, one epoch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=None, help="of all paths")
    parser.add_argument("--paths", nargs="+", choices=PATHS, help="only these")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", help="a JSON file for the results")
    return parser.parse_args()


def _installed() -> list[str]:
    """The paths that can run here; the others are named."""
    missing = [
        name for name in ("Lightning", "fastai") if not importlib.util.find_spec(name.lower())
    ]
    for name in missing:
        print(f"{name} is not installed: not measured")
    return [path for path in PATHS if path not in missing]


def _run(job: dict) -> dict:
    command = [sys.executable, "-m", "tests.benchmarks.paths", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job['path']} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _device_name(device: str, about: Path = Path("/proc/cpuinfo")) -> str:
    """What the device is sold as, as far as the system tells."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _report(options: argparse.Namespace, device: str, labels: list[str], measured: dict) -> dict:
    return {
        "assignment": options.assignment,
        "variants": labels,
        "epochs": options.epochs,
        "seeds": options.seeds,
        "images": options.images,
        "peer_images": options.peer_images,
        "dropout": options.dropout,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "measured": measured,
    }


def table(report: dict) -> str:
    """The measurements as a Markdown table, with the memory of a GPU where one was used."""
    rates = {
        path: [one["images"] / one["seconds"] for one in results]
        for path, results in report["measured"].items()
    }
    students = max(
        (statistics.median(rates[path]) for path in rates if "students" in path), default=0
    )
    on_gpu = any("gpu_mib" in one for results in report["measured"].values() for one in results)
    lines = [
        "| path | seconds | images a second, median (range) | ratio | peak MiB of a process |"
        + " peak MiB of tensors on the GPU |" * on_gpu,
        "| --- | ---: | ---: | ---: | ---: |" + " ---: |" * on_gpu,
    ]
    for path, some in rates.items():
        middle = statistics.median(some)
        seconds = statistics.median(one["seconds"] for one in report["measured"][path])
        peak = max(one["peak_mib"] for one in report["measured"][path])
        ratio = f"{middle / students:.2f}" if students else "–"
        on_it = max(one.get("gpu_mib", 0) for one in report["measured"][path])
        lines.append(
            f"| {path} | {seconds:,.1f} | {middle:,.0f} ({min(some):,.0f} to {max(some):,.0f}) "
            f"| {ratio} | {peak:,.0f} |" + f" {on_it:,.0f} |" * on_gpu
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
