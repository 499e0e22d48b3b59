"""Text to ids: counts, truncation, BOS, byte offsets, errors."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tgis.errors import GenerationFailed, InvalidRequest, ModelError
from tgis.front.tokenize import TextTokenizer

WORDS = ["<unk>", "<s>", "</s>", "one", "two", "three", "four", "héllo", "日本", "😀"]
Make = Callable[..., TextTokenizer]


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


def word_tokenizer(template: str | None = None) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:3])
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tokenizer


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Saves a tokenizer with its settings and loads it."""
    made: list[TextTokenizer] = []

    def load(
        tokenizer: Tokenizer | None = None,
        settings: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> TextTokenizer:
        if tokenizer is not None:
            tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in (("tokenizer_config", settings), ("config", config)):
            if content is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(content))
        options = {"workers": 2, "max_sequence_length": 64} | options
        made.append(TextTokenizer.load(tmp_path, **options))
        return made[-1]

    yield load
    for tokenizer in made:
        tokenizer.close()


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}


@pytest.mark.parametrize(
    ("truncate", "expected"),
    [
        (0, ids("<s>", "one", "two", "three")),
        (5, ids("<s>", "one", "two", "three")),
        (4, ids("<s>", "one", "two", "three")),
        (3, ids("<s>", "two", "three")),
        (2, ids("<s>", "three")),
        (1, ids("<s>")),
    ],
)
async def test_truncation_keeps_the_last_tokens_after_bos(
    make: Make, truncate: int, expected: list[int]
) -> None:
    tokenizer = make(word_tokenizer("<s> $A"), LLAMA)
    encoding = await tokenizer.encode("one two three", truncate)
    assert encoding.ids == expected
    assert encoding.num_raw_tokens == 4


@pytest.mark.parametrize(
    ("settings", "config", "kept"),
    [
        (LLAMA, None, True),
        (LLAMA | {"add_bos_token": False}, None, False),
        (LLAMA | {"tokenizer_class": "LlamaTokenizerFast"}, None, True),
        (LLAMA | {"bos_token": {"content": "<s>", "lstrip": False}}, None, True),
        (LLAMA | {"bos_token": "not in the vocabulary"}, None, False),
        ({"tokenizer_class": "LlamaTokenizer"}, None, True),  # its BOS is <s> unless named
        ({"bos_token": "<s>"}, {"model_type": "mistral"}, True),
        ({"bos_token": "<s>"}, {"model_type": "falcon"}, False),
        (None, {"model_type": "llama"}, True),
        (None, None, False),
        ({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>"}, None, False),
        (
            {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "add_bos_token": True},
            None,
            True,
        ),
        # A class without the attribute: TGIS does not see what the file says.
        (
            LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
            None,
            False,
        ),
        (LLAMA | {"tokenizer_class": "BertTokenizer"}, None, False),
    ],
)
async def test_which_tokenizers_keep_bos(
    make: Make, settings: dict[str, Any] | None, config: dict[str, Any] | None, kept: bool
) -> None:
    tokenizer = make(word_tokenizer("<s> $A"), settings, config)
    encoding = await tokenizer.encode("one two three", 2)
    assert encoding.ids == (ids("<s>", "three") if kept else ids("two", "three"))


async def test_bos_named_in_the_special_tokens_map(make: Make, tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "</s>"}}')
    tokenizer = make(word_tokenizer("</s> $A"), {"tokenizer_class": "LlamaTokenizer"})
    assert (await tokenizer.encode("one two three", 2)).ids == ids("</s>", "three")


async def test_eos_counts_and_is_the_last_to_go(make: Make) -> None:
    tokenizer = make(word_tokenizer("$A </s>"), {"tokenizer_class": "T5Tokenizer"})
    assert (await tokenizer.encode("one two", 0)).ids == ids("one", "two", "</s>")
    encoding = await tokenizer.encode("one two", 2)
    assert (encoding.ids, encoding.num_raw_tokens) == (ids("two", "</s>"), 3)
    assert (await tokenizer.encode("one two", 1)).ids == ids("</s>")


async def test_a_leading_special_token_without_bos_rule_is_cut(make: Make) -> None:
    tokenizer = make(word_tokenizer("<s> $A </s>"), {"tokenizer_class": "BertTokenizer"})
    assert (await tokenizer.encode("one two", 3)).ids == ids("one", "two", "</s>")


async def test_special_tokens_can_be_turned_off(make: Make) -> None:
    tokenizer = make(word_tokenizer("<s> $A </s>"), LLAMA, add_special_tokens=False)
    assert (await tokenizer.encode("one two three", 0)).ids == ids("one", "two", "three")
    assert (await tokenizer.encode("one two three", 2)).ids == ids("two", "three")
    assert (await tokenizer.describe("one two three", 0, False, False)).count == 3


async def test_text_without_tokens(make: Make) -> None:
    assert (await make(word_tokenizer()).encode("", 3)).ids == []
    assert (await make(word_tokenizer("<s> $A")).encode("", 3)).ids == ids("<s>")
    assert (await make(word_tokenizer()).describe("", 3, True, True)).offsets == []


async def test_baked_in_truncation_and_padding_are_removed(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    raw = word_tokenizer("<s> $A")
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    with caplog.at_level(logging.WARNING):
        tokenizer = make(raw, LLAMA, max_sequence_length=77)
    assert caplog.messages == [
        "Ignoring fast tokenizer truncation configuration with max_length 2, "
        "max_sequence_length is set to 77"
    ]
    assert (await tokenizer.encode("one two three", 0)).ids == ids("<s>", "one", "two", "three")


async def test_describe_gives_strings_and_byte_offsets(make: Make) -> None:
    tokenizer = make(word_tokenizer("<s> $A"), LLAMA)
    text = "one héllo zwei 日本 😀 two"
    result = await tokenizer.describe(text, 0, True, True)
    assert result.count == 7
    assert result.tokens == ["<s>", "one", "héllo", "<unk>", "日本", "😀", "two"]
    raw = text.encode()
    pieces = [raw[start:end].decode() for start, end in result.offsets]
    assert pieces == ["", "one", "héllo", "zwei", "日本", "😀", "two"]
    assert result.offsets[0] == (0, 0)


async def test_describe_truncates_without_bos_rule(make: Make) -> None:
    tokenizer = make(word_tokenizer("<s> $A"), LLAMA)
    result = await tokenizer.describe("one two three", 2, True, True)
    assert (result.count, result.tokens) == (2, ["two", "three"])
    assert result.offsets == [(4, 7), (8, 13)]
    assert (await tokenizer.describe("one two three", 9, True, False)).count == 4


async def test_describe_gives_only_what_is_wanted(make: Make) -> None:
    tokenizer = make(word_tokenizer("<s> $A"), LLAMA)
    for tokens in (False, True):
        for offsets in (False, True):
            result = await tokenizer.describe("one two", 0, tokens, offsets)
            assert (len(result.tokens), len(result.offsets)) == (3 * tokens, 3 * offsets)
            assert result.count == 3


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


async def test_offsets_of_bytes_are_those_of_their_character(make: Make) -> None:
    result = await make(byte_level()).describe("aé 😀", 0, False, True)
    assert result.offsets == [(0, 1), (1, 3), (1, 3), (3, 4), *[(4, 8)] * 4]


async def test_offsets_refer_to_the_text_before_normalisation(make: Make) -> None:
    raw = byte_level()
    raw.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    result = await make(raw).describe("  e\u0301x ", 0, True, True)
    assert result.tokens == ["Ã", "©", "x"]
    assert result.offsets == [(2, 3), (2, 3), (5, 6)]  # a composed character begins the span


def test_token_strings(make: Make) -> None:
    tokenizer = make(word_tokenizer())
    assert [tokenizer.token_string(i) for i in (1, 5, 99)] == ["<s>", "three", ""]


async def test_a_text_that_the_tokenizer_refuses(make: Make) -> None:
    raw = Tokenizer(models.WordLevel({"one": 0}, unk_token="<unk>"))
    tokenizer = make(raw)
    with pytest.raises(InvalidRequest) as refused:
        await tokenizer.encode("secret", 0)
    cause = "WordLevel error: Missing [UNK] token from the vocabulary"
    assert str(refused.value) == f"tokenizer error {cause}"
    with pytest.raises(GenerationFailed, match=r"^WordLevel error"):
        await tokenizer.describe("secret", 0, False, False)
    assert (await tokenizer.encode("one", 0)).ids == [0]


async def test_a_lone_surrogate_is_refused(make: Make) -> None:
    tokenizer = make(word_tokenizer())
    with pytest.raises(InvalidRequest, match=r"^tokenizer error text is not valid Unicode$"):
        await tokenizer.encode("one \ud800", 0)


async def test_many_texts_at_once(make: Make) -> None:
    tokenizer = make(word_tokenizer("<s> $A"), LLAMA)
    texts = [" ".join(["one", "two", "three"][: n % 4]) for n in range(64)]
    encodings = await asyncio.gather(*(tokenizer.encode(text, 3) for text in texts))
    assert [e.num_raw_tokens for e in encodings] == [1 + n % 4 for n in range(64)]
    assert all(e.ids[0] == 1 and len(e.ids) <= 3 for e in encodings)


async def test_the_event_loop_runs_while_a_long_text_is_tokenised(make: Make) -> None:
    tokenizer = make(byte_level(), workers=1)
    encoding = asyncio.ensure_future(tokenizer.encode("word " * 200_000, 7))
    num_turns = 0  # one or two if the tokenizer held the interpreter lock
    while not encoding.done():
        await asyncio.sleep(0.002)
        num_turns += 1
    assert encoding.result().num_raw_tokens == 1_000_000
    assert len(encoding.result().ids) == 7
    assert num_turns > 10


def test_missing_and_broken_files(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such file: .*tokenizer\.json"):
        make()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*tokenizer\.json"):
        make()
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not a JSON object"):
        make()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*tokenizer_config\.json"):
        make()


REAL = ["llama2", "gpt2", "gpt-neox-pythia", "starcoder", "clip", "t5-small", "bert-uncased"]


@pytest.mark.parametrize("name", REAL)
async def test_real_tokenizers(shared_dir: Path, name: str) -> None:
    directory = shared_dir / "tokenizers" / name
    tokenizer = TextTokenizer.load(directory, workers=1, max_sequence_length=512)
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    text = "Once upon a time, Zoë met 日本 😀 and naïve façades…"
    expected = plain.encode(text)
    encoding = await tokenizer.encode(text, 0)
    assert encoding.ids == expected.ids
    cut = (await tokenizer.encode(text, 4)).ids
    assert cut == ([1, *expected.ids[-3:]] if name == "llama2" else expected.ids[-4:])
    result = await tokenizer.describe(text, 0, True, True)
    assert result.tokens == [plain.id_to_token(i) for i in expected.ids]
    spans = zip(result.offsets, expected.offsets, strict=True)
    assert all(text.encode()[a:b].decode() == text[c:d] for (a, b), (c, d) in spans)
    tokenizer.close()


async def test_inputs_recorded_from_tgis(shared_dir: Path) -> None:
    recorded = json.loads((shared_dir / "golden" / "tgis_reference.json").read_text())
    for model, rows in recorded.items():
        tokenizer = TextTokenizer.load(
            shared_dir / "models" / model, workers=1, max_sequence_length=512
        )
        for row in rows:
            encoding = await tokenizer.encode(row["text"], row["truncate"])
            assert encoding.ids == [token_id for token_id, *_ in row["input"]]
        tokenizer.close()
