"""Block layout: keys and values live in fixed-size blocks, listed per sequence in a block table.

Full blocks have the names of the prefixes that they end; sequences that begin alike share them by
reference count, without copies. A block that nobody refers to keeps its name until it is wanted.
"""

from collections import OrderedDict
from collections.abc import Iterator

from tgis.core.kv.prefix import PrefixNames
from tgis.core.sequence import Sequence
from tgis.engines.plan import KvCopy


class BlocksMemory:
    """Accounts of the block layout.

    Args:
        num_slots: sequences that can be open at the same time.
        num_blocks: blocks in the pool.
        block_tokens: tokens in a block.
        caching: keep the blocks of ended sequences.
    """

    def __init__(
        self, num_slots: int, num_blocks: int, block_tokens: int, *, caching: bool = True
    ) -> None:
        self.total = num_blocks * block_tokens
        self.caching = caching
        self._block_tokens = block_tokens
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}  # slot -> blocks
        self._num_refs = [0] * num_blocks
        self._name_of: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._free_blocks = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # named, no references; LRU first
        self._names = PrefixNames(block_tokens)

    @property
    def used(self) -> int:
        """Tokens held by open sequences."""
        return self.total - self.cached - self.free

    @property
    def cached(self) -> int:
        """Tokens of ended sequences that are kept for reuse."""
        return len(self._evictable) * self._block_tokens

    @property
    def free(self) -> int:
        """Tokens neither used nor cached."""
        return len(self._free_blocks) * self._block_tokens

    def open(self, seq: Sequence, num_tokens: int) -> bool:
        """See `KvMemory.open`."""
        if not self._free_slots:
            return False
        table = self._find(seq)
        for block in table:
            self._refer(block)
        shared = len(table)
        if not self._extend(table, num_tokens):
            self._give_back(table)
            return False
        seq.slot = self._free_slots.pop()
        seq.block_table = self._tables[seq.slot] = table
        seq.num_computed = shared * self._block_tokens
        seq.room = len(table) * self._block_tokens
        return True

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """See `KvMemory.reserve`."""
        if not self._extend(seq.block_table, num_tokens):
            return False
        seq.room = len(seq.block_table) * self._block_tokens
        return True

    def commit(self, seq: Sequence) -> None:
        """See `KvMemory.commit`; of blocks with equal contents the first keeps the name."""
        if not self.caching:
            return
        names = self._names.of(seq, seq.num_computed)
        for block, name in zip(seq.block_table, names, strict=False):
            if self._name_of[block] is None and name not in self._index:
                self._name_of[block] = name
                self._index[name] = block

    def close(self, seq: Sequence, keep: bool = True) -> None:
        """See `KvMemory.close`."""
        if keep:
            self.commit(seq)
        else:
            for block in seq.block_table:
                if self._num_refs[block] == 1:
                    self._forget(block)
        self._give_back(seq.block_table)
        self._free_slots.append(seq.slot)
        del self._tables[seq.slot]
        seq.block_table = []
        seq.slot, seq.room, seq.num_computed = -1, 0, 0

    def drain_copies(self) -> list[KvCopy]:
        """No copies: blocks are shared."""
        return []

    def drain_released(self) -> list[int]:
        """Nothing goes back to the operating system."""
        return []

    def check(self) -> str | None:
        """See `KvMemory.check`."""
        return next(self._faults(), None)

    def _faults(self) -> Iterator[str]:
        num_refs = [0] * len(self._num_refs)
        for table in self._tables.values():
            for block in table:
                num_refs[block] += 1
        if num_refs != self._num_refs:
            yield "reference counts do not match the block tables"
        in_use = [block for block, count in enumerate(num_refs) if count]
        if sorted([*in_use, *self._evictable, *self._free_blocks]) != list(range(len(num_refs))):
            yield f"{len(in_use)} used + {len(self._evictable)} cached + {len(self._free_blocks)}"
        if sorted([*self._free_slots, *self._tables]) != list(range(self._num_slots)):
            yield f"{len(self._free_slots)} free + {len(self._tables)} open of {self._num_slots}"
        named = {name: block for block, name in enumerate(self._name_of) if name is not None}
        if named != self._index or any(self._name_of[block] for block in self._free_blocks):
            yield "the index of prefixes does not match the blocks"

    def _find(self, seq: Sequence) -> list[int]:
        """The blocks of the longest cached prefix of `seq`."""
        if not self.caching or seq.wants_input_details:
            return []
        blocks = []
        for name in self._names.of(seq, len(seq.token_ids) - 1):
            block = self._index.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _refer(self, block: int) -> None:
        self._num_refs[block] += 1
        self._evictable.pop(block, None)

    def _extend(self, table: list[int], num_tokens: int) -> bool:
        """Add blocks until the table has room for `num_tokens`, or change nothing and say no."""
        more = -(-num_tokens // self._block_tokens) - len(table)
        if more > len(self._free_blocks) + len(self._evictable):
            return False
        for _ in range(more):
            if not self._free_blocks:
                self._evict()
            block = self._free_blocks.pop()
            self._num_refs[block] = 1
            table.append(block)
        return True

    def _evict(self) -> None:
        """Give up the block that has not been used for longest."""
        block, _ = self._evictable.popitem(last=False)
        self._forget(block)
        self._free_blocks.append(block)

    def _forget(self, block: int) -> None:
        name = self._name_of[block]
        if name is not None:
            del self._index[name]
            self._name_of[block] = None

    def _give_back(self, table: list[int]) -> None:
        """Drop references, ends of prefixes first, so that they are also evicted first."""
        for block in reversed(table):
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0:
                if self._name_of[block] is None:
                    self._free_blocks.append(block)
                else:
                    self._evictable[block] = None
