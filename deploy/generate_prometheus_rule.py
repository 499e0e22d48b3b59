"""Writes deployment/monitoring/prometheus-rule.yaml: the alerts for the Prometheus operator.

`--check` changes nothing and says whether the file is up to date.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "deploy" / "alerts" / "tgis.rules.yaml"
TARGET = ROOT / "deployment" / "monitoring" / "prometheus-rule.yaml"
HEAD = """\
# Made by deploy/generate_prometheus_rule.py from deploy/alerts/tgis.rules.yaml: do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: tgis
spec:
"""


def text() -> str:
    """The file as it should be."""
    lines = RULES.read_text().splitlines()
    body = (f"  {line}".rstrip() for line in lines[lines.index("groups:") :])
    return HEAD + "\n".join(body) + "\n"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    if parser.parse_args().check:
        return TARGET.read_text() != text()
    TARGET.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
