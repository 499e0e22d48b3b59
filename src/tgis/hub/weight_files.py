"""Which files of a model directory hold weights (TGIS operations §6)."""

from pathlib import Path

# A directory of converted files on the way to their places.
CONVERTED = ".converted"
_NOT_WEIGHTS = ("arguments", "args", "training", "optimizer", "scheduler", "index")


def weight_files(model_dir: Path, suffix: str) -> list[Path]:
    """The weight files of a directory with a suffix such as ".bin", sorted."""
    return [
        path
        for path in sorted(model_dir.glob(f"*{suffix}"))
        if not any(word in path.name for word in _NOT_WEIGHTS)
    ]


def has_safetensors(model_dir: Path) -> bool:
    """Whether a model's safetensors are there, and none of them still on its way."""
    return bool(weight_files(model_dir, ".safetensors")) and not (model_dir / CONVERTED).is_dir()
