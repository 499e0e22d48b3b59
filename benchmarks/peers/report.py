"""The table and the plot of benchmarks.peers for docs/performance.md.

python -m benchmarks.peers.report [results.json]

Writes the part of docs/performance.md between its `peers` marks, and docs/images/peers.svg.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "images" / "peers.svg"
MARKS = re.compile(r"(?<=<!-- peers -->\n).*?(?=<!-- /peers -->)", re.DOTALL)

Result = dict[str, Any]


def cell(figures: dict[str, float] | None) -> str:
    """Tokens per second."""
    return "–" if figures is None else f"{figures['rate']:,.4g}"


def milliseconds(value: float) -> str:
    """A time, or that nobody told it."""
    return "–" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(result: Result) -> list[str]:
    """One shape in one precision."""
    figures = result["figures"]
    everybody = [name for name in result["versions"] if name != "tgis"]
    titles = ["tokens/s", "tgis", *everybody, "of the best peer", "of the roofline"]
    titles += ["tgis TTFT ms", "ITL p50 / p99 ms", "best peer's TTFT ms"]
    lines = ["", f"**{result['shape']}, {result['precision']}**", ""]
    lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, entrants in figures.items():
        ours = entrants.get("tgis")
        peers = [entrants[peer] for peer in everybody if peer in entrants]
        cells = [name, cell(ours), *(cell(entrants.get(peer)) for peer in everybody)]
        if ours is None or not peers:
            continue
        best = max(peer["rate"] for peer in peers)
        first = [peer["ttft"] for peer in peers if not math.isnan(peer["ttft"])]
        cells.append(f"**{ours['rate'] / best:.2f}×**")
        cells.append(f"{ours['rate'] / result['roofline'][name]:.0%}")
        cells.append(milliseconds(ours["ttft"]))
        cells.append(f"{milliseconds(ours['itl_p50'])} / {milliseconds(ours['itl_p99'])}")
        cells.append(milliseconds(min(first, default=math.nan)))
        lines.append("| " + " | ".join(cells) + " |")
    machine = result["machine"]
    lines += [
        "",
        f"Read {machine['bandwidth'] / 1e9:.0f} GB/s, bf16 {machine['bf16'] / 1e9:.0f} GFLOP/s,"
        f" int8 {machine['int8'] / 1e9:.0f} GOP/s in that run.",
    ]
    return lines


def page(document: dict[str, Any]) -> str:
    """All tables, versions and failures as Markdown."""
    lines: list[str] = []
    versions: dict[str, str] = {}
    for result in document["results"]:
        lines += table(result)
        versions |= result["versions"]
    named = ", ".join(f"{peer} {version}" for peer, version in versions.items())
    lines += ["", f"Medians of {document['rounds']} rounds in alternation. Versions: {named}."]
    for where, why in document["failures"].items():
        lines += ["", f"Did not take part: {where}: {why}"]
    return "\n".join([*lines, "", "![tgis and its peers](images/peers.svg)", ""])


def plot(results: list[Result]) -> None:
    """Bars of each workload, in shares of the best peer."""
    figure, axes = pyplot.subplots(1, len(results), figsize=(4.2 * len(results), 3.4), sharey=True)
    for axis, result in zip(axes if len(results) > 1 else [axes], results, strict=True):
        everybody = list(result["versions"])
        for number, (_, entrants) in enumerate(result["figures"].items()):
            best = max((f["rate"] for p, f in entrants.items() if p != "tgis"), default=math.nan)
            for place, peer in enumerate(everybody):
                if peer in entrants:
                    left = number + (place - len(everybody) / 2) * 0.8 / len(everybody)
                    height = entrants[peer]["rate"] / best
                    axis.bar(left, height, 0.8 / len(everybody), align="edge", color=f"C{place}")
        axis.set_xticks(range(len(result["figures"])), list(result["figures"]))
        axis.set_title(f"{result['shape']} {result['precision']}")
        axis.axhline(1, color="grey", linewidth=0.8)
        bars = [mpl.patches.Patch(color=f"C{place}") for place in range(len(everybody))]
        axis.legend(bars, everybody, fontsize=7)
    figure.supylabel("tokens/s, best peer = 1")
    figure.tight_layout()
    figure.savefig(PLOT)


def main() -> None:
    """Command line."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks/results/peers.json"
    document = json.loads(path.read_text())
    plot(document["results"])
    text = PAGE.read_text()
    if not MARKS.search(text):
        raise SystemExit(f"{PAGE} has no <!-- peers --> marks")
    PAGE.write_text(MARKS.sub(lambda _: page(document), text))


if __name__ == "__main__":
    main()
