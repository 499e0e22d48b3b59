"""Linear layers: the format of a weight decides its layer."""
