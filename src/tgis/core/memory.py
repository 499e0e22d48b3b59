"""How many tokens' keys and values fit into memory."""

from pathlib import Path

from tgis.errors import ConfigError

# Of the memory that is available once the weights are loaded; the rest is for activations, the
# front, and whatever else runs on the machine.
DEFAULT_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_memory(cgroup: Path = _CGROUP, meminfo: Path = _MEMINFO) -> int:
    """Bytes that this process may still take: the machine's, or less in a limited cgroup (v2)."""
    fields = (line.split() for line in meminfo.read_text().splitlines())
    available = next(int(words[1]) * 1024 for words in fields if words[0] == "MemAvailable:")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        current = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(int(limit) - current, 0))


def kv_capacity(
    memory: int | None, bytes_per_token: int, max_sequence_length: int, max_running: int
) -> int:
    """Tokens that fit.

    Args:
        memory: bytes for keys and values; None = a share of what is available.
        bytes_per_token: keys and values of one token over all layers.

    Raises:
        ConfigError: not even one sequence of full length fits.
    """
    budget = int(available_memory() * DEFAULT_SHARE) if memory is None else memory
    tokens = min(budget // bytes_per_token, max_running * max_sequence_length)
    if tokens < max_sequence_length:
        raise ConfigError(
            f"--max-sequence-length {max_sequence_length}: its keys and values need "
            f"{max_sequence_length * bytes_per_token} bytes, but "
            f"{'memory has' if memory is None else '--kv-cache-memory is'} {budget}; "
            "lower --max-sequence-length or raise --kv-cache-memory"
        )
    return tokens
