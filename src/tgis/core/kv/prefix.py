"""Names of prefixes: a chain of keyed hashes over runs of tokens.

The name of the first n runs depends on all their tokens and on the sequence's salt, so equal names
mean equal prefixes of sequences that may share. The key is random in every process: nobody can
prepare prompts whose names collide.
"""

import secrets
from array import array
from hashlib import blake2b

from tgis.core.sequence import Sequence

_NAME_BYTES = 16


class PrefixNames:
    """Names prefixes of whole runs.

    Args:
        run: tokens of one run.
    """

    def __init__(self, run: int) -> None:
        self.run = run
        self._key = secrets.token_bytes(32)

    def of(self, seq: Sequence, num_tokens: int) -> list[bytes]:
        """Names of the first 1, 2, ... runs that lie within the first `num_tokens` tokens.

        They are made once, and kept in `seq.prefix_names`.
        """
        names, count = seq.prefix_names, num_tokens // self.run
        while len(names) < count:
            names.append(self._name(seq, len(names)))
        return names[:count]

    def _name(self, seq: Sequence, number: int) -> bytes:
        before = seq.prefix_names[-1] if number else seq.salt
        start = number * self.run
        tokens = array("I", seq.token_ids[start : start + self.run])
        digest = blake2b(tokens.tobytes(), digest_size=_NAME_BYTES, key=self._key)
        digest.update(before)
        return digest.digest()
