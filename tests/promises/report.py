"""Writes the figures of `make promises` into docs/reliability.md, between the two marks."""

import json
import sys

from .figures import RESULTS, ROOT, Figure
from .test_promises import NAMES

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: made by `make promises` -->", "<!-- end of figures -->"


def number(figure: Figure) -> str:
    """A value for the table."""
    digits = f"{figure.value:,.0f}" if abs(figure.value) >= 100 else f"{figure.value:.3g}"
    return f"{digits}{figure.unit}"


def table(name: str) -> list[str]:
    """One promise."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    form, flag = ("", " --full") if record["full"] else (" (short form)", "")
    when = f"{record['date']}, {record['seconds']:,.0f} s"
    lines = [f"### {record['title']}{form}", ""]
    lines += [f"`python -m tests.promises.{name}{flag}`, {when}", ""]
    lines += ["| | measured | promised | |", "|---|---|---|---|"]
    for item in record["figures"]:
        figure = Figure(**item)
        limit = ""
        if figure.limit is not None:
            limit = f"{'≥' if figure.least else '≤'} {figure.limit:g}{figure.unit}"
        verdict = "" if figure.limit is None else "holds" if figure.holds else "**does not hold**"
        lines.append(f"| {figure.what} | {number(figure)} | {limit} | {verdict} |")
    return [*lines, ""]


def main() -> int:
    """Entry point."""
    missing = [name for name in NAMES if not (RESULTS / f"{name}.json").exists()]
    for name in missing:
        print(f"no figures of {name}: python -m tests.promises.{name} --full --save")
    lines = [line for name in NAMES if name not in missing for line in table(name)]
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    body = "\n".join([BEGIN, "", *lines, END])
    PAGE.write_text(head + body + tail)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
