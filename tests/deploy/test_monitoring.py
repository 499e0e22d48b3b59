"""Dashboard and alerts name only metrics and label values that exist."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tgis.observe.table import TABLE

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "alerts" / "tgis.rules.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "tgis.json"
GUIDE = ROOT / "docs" / "operations.md"
SPECS = {spec.name: spec for spec in TABLE}
NOT_HISTOGRAMS = ("counter", "gauge")


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries() -> Iterator[str]:
    board = json.loads(DASHBOARD.read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (item["definition"] for item in board["templating"]["list"] if "definition" in item)


QUERIES = sorted({rule["expr"] for rule in alerts()} | set(dashboard_queries()))


def samples() -> dict[str, str]:
    """Every sample's name, and that of its metric."""
    names = {}
    for spec in TABLE:
        if spec.kind == "counter":
            names |= {spec.name: spec.name, f"{spec.name}_total": spec.name}
        elif spec.kind == "gauge":
            names[spec.name] = spec.name
        else:
            suffixes = ("_sum", "_count", "_bucket")
            names |= {spec.name + suffix: spec.name for suffix in suffixes}
    return names


SAMPLES = samples()


@pytest.mark.parametrize("query", QUERIES)
def test_queries_name_what_exists(query: str) -> None:
    found = re.findall(r"\b(tgi_\w+)(?:\{([^}]*)\})?", query)
    assert found or "up{" in query
    for name, selector in found:
        assert name in SAMPLES, name
        labels = SPECS[SAMPLES[name]].labels
        for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', selector):
            if label != "instance":
                values = value.split("|") if operator == "=~" else [value]
                assert set(values) <= set(labels[label]), (name, label)
    by = re.findall(r"by \(([^)]*)\)", query)
    known = {"instance", "le"} | {x for name, _ in found for x in SPECS[SAMPLES[name]].labels}
    assert {label.strip() for part in by for label in part.split(",")} <= known


def test_the_dashboard_is_what_the_tool_writes() -> None:
    command = [sys.executable, ROOT / "tools" / "generate_dashboard.py", "--check"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    board = json.loads(DASHBOARD.read_text())
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers)) > 20


def test_every_alert_is_complete_and_explained() -> None:
    guide = GUIDE.read_text()
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names)) > 10
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        assert rule["alert"] in guide, f"{rule['alert']} is not in {GUIDE.name}"


@pytest.mark.parametrize("arguments", [("check", "rules", RULES), ("test", "rules", "alerts.yaml")])
def test_promtool(arguments: tuple[str | Path, ...]) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("no promtool (it comes with Prometheus) to check with")
    result = subprocess.run(
        [promtool, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
