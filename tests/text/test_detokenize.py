"""Detokenisation: streamed text against the text at once, and that against the library's own."""

import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from tgis.text.detokenize import Detokenizer
from tgis.types import ModelKind

CAUSAL, SEQ2SEQ = ModelKind.DECODER_ONLY, ModelKind.ENCODER_DECODER
BROKEN = "\ufffd"

SPECIAL = ["<unk>", "<s>", "</s>"]
EOS = SPECIAL.index("</s>")
# fmt: off
TOKENS = [
    *SPECIAL, "A", "b", "▁", "▁a", "▁▁c▁d", "c</w>", "d</w>e", "</w>", "##f", ".", " ", "do not",
    "'s", "|", "<pad>", "h", "_x_", "__", "Ġ", "Ġhi", "Ã", "©", "Ãł", "ð", "Ł", "ĺ", "Ģ", "Ċ",
    "<0x41>", "<0x20>", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0xFF>",
    "<0x+1>", "<0xff", "é", "日本", BROKEN, f"x{BROKEN}",
]
# fmt: on
space = decoders.Replace("▁", " ")
fallback, fuse = decoders.ByteFallback(), decoders.Fuse()
DECODERS = {
    "none": None,
    "byte_level": decoders.ByteLevel(),
    "byte_level_nested": decoders.Sequence([decoders.Sequence([decoders.ByteLevel()])]),
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "word_piece": decoders.WordPiece(),
    "word_piece_plain": decoders.WordPiece(cleanup=False),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "llama": decoders.Sequence([space, fallback, fuse, decoders.Strip(" ", 1, 0)]),
    "llama_strip_2": decoders.Sequence([space, fallback, fuse, decoders.Strip(" ", 2, 0)]),
    "gemma": decoders.Sequence([space, fallback, fuse]),
    "characters": decoders.Sequence([space, fuse, decoders.Strip(" ", 1, 0)]),
    "byte_fallback": fallback,
    "fuse": fuse,
    "strip": decoders.Strip("_", 1, 1),
    "replace": space,
    "replace_byte_level": decoders.Sequence([space, decoders.ByteLevel()]),
    "bpe_fuse": decoders.Sequence([decoders.BPEDecoder(), fuse]),
    "ctc_fuse": decoders.Sequence([decoders.CTC(), fuse]),
    "metaspace_strip": decoders.Sequence([decoders.Metaspace(), fuse, decoders.Strip(" ", 1, 0)]),
}
WINDOWS = {"replace_byte_level", "metaspace_strip"}
# Decoders for which a causal model's output is decoded after some other token.
NO_CONTEXT = {"none", "byte_level", "byte_level_nested", "bpe", "bpe_fuse", "ctc", "ctc_fuse"}
SHARED = {
    "tokenizers/llama2": "llama",
    "tokenizers/gpt2": "byte_level",
    "tokenizers/gpt-neox-pythia": "byte_level",
    "tokenizers/starcoder": "byte_level",
    "tokenizers/clip": "byte_level",
    "tokenizers/t5-small": "metaspace",
    "tokenizers/bert-uncased": "word_piece",
    "models/stories260K": "llama",
    "models/babyllama105": "characters",
}

quick = settings(max_examples=40, deadline=None, derandomize=True)
modes = pytest.mark.parametrize(
    ("kind", "show_special"), [(k, s) for k in ModelKind for s in (False, True)]
)


def small_tokenizer(name: str) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("   plain ü", normalized=False)])
    if DECODERS[name] is not None:
        tokenizer.decoder = DECODERS[name]
    return tokenizer


SMALL = {name: small_tokenizer(name) for name in DECODERS}
NUM_TOKENS = len(TOKENS) + 2  # one added, one unknown


def detokenizer(
    tokenizer: Tokenizer, kind: ModelKind, show_special: bool = False, eos: Sequence[int] = (EOS,)
) -> Detokenizer:
    return Detokenizer(tokenizer, kind, eos_token_ids=eos, output_special_tokens=show_special)


def stream(detok: Detokenizer, ids: Sequence[int]) -> list[str]:
    text = detok.stream()
    return [*map(text.add, ids), text.finish()]


def library_text(
    tokenizer: Tokenizer, name: str, kind: ModelKind, show_special: bool, ids: list[int]
) -> str:
    """The rules of the TGIS api, on top of the library's `decode`."""
    if show_special and ids and ids[-1] == EOS:
        ids = ids[:-1]

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=not show_special))

    context = tokenizer.token_to_id("A") or tokenizer.token_to_id("a")
    if kind is SEQ2SEQ or name in NO_CONTEXT:
        text = decode(ids)
        text = " " + text if name == "none" and kind is CAUSAL and text else text
    else:
        text = decode([context, *ids])[1:]
    return text.rstrip(BROKEN)


def breaks_characters(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether the library would break whole characters for an incomplete one after them."""
    strings = [tokenizer.id_to_token(i) or "" for i in ids]
    strings = [s for s in strings if s not in SPECIAL and s]
    for is_byte, run in groupby(strings, lambda s: s.startswith("<0x") and s.endswith(">")):
        if is_byte:
            data = bytes(int(s[3:5], 16) for s in run)
            valid = data.decode(errors="ignore").encode()
            if valid and valid != data:
                return True
    return False


@modes
@pytest.mark.parametrize("name", DECODERS)
@quick
@given(ids=st.lists(st.integers(0, NUM_TOKENS - 1), max_size=12))
def test_small_tokenizers(name: str, kind: ModelKind, show_special: bool, ids: list[int]) -> None:
    tokenizer = SMALL[name]
    detok = detokenizer(tokenizer, kind, show_special)
    chunks = stream(detok, ids)
    assert "".join(chunks) == detok.text(ids)
    if not breaks_characters(tokenizer, ids):
        assert detok.text(ids) == library_text(tokenizer, name, kind, show_special, ids)
    if name not in WINDOWS | {"bpe", "bpe_fuse"}:  # nothing is held without need
        for n in range(len(ids)):
            assert "".join(chunks[:n]) == detok.text(ids[:n])


def neighbourhoods(ids: Sequence[int], num_ids: int, rng: random.Random) -> Iterator[list[int]]:
    """Each id between random others, and by itself."""
    for token_id in ids:
        yield [token_id]
        before = [rng.randrange(num_ids) for _ in range(rng.randrange(4))]
        after = [rng.randrange(num_ids) for _ in range(rng.randrange(4))]
        yield [*before, token_id, *after]


def check_real_tokenizer(shared_dir: Path, path: str, kind: ModelKind, sample: int | None) -> None:
    tokenizer = Tokenizer.from_file(str(shared_dir / path / "tokenizer.json"))
    num_ids, rng = tokenizer.get_vocab_size(), random.Random(path)
    ids = list(range(num_ids))
    detoks = [(show, detokenizer(tokenizer, kind, show)) for show in (False, True)]
    for sequence in neighbourhoods(rng.sample(ids, sample) if sample else ids, num_ids, rng):
        for show, detok in detoks:
            text = detok.text(sequence)
            assert "".join(stream(detok, sequence)) == text
            if not breaks_characters(tokenizer, sequence):
                expected = library_text(tokenizer, SHARED[path], kind, show, sequence)
                assert text == expected, sequence


@pytest.mark.parametrize("kind", ModelKind)
@pytest.mark.parametrize("path", SHARED)
def test_ids_of_real_tokenizers(shared_dir: Path, path: str, kind: ModelKind) -> None:
    check_real_tokenizer(shared_dir, path, kind, sample=100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ModelKind)
@pytest.mark.parametrize("path", SHARED)
def test_all_ids_of_real_tokenizers(shared_dir: Path, path: str, kind: ModelKind) -> None:
    check_real_tokenizer(shared_dir, path, kind, sample=None)


@pytest.mark.parametrize("path", SHARED)
def test_text_of_real_tokenizers_comes_back(shared_dir: Path, path: str) -> None:
    text = "once upon a time, zoë's naïve 日本 façade: 😀😀!"
    tokenizer = Tokenizer.from_file(str(shared_dir / path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for kind in ModelKind:
        detok = detokenizer(tokenizer, kind)
        released = "".join(stream(detok, ids))
        assert released == library_text(tokenizer, SHARED[path], kind, False, ids)
        if SHARED[path] in ("llama", "byte_level") and "clip" not in path:
            is_spaced = SHARED[path] == "llama" and kind is CAUSAL
            assert released == (" " + text if is_spaced else text)


byte_runs = st.lists(
    st.one_of(
        st.sampled_from(["é", "日", "😀", "a"]).map(str.encode),
        st.sampled_from(["é", "日", "😀"]).map(lambda char: char.encode()[:-1]),
        st.binary(max_size=2),
    ),
    max_size=4,
).map(b"".join)


@quick
@given(byte_runs, st.binary(max_size=3))
@example("😀😀".encode()[:-1], b"")
@example("é".encode(), b"\xff")
def test_complete_characters_of_a_byte_run_survive(run: bytes, other: bytes) -> None:
    tokens = ["A", "x", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="x"))
    tokenizer.decoder = DECODERS["llama"]
    detok = detokenizer(tokenizer, CAUSAL, eos=())

    def spelled(data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return data[: error.start].decode() + BROKEN * (len(data) - error.start)

    ids = [*(2 + byte for byte in run), 1, *(2 + byte for byte in other)]
    expected = (spelled(run) + "x" + spelled(other)).rstrip(BROKEN)
    assert detok.text(ids) == "".join(stream(detok, ids)) == expected


@quick
@given(st.lists(st.integers(0, 255), max_size=12))
def test_byte_level_text_is_what_the_bytes_spell(data: list[int]) -> None:
    """All 256 bytes as tokens, so every possible UTF-8 error."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    tokenizer.add_tokens([chr(b if b in printable else next(others)) for b in range(256)])
    detok = detokenizer(tokenizer, CAUSAL, eos=())
    released = "".join(stream(detok, data))
    assert released == bytes(data).decode(errors="replace").rstrip(BROKEN) == detok.text(data)


def ids_of(*tokens: str) -> list[int]:
    return [TOKENS.index(token) for token in tokens]


@pytest.mark.parametrize(
    ("name", "tokens", "causal", "seq2seq"),
    [
        ("llama", ["▁a", "b", "▁a"], [" a", "b", " a", ""], ["a", "b", " a", ""]),
        ("llama", ["▁a", "<0xC3>", "<0xA9>", "b"], [" a", "", "é", "b", ""], None),
        ("llama", ["b", "<0xC3>", "b"], ["b", "", BROKEN + "b", ""], None),
        ("llama", ["b", "<0xC3>"], ["b", "", ""], ["b", "", ""]),
        ("metaspace", ["▁a", "▁a"], [" a", " a", ""], ["a", " a", ""]),
        ("word_piece", ["h", "##f", "."], [" h", "f", ".", ""], ["h", "f", ".", ""]),
        ("none", ["h", "b"], [" h", " b", ""], ["h", " b", ""]),
        ("byte_level", ["Ġhi", "Ã", "©"], [" hi", "", "é", ""], None),
        ("byte_level", ["ð", "Ł", "b"], ["", "", BROKEN + "b", ""], None),
        ("byte_level", ["b", "ð", "Ł"], ["b", "", "", ""], None),
        ("bpe", ["h", "c</w>", "c</w>"], ["h", "c", " c", ""], None),
        ("bpe", ["h", "d</w>e"], ["h", "d", "e"], None),
        ("ctc", ["h", "h", "<pad>", "h", "|", "b"], ["h", "", "", "h", " ", "b", ""], None),
    ],
)
def test_chunks(name: str, tokens: list[str], causal: list[str], seq2seq: list[str] | None) -> None:
    assert stream(detokenizer(SMALL[name], CAUSAL), ids_of(*tokens)) == causal
    if seq2seq is not None:
        assert stream(detokenizer(SMALL[name], SEQ2SEQ), ids_of(*tokens)) == seq2seq


@pytest.mark.parametrize(
    ("tokens", "hidden", "shown"),
    [
        (["<s>", "b", "</s>"], "b", "<s>b"),
        (["b", "</s>", "h", "</s>", "</s>"], "bh", "b</s>h</s>"),
        (["</s>"], "", ""),
        (["b", "<unk>"], "b", "b<unk>"),
        ([], "", ""),
    ],
)
def test_special_tokens(tokens: list[str], hidden: str, shown: str) -> None:
    for show_special, expected in ((False, hidden), (True, shown)):
        detok = detokenizer(SMALL["llama"], CAUSAL, show_special)
        ids = ids_of(*tokens)
        assert "".join(stream(detok, ids)) == detok.text(ids) == expected


def test_any_of_several_eos_is_stripped_at_the_end() -> None:
    detok = detokenizer(SMALL["llama"], CAUSAL, True, eos=ids_of("</s>", "h"))
    ids = ids_of("h", "</s>", "b", "h")
    assert stream(detok, ids) == ["", "h", "</s>b", "", ""]
    assert detok.text(ids) == "h</s>b"


def test_streams_do_not_disturb_each_other() -> None:
    detok = detokenizer(SMALL["byte_level"], CAUSAL)
    one, two = detok.stream(), detok.stream()
    first, second = ids_of("Ã", "©")
    assert one.add(first) == ""
    assert two.add(second) == ""
    assert one.add(second) == "é"
    assert two.finish() == ""
