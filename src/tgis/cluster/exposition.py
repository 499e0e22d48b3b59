"""Pages of metrics of several replicas as one page."""

from collections.abc import Mapping


def merge(pages: Mapping[str, str]) -> str:
    """One page in Prometheus' text format: every sample gets a label `replica`.

    Args:
        pages: by name of the replica.
    """
    families: dict[str, list[str]] = {}
    for replica, page in pages.items():
        lines: list[str] = []
        for line in page.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                is_new = name not in families
                lines = families.setdefault(name, [line])
            elif line.startswith("#"):
                if is_new:
                    lines.append(line)
            elif line:
                lines.append(_labelled(line, replica))
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _labelled(sample: str, replica: str) -> str:
    label = f'replica="{replica}"'
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
