"""The byte-level tokenizer of made models."""

import json
from pathlib import Path

import gguf
import jinja2
import pytest
from tokenizers import Tokenizer

from elasticmoe.cli.models import byte_tokenizer, make_model


def test_byte_tokens_are_bytes_and_any_text_round_trips() -> None:
    tokenizer = byte_tokenizer.build_byte_tokenizer()
    assert tokenizer.get_vocab_size() == byte_tokenizer.VOCAB_SIZE == 260
    for text in ("", "a b\n\tc", "naïve 日本語 👋🏽", "\x00\x7f" + "".join(map(chr, range(0x80, 0x180)))):
        ids = tokenizer.encode(text).ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_one_id_each_and_are_skipped_on_request() -> None:
    tokenizer = byte_tokenizer.build_byte_tokenizer()
    ids = tokenizer.encode("<|user|>Hi<|assistant|><|eos|>").ids
    assert ids == [258, *b"Hi", 259, byte_tokenizer.EOS_ID]
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>Hi<|assistant|><|eos|>"


def test_a_filled_up_vocabulary_decodes_every_id_to_a_distinct_printable_word() -> None:
    tokenizer = byte_tokenizer.build_byte_tokenizer(32768)
    assert tokenizer.get_vocab_size() == 32768
    words = [tokenizer.decode([token]) for token in range(byte_tokenizer.VOCAB_SIZE, 32768)]
    assert len(set(words)) == len(words)
    assert all(word.isascii() and word.isprintable() and word.strip() for word in words)
    # Encoding never yields a filler, not even for its own text.
    assert tokenizer.encode(words[0]).ids == list(words[0].encode())


@pytest.mark.parametrize(("vocab_size", "num_merges"), [(260, 0), (262, 0), (263, 1), (32_768, 1)])
def test_there_is_a_merge_which_never_applies(vocab_size: int, num_merges: int, tmp_path: Path) -> None:
    """llama.cpp's converter refuses a list of merges that is empty."""
    byte_tokenizer.write_byte_tokenizer(tmp_path, vocab_size=vocab_size)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == num_merges
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words = [tokenizer.decode([token]) for token in range(vocab_size)]
    assert len(set(words[byte_tokenizer.VOCAB_SIZE :])) == vocab_size - byte_tokenizer.VOCAB_SIZE
    assert len(gguf.SpecialVocab(tmp_path, load_merges=True).merges) == num_merges  # as the converter reads them
    if num_merges:
        assert words[-1] == words[-3] + words[-2]
        assert words[-1].isprintable()
        for text in (words[-1], words[-1] * 3, words[-3] + words[-1]):
            assert tokenizer.encode(text).ids == list(text.encode())


@pytest.mark.parametrize("vocab_size", [259, 10**6])
def test_a_vocabulary_out_of_bounds_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=str(vocab_size)):
        byte_tokenizer.build_byte_tokenizer(vocab_size)


def test_the_byte_chat_template_renders_a_conversation(tmp_path: Path) -> None:
    directory = make_model("tiny-mixtral", tmp_path / "model")
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}] * 2
    text = jinja2.Template(template).render(messages=messages[:3], add_generation_prompt=True)
    assert text == "<|bos|><|user|>Hi<|assistant|>Ho<|eos|><|user|>Hi<|assistant|>"
