"""A byte-level tokenizer for models without a trained one: token id 0..255 is that byte, then four special tokens.

Any text round-trips, and a test can read token ids as bytes. A larger vocabulary is filled up with words that encoding
never produces but that decode to something printable, so that whatever a random model samples can be shown. Where there
are three of them, the last one is the two before in one: by that there is a merge, which never applies, because no
merge makes its parts of bytes. llama.cpp's converter refuses a list of merges that is empty.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from elasticmoe.cli.models.checkpoint import write_json

NUM_BYTES = 256
BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT)
BOS_ID, EOS_ID = NUM_BYTES, NUM_BYTES + 1
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
MERGED_FILLERS_MIN = 3

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|eos|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"
_SYLLABLES = tuple(consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS)


def build_byte_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """The tokenizer with exactly `vocab_size` ids. Raises ValueError below 260 (256 bytes and 4 special tokens)."""
    if vocab_size < VOCAB_SIZE:
        raise ValueError(f"the byte-level tokenizer needs a vocabulary of at least {VOCAB_SIZE}, got {vocab_size}")
    limit = VOCAB_SIZE + len(_SYLLABLES) ** 3
    if vocab_size > limit:
        raise ValueError(f"the byte-level tokenizer can fill a vocabulary of at most {limit}, got {vocab_size}")
    vocab = {char: byte for byte, char in enumerate(_byte_chars())}
    vocab |= {token: NUM_BYTES + index for index, token in enumerate(SPECIAL_TOKENS)}
    fillers = [_filler(index) for index in range(vocab_size - VOCAB_SIZE)]
    merges = [(fillers[-3], fillers[-2])] if len(fillers) >= MERGED_FILLERS_MIN else []
    for left, right in merges:
        fillers[-1] = left + right
    vocab |= {filler: VOCAB_SIZE + index for index, filler in enumerate(fillers)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_byte_tokenizer(stage: Path, *, vocab_size: int = VOCAB_SIZE) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` (with a chat template) and `generation_config.json`."""
    build_byte_tokenizer(vocab_size).save(str(stage / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(stage / "tokenizer_config.json", tokenizer_config)
    write_json(stage / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})


def _byte_chars() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (the table that GPT-2 introduced).

    Printable Latin-1 bytes stand for themselves; the others, in order, take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    chars, next_free = [], 0x100
    for byte in range(NUM_BYTES):
        if byte in printable:
            chars.append(chr(byte))
        else:
            chars.append(chr(next_free))
            next_free += 1
    return chars


def _filler(index: int) -> str:
    """A distinct pronounceable word of three syllables with a leading space (U+0120 in a byte-level vocabulary)."""
    first, rest = divmod(index, len(_SYLLABLES) ** 2)
    second, third = divmod(rest, len(_SYLLABLES))
    # The fastest-moving syllable goes first: neighbouring ids look different.
    return "\u0120" + _SYLLABLES[third] + _SYLLABLES[second] + _SYLLABLES[first]
