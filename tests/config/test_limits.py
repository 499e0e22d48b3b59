import pytest

from tgis.config import Config, effective_limits
from tgis.errors import ConfigError
from tgis.types import ModelFiles, ModelKind


def limits(max_length=None, **settings):
    files = ModelFiles(
        name="m",
        path="/m",
        model_type="llama",
        kind=ModelKind.DECODER_ONLY,
        weights=(),
        config={},
        max_length=max_length,
    )
    return effective_limits(Config(**settings), files)


@pytest.mark.parametrize(
    ("setting", "model", "length", "source"),
    [
        (None, None, 2048, "default"),
        (None, 4096, 4096, "model"),
        (300, 4096, 300, "user-defined"),
        (300, None, 300, "user-defined"),
        (5000, 4096, 5000, "user-defined"),
    ],
)
def test_max_sequence_length(setting, model, length, source):
    found = limits(model, max_sequence_length=setting)
    assert found.max_sequence_length == length
    assert found.notes[0].text == f"Using {source} max_sequence_length: {length}"
    larger = [note for note in found.notes if note.level == "warning" and "4096" in note.text]
    assert len(larger) == (length == 5000)


@pytest.mark.parametrize(
    ("length", "new_tokens", "effective"), [(10, 1024, 9), (10, 10, 9), (10, 9, 9), (2, 5, 1)]
)
def test_max_new_tokens_leave_room_for_one_input_token(length, new_tokens, effective):
    found = limits(max_sequence_length=length, max_new_tokens=new_tokens)
    assert found.max_new_tokens == effective
    text = f"adjusting max_new_tokens ({new_tokens}) down to max_sequence_length - 1 ({effective})"
    assert (text in [n.text for n in found.notes]) == (new_tokens != effective)


def test_a_soft_prompt_must_fit():
    assert limits(max_sequence_length=10, max_prompt_prefix_length=9).max_sequence_length == 10
    text = (
        r"--max-prompt-prefix-length=10: Value for the MAX_PROMPT_PREFIX_LENGTH \(10\) cannot be"
        r" larger than the max sequence length - 1 \(9\)"
    )
    with pytest.raises(ConfigError, match=text):
        limits(max_sequence_length=10, max_prompt_prefix_length=10)
