"""Compare tgis with its peers on this machine.

    python -m benchmarks.peers --work /tmp/peers
    python -m benchmarks.peers --work /tmp/peers --shapes M --peers openvino --rounds 1

Makes random-weight checkpoints M and L, installs each peer into an environment of its own under
--work, converts the checkpoints for it, and offers the workloads of benchmarks/load.py to everybody
in alternation, three rounds, with all others stopped meanwhile. Medians go to --results as JSON;
`python -m benchmarks.peers.report` makes the table and the plot of docs/performance.md from it.
A peer that cannot be installed, converted or run is reported with the reason.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.load import Call, workloads
from benchmarks.models import SHAPES, make_model
from benchmarks.peers.contestants import Contestant, start
from benchmarks.peers.figures import Figures, Machine, roofline
from benchmarks.peers.install import RECIPES, convert, install

log = logging.getLogger("benchmarks.peers")
STATIC_BATCHES = {"transformers": ("W1", "8", "W2", "W4")}  # what a static batch can do


def shape_workloads(shape: str) -> dict[str, list[Call]]:
    """M's workloads; L's are smaller."""
    calls = workloads()
    if shape == "L":
        return {"W1": calls["W1"], "W2": calls["8"], "W4": calls["W4"]}
    return {name: calls[name] for name in ("W1", "8", "W2", "W3", "W4")}


class Contest:
    """One shape in one precision: everybody who starts, and all they did.

    Args:
        failures: "peer precision" -> why it could not take part.
    """

    def __init__(self, shape: str, precision: str, work: Path, failures: dict[str, str]) -> None:
        self.shape, self.precision = shape, precision
        self._work = work
        self._failures = failures
        self._model = make_model(shape, work / f"model-{shape}")
        self._entered: dict[str, Contestant] = {}
        self.versions: dict[str, str] = {}

    def enter(self, peer: str) -> None:
        """Install, convert, start."""
        where = f"{peer}, {self.shape}, {self.precision}"
        converted, error = self._model, None
        if peer != "tgis":
            error = install(peer, self._work)
            if error is None:
                converted, error = convert(peer, self.precision, self._model, self._work)
        if error is None:
            try:
                entrant = start(peer, self.precision, self._model, converted, self._work)
            except RuntimeError as failure:
                error = str(failure)
            else:
                entrant.pause()
                self._entered[peer] = entrant
                self.versions[peer] = entrant.version
        if error is not None:
            log.warning("%s: %s", where, error)
            self._failures[where] = error

    def run(self, rounds: int) -> dict[str, dict[str, Figures]]:
        """Workload -> peer -> medians, after one round to warm up."""
        runs: dict[str, dict[str, list[Figures]]] = {}
        for number in range(-1, rounds):
            for name, calls in shape_workloads(self.shape).items():
                for peer in list(self._entered):
                    if name not in STATIC_BATCHES.get(peer, (name,)):
                        continue
                    figures = self._one(peer, name, calls)
                    if figures is not None and number >= 0:
                        runs.setdefault(name, {}).setdefault(peer, []).append(figures)
        return {
            name: {peer: Figures.median(of) for peer, of in peers.items()}
            for name, peers in runs.items()
        }

    def roofline(self, machine: Machine) -> dict[str, float]:
        """Workload -> tokens per second at most."""
        return {
            name: roofline(machine, self._model, self.precision, calls)
            for name, calls in shape_workloads(self.shape).items()
        }

    def close(self) -> None:
        """End everybody."""
        for entrant in self._entered.values():
            entrant.close()

    def _one(self, peer: str, name: str, calls: list[Call]) -> Figures | None:
        entrant = self._entered[peer]
        try:
            figures = entrant.run(calls)
        except RuntimeError as failure:
            log.warning("%s fails %s: %s", peer, name, failure)
            self._failures[f"{peer}, {self.shape}, {self.precision}, {name}"] = str(failure)
            self._entered.pop(peer).close()
            return None
        entrant.pause()
        log.info("%s %s %-12s %-3s %8.1f", self.shape, self.precision, peer, name, figures.rate)
        return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="environments and models")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["M", "L"])
    parser.add_argument(
        "--precisions", nargs="+", choices=["bf16", "int8"], default=["bf16", "int8"]
    )
    parser.add_argument("--peers", nargs="*", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--install-only", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/peers.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    arguments.work.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    results = []
    for shape in arguments.shapes:
        for precision in arguments.precisions:
            contest = Contest(shape, precision, arguments.work.resolve(), failures)
            try:
                for peer in ["tgis", *arguments.peers]:
                    if peer == "tgis" or precision in RECIPES[peer].convert:
                        contest.enter(peer)
                if arguments.install_only:
                    continue
                machine = Machine.measure()
                medians = contest.run(arguments.rounds)
                ceiling = contest.roofline(machine)
            finally:
                contest.close()
            results.append(
                {
                    "shape": shape,
                    "precision": precision,
                    "machine": asdict(machine),
                    "roofline": ceiling,
                    "versions": contest.versions,
                    "figures": {
                        name: {peer: asdict(figures) for peer, figures in peers.items()}
                        for name, peers in medians.items()
                    },
                }
            )
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            document = {"rounds": arguments.rounds, "results": results, "failures": failures}
            arguments.results.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
