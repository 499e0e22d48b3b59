"""Write deploy/grafana/tgis.json, the Grafana dashboard, from the table of panels below.

python tools/generate_dashboard.py          write the file
python tools/generate_dashboard.py --check  exit with 1 if it is not up to date
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).parents[1] / "deploy" / "grafana" / "tgis.json"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_WHERE = 'instance=~"$instance"'


class Panel(NamedTuple):
    """One graph: queries and their legends."""

    title: str
    unit: str
    queries: dict[str, str]  # legend -> PromQL, with `@` for the selection of instances


def _rate(name: str, by: str, legend: str = "") -> dict[str, str]:
    return {legend or f"{{{{{by}}}}}": f"sum by ({by}) (rate({name}{{@}}[$__rate_interval]))"}


def _quantiles(name: str) -> dict[str, str]:
    buckets = f"sum by (le) (rate({name}_bucket{{@}}[$__rate_interval]))"
    return {f"p{n}": f"histogram_quantile({n / 100:g}, {buckets})" for n in (50, 95, 99)}


def _per_second(name: str) -> str:
    return f"sum(rate({name}{{@}}[$__rate_interval]))"


ROWS: dict[str, list[Panel]] = {
    "Service": [
        Panel("State", "short", {"{{instance}} {{state}}": "tgi_health_state{@} == 1"}),
        Panel("Requests", "reqps", _rate("tgi_request_count_total", "kind")),
        Panel("Failures by cause", "reqps", _rate("tgi_request_failure_total", "err")),
        Panel("Inputs completed", "reqps", _rate("tgi_request_success_total", "stop_reason")),
        Panel("Core lost", "short", {"{{instance}}": "increase(tgi_core_lost_count_total{@}[1h])"}),
        Panel("Model loaded", "percentunit", {"{{instance}}": "tgi_model_load_ratio{@}"}),
    ],
    "Latency": [
        Panel("First token", "s", _quantiles("tgi_request_time_to_first_token_duration")),
        Panel("Between tokens", "s", _quantiles("tgi_request_inter_token_duration")),
        Panel("Whole request", "s", _quantiles("tgi_request_duration")),
        Panel("In the queue", "s", _quantiles("tgi_request_queue_duration")),
        Panel("Validation", "s", _quantiles("tgi_request_validation_duration")),
        Panel("Inference", "s", _quantiles("tgi_request_inference_duration")),
    ],
    "Load": [
        Panel(
            "Queue and batch",
            "short",
            {"waiting": "sum(tgi_queue_size{@})", "running": "sum(tgi_batch_current_size{@})"},
        ),
        Panel(
            "Tokens",
            "short",
            {
                "input/s": _per_second("tgi_request_input_length_sum"),
                "generated/s": _per_second("tgi_request_inter_token_duration_count")
                + " + "
                + _per_second("tgi_request_time_to_first_token_duration_count"),
            },
        ),
        Panel("Key/value memory", "percentunit", {"{{instance}}": "tgi_kv_cache_usage{@}"}),
        Panel("Preemptions", "ops", {"all": _per_second("tgi_preemption_count_total")}),
        Panel("Input length", "short", _quantiles("tgi_request_input_length")),
        Panel("Generated tokens", "short", _quantiles("tgi_request_generated_tokens")),
    ],
    "Engine": [
        Panel("Steps", "ops", _rate("tgi_batch_inference_count_total", "method")),
        Panel("Step", "s", _quantiles("tgi_batch_inference_duration")),
        Panel("Failed steps", "ops", _rate("tgi_batch_inference_failure_total", "reason")),
    ],
    "Access": [
        Panel(
            "Certificate expires in",
            "s",
            {"{{instance}}": "(tgi_tls_certificate_expiry_seconds{@} > 0) - time()"},
        ),
        Panel("Changed on disk", "short", _rate("tgi_credentials_reload_count_total", "result")),
        Panel("Refused calls", "reqps", _rate("tgi_auth_failure_total", "reason")),
    ],
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": "tgis",
        "title": "tgis",
        "tags": ["tgis"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_data_source(), _instances()]},
        "panels": _panels(),
    }


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}


def _instances() -> dict[str, Any]:
    query = "label_values(tgi_request_count_total, instance)"
    return {
        "name": "instance",
        "type": "query",
        "datasource": _source(),
        "query": {"query": query, "refId": "instances"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": _WIDTH * _COLUMNS, "x": 0, "y": y}
        panels.append({"type": "row", "title": title, "gridPos": place, "panels": []})
        for number, panel in enumerate(row):
            x, line = number % _COLUMNS * _WIDTH, number // _COLUMNS
            place = {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y + 1 + line * _HEIGHT}
            panels.append(_panel(panel, place))
        y += 1 + _HEIGHT * -(-len(row) // _COLUMNS)
    return [{"id": number, **panel} for number, panel in enumerate(panels, 1)]


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": _source(),
            "expr": query.replace("@", _WHERE),
            "legendFormat": legend,
        }
        for number, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "gridPos": place,
        "datasource": _source(),
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def main() -> int:
    """Write or check the file."""
    text = json.dumps(dashboard(), indent=2) + "\n"
    if "--check" in sys.argv[1:]:
        return int(PATH.read_text() != text)
    PATH.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
