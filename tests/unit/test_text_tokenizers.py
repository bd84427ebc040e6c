"""Tokenizer folders in every shape that people have, against what transformers makes of the same folder."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from elasticmoe.cli.models.byte_tokenizer import _byte_chars
from elasticmoe.common.families import FAMILIES
from elasticmoe.common.protocol.errors import CheckpointError, InvalidRequest
from elasticmoe.services.router.text.classes import BY_FAMILY, REBUILT, REFUSED
from elasticmoe.services.router.text.codec import load_codec
from elasticmoe.services.router.text.detokenizer import TextStream
from elasticmoe.services.router.text.jobs import Conversation
from elasticmoe.services.router.text.tokenizer import ServedModel

VOCAB = 400
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ã ©"]
TEXTS = [
    "hello world",
    " hello  world é ñ 漢字 🙂 e\u0301 it's 12345\r\n\n\tx ",
    "<s>hello</s> <|a|><|b|> hello<mask>  world [X]  [x]",
    "<|a|>hello<s> <s><|endoftext|>",
    "",
    "▁hello<0x41> ĠÃ©",
    "<new1><new2> <new3>",
]


def byte_level() -> dict[str, Any]:
    """A byte-level BPE tokenizer.json with two added tokens, one of them special."""
    vocab = {char: index for index, char in enumerate(_byte_chars())}
    for merge in MERGES:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    described["added_tokens"] = [added("<s>", 266, special=True), added("<|a|>", 267)]
    return described


def sentencepiece() -> dict[str, Any]:
    """A byte-fallback BPE tokenizer.json, of Llama's and Mixtral's kind."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrdx"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")]
    words += ["".join(merge) for merge in merges]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    described["added_tokens"] = [added(word, index, special=True) for index, word in enumerate(words[:3])]
    described["post_processor"] = begins_with("<s>", 1)
    return described


def added(content: str, token_id: int, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": token_id, "content": content, **plain, **flags}


def entry(content: str, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens_decoder`."""
    return {key: value for key, value in added(content, 0, **flags).items() if key != "id"}


def begins_with(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that writes `token` before the text."""
    sequence = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def write(directory: Path, family: str, **files: Any) -> Path:
    """A checkpoint's folder without weights; `files` by their names without the ending, None for none."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [next(name for name, kind in FAMILIES.items() if kind.name == family)],
        "model_type": family,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "vocab_size": VOCAB,
    }
    for name, content in {"config": config, **files}.items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return directory


def compare(directory: Path) -> None:
    """The same ids with and without special tokens, the same texts, the same special tokens by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = ServedModel(directory, "m")
    ours = model.codec
    assert ours.backend.specials == theirs.special_tokens_map
    for text in TEXTS:
        for add_special in (True, False):
            try:
                expected = theirs.encode(text, add_special_tokens=add_special)
            except Exception:  # the unknown token itself is unknown
                with pytest.raises(InvalidRequest, match="cannot be tokenized"):
                    ours.encode(text, add_special=add_special)
                continue
            got = ours.encode(text, add_special=add_special)
            assert got == expected, (text, add_special)
            for skip_special in (True, False):
                decoded = theirs.decode(expected, skip_special_tokens=skip_special)
                assert ours.decode(got, skip_special=skip_special) == decoded, (text, skip_special)
                assert streamed(model, got, skip_special) in (decoded, " " + decoded), (text, skip_special)
    end = theirs.eos_token_id
    assert (end in model.eos_ids) == (end is not None and end < model.vocab)


def streamed(model: ServedModel, ids: list[int], skip_special: bool) -> str:
    """The text as a client gets it, token by token."""
    stream = TextStream(model.table, skip_special=skip_special)
    return "".join(stream.feed(token_id) for token_id in ids) + stream.finish()


MAP = {"bos_token": {**entry("<s>"), "special": True}, "eos_token": "</s>", "pad_token": "<pad>"}
SHAPES: dict[str, dict[str, Any]] = {
    "nothing": {"tokenizer_config": None},
    "empty": {"tokenizer_config": {}},
    "names": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None}},
    "names-as-objects": {
        "tokenizer_config": {
            "bos_token": {"__type": "AddedToken", **entry("<s>", lstrip=True)},
            "eos_token": {"__type": "AddedToken", **entry("</s>", rstrip=True, normalized=True)},
        }
    },
    "decoder": {
        "tokenizer_config": {
            "eos_token": "</s>",
            "added_tokens_decoder": {
                "270": entry("<mask>", lstrip=True, special=True),
                "268": entry("</s>", special=True),
                "269": entry("<|b|>"),
                "266": entry("<s>", rstrip=True),
            },
        },
        "special_tokens_map": {"bos_token": "<never>"},
        "added_tokens": {"<neither>": 300},
    },
    "decoder-single-word": {
        "tokenizer_config": {"added_tokens_decoder": {"268": entry("hello", single_word=True, normalized=True)}}
    },
    "special-map": {"tokenizer_config": {"eos_token": "<|a|>"}, "special_tokens_map": MAP},
    "special-map-only": {"tokenizer_config": None, "special_tokens_map": MAP},
    "added-tokens": {
        "tokenizer_config": {"eos_token": "</s>", "extra_special_tokens": ["<|b|>"]},
        "added_tokens": {"</s>": 268, "<|b|>": 269, "<mask>": 270, "[X]": 271},
    },
    "added-tokens-and-map": {
        "tokenizer_config": {"additional_special_tokens": ["<|b|>"]},
        "special_tokens_map": {**MAP, "additional_special_tokens": ["[X]"]},
        "added_tokens": {"</s>": 268, "<|b|>": 269, "<pad>": 270, "[X]": 271},
    },
    "additional": {"tokenizer_config": {"additional_special_tokens": ["<|b|>", "<|a|>", "[X]"]}},
    "extra-list": {"tokenizer_config": {"extra_special_tokens": ["<|b|>"], "additional_special_tokens": ["[X]"]}},
    "extra-map": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|b|>", "end_token": "[X]"}}},
    "extra-in-map": {"tokenizer_config": {}, "special_tokens_map": {"extra_special_tokens": {"image_token": "<|b|>"}}},
    "extra-map-with-a-standard-name": {
        "tokenizer_config": {
            "extra_special_tokens": {"image_token": "<new1>", "eos_token": "<new2>"},
            "pad_token": "<new3>",
        }
    },
    "model-specific-with-a-standard-name": {
        "tokenizer_config": {"model_specific_special_tokens": {"image_token": "<new1>", "bos_token": "<new2>"}}
    },
    "class-without-a-name": {"tokenizer_config": {"tokenizer_class": ""}},
    "own-names": {"tokenizer_config": {"image_token": "<|b|>", "tool_token": {"__type": "AddedToken", **entry("[X]")}}},
    "model-specific": {"tokenizer_config": {"model_specific_special_tokens": {"image_token": "<|b|>"}}},
    "bos-and-eos-flags": {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}},
    "prefix-space": {"tokenizer_config": {"add_prefix_space": True, "legacy": True}},
    "no-prefix-space": {"tokenizer_config": {"add_prefix_space": False, "legacy": False}},
    "split-special": {"tokenizer_config": {"split_special_tokens": True, "eos_token": "</s>"}},
    "clean-up": {"tokenizer_config": {"clean_up_tokenization_spaces": True}},
}
CLASSES = ["PreTrainedTokenizerFast", "TokenizersBackend", "Nobody'sTokenizer", None]
CLASSES += [f"{name}{fast}" for name in REBUILT for fast in ("", "Fast")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("base", [byte_level, sentencepiece], ids=["bytes", "pieces"])
def test_each_shape(tmp_path: Path, shape: str, family: str, base: Any) -> None:
    files = {**SHAPES[shape]}
    if files["tokenizer_config"] is not None and family == "qwen3_moe":
        files["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", **files["tokenizer_config"]}
    compare(write(tmp_path / "m", family, tokenizer=base(), **files))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("base", [byte_level, sentencepiece], ids=["bytes", "pieces"])
@pytest.mark.parametrize("where", ["tokenizer_config", "config", "remote"])
def test_each_class(tmp_path: Path, name: str | None, family: str, base: Any, where: str) -> None:
    settings: dict[str, Any] = {"bos_token": "<s>", "add_bos_token": True}
    if where == "tokenizer_config":
        settings["tokenizer_class"] = name
    if where == "remote":
        settings |= {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [None, "code.Code"]}}
    described = base() | {"normalizer": {"type": "Lowercase"}}
    described["post_processor"] = begins_with("<s>", described["added_tokens"][0]["id"])
    directory = write(tmp_path / "m", family, tokenizer=described, tokenizer_config=settings)
    if where == "config":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    compare(directory)


def test_random_folders(tmp_path: Path) -> None:
    rng = random.Random(7)
    tokens = ["<s>", "</s>", "<|a|>", "<|b|>", "<mask>", "[X]", "<|endoftext|>", "hello", "wor", "<pad>", "é"]
    for number in range(120):
        base = rng.choice([byte_level, sentencepiece])()
        names = ["bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "image_token"]
        settings: dict[str, Any] = {"tokenizer_class": rng.choice(CLASSES)}
        for name in rng.sample(names, rng.randint(0, 4)):
            content = rng.choice(tokens)
            settings[name] = rng.choice([content, {"__type": "AddedToken", **entry(content, **flags(rng))}])
        if rng.random() < 0.5:
            settings["added_tokens_decoder"] = {
                str(266 + place): entry(content, **flags(rng))
                for place, content in enumerate(rng.sample(tokens, rng.randint(0, 5)))
            }
        if rng.random() < 0.5:
            settings[rng.choice(["additional_special_tokens", "extra_special_tokens"])] = rng.sample(tokens, 2)
        special_map = {name: rng.choice(tokens) for name in rng.sample(names[:5], 2)} if rng.random() < 0.5 else None
        legacy = {rng.choice(tokens): 280 + place for place in range(2)} if rng.random() < 0.5 else None
        folder = tmp_path / str(number)
        write(
            folder,
            rng.choice(["mixtral", "qwen3_moe"]),
            tokenizer=base,
            tokenizer_config=settings,
            special_tokens_map=special_map,
            added_tokens=legacy,
        )
        compare(folder)


def flags(rng: random.Random) -> dict[str, bool]:
    return {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_every_class_of_transformers_is_known() -> None:
    """Each class with a pipeline of its own is either built here or refused; nothing else is."""
    names = {name for name in dir(transformers) if name.removesuffix("Fast").endswith(("Tokenizer", "TokenizerLegacy"))}
    names -= {"AutoTokenizer", "BasicTokenizer", "CharacterTokenizer", "MecabTokenizer", "WordpieceTokenizer"}
    generic = {"PreTrainedTokenizer", "PreTrainedTokenizerFast"}
    known = set(REBUILT) | REFUSED
    assert {name.removesuffix("Fast") for name in names - generic} <= known
    assert {name for name in known if getattr(transformers, name, TokenizersBackend) is TokenizersBackend} == set()


def test_every_family_has_the_class_that_is_registered() -> None:
    registered = {name: TOKENIZER_MAPPING_NAMES.get(name) for name in (kind.name for kind in FAMILIES.values())}
    for family, name in registered.items():
        if name is not None:
            own = None if name in ("TokenizersBackend", "MistralCommonBackend") else name
            assert BY_FAMILY[family] == own
    assert set(BY_FAMILY) == {family for family, name in registered.items() if name is not None}


@pytest.mark.parametrize("name", ["BertTokenizerFast", "CodeLlamaTokenizer", "T5Tokenizer", "CohereTokenizerFast"])
def test_a_class_with_an_unknown_pipeline_is_refused(tmp_path: Path, name: str) -> None:
    settings = {"tokenizer_class": name}
    directory = write(tmp_path / "m", "qwen3_moe", tokenizer=byte_level(), tokenizer_config=settings)
    with pytest.raises(CheckpointError, match=f"tokenizer_class {name} is not supported"):
        ServedModel(directory, "m")
    compare(write(tmp_path / "x", "mixtral", tokenizer=byte_level(), tokenizer_config=settings))  # there it is not used


def test_a_class_that_needs_a_bpe_model(tmp_path: Path) -> None:
    described = byte_level() | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}
    directory = write(tmp_path / "m", "qwen3_moe", tokenizer=described)
    with pytest.raises(CheckpointError, match="needs a BPE model, the file has WordLevel"):
        ServedModel(directory, "m")


# ---- files that are wrong, tokens without an embedding, ends of sequence ---------------------------------------------


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"tokenizer_config": {"eos_token": 5}}, "eos_token must be a token, is 5"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": entry("a")}}}, "must have token ids as keys"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": "a"}}}, "added_tokens_decoder must be a token"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder must be an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": {"content": "a", "lstrip": 5}}}}, "is not a valid token"),
        ({"tokenizer_config": {"extra_special_tokens": "<a>"}}, "extra_special_tokens must be a list"),
        (
            {"tokenizer_config": {"model_specific_special_tokens": [1]}},
            "model_specific_special_tokens must be an object",
        ),
        ({"added_tokens": {"<a>": "1"}}, "added_tokens.json: the id of '<a>' must be an integer"),
        ({"special_tokens_map": [1]}, "special_tokens_map.json must hold a JSON object"),
    ],
)
def test_tokens_that_are_none(tmp_path: Path, files: dict[str, Any], text: str) -> None:
    directory = write(tmp_path / "m", "mixtral", tokenizer=byte_level(), **files)
    with pytest.raises(CheckpointError, match=text):
        ServedModel(directory, "m")


def test_tokens_as_objects_without_a_type_are_taken(tmp_path: Path) -> None:
    """transformers does not load these; nothing else can be meant."""
    settings = {"eos_token": entry("</s>"), "additional_special_tokens": [entry("<|b|>", rstrip=True)]}
    model = ServedModel(write(tmp_path / "m", "mixtral", tokenizer=byte_level(), tokenizer_config=settings), "m")
    assert model.codec.backend.specials["eos_token"] == "</s>"
    assert model.codec.encode("<|b|>  </s>", add_special=False) == [269, 268]


def test_tokens_without_an_embedding(tmp_path: Path) -> None:
    settings = {"pad_token": "<pad>", "eos_token": "</s>"}
    directory = write(tmp_path / "m", "mixtral", tokenizer=byte_level(), tokenizer_config=settings)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 268}))
    model = ServedModel(directory, "m")
    compare(directory)
    model.check_embedded(model.codec.encode("hello", add_special=True))
    told = "token '<pad>' of id 269 in the prompt; the model's embedding ends at 267"
    with pytest.raises(InvalidRequest, match=told) as caught:
        model.check_embedded(model.codec.encode("hello<pad>", add_special=True))
    assert caught.value.code == "token_without_embedding"
    assert model.eos_ids == ()  # it can never be sampled
    assert model.warnings == ("2 added tokens have no embedding; prompts with them are refused: '</s>', '<pad>'",)


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", "mixtral", tokenizer=byte_level())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 260}))
    with pytest.raises(CheckpointError, match=r"token id 265; config\.json allows ids below 260"):
        ServedModel(directory, "m")


@pytest.mark.parametrize(
    ("settings", "config", "generation", "eos_ids"),
    [
        ({"eos_token": "<s>"}, {}, None, (266,)),  # only the tokenizer names it
        ({"eos_token": "<s>"}, {"eos_token_id": 1}, None, (1, 266)),
        ({"eos_token": "<s>"}, {"eos_token_id": 1}, {"eos_token_id": [2, 266]}, (2, 266)),
        ({}, {"eos_token_id": [3, 4]}, None, (3, 4)),
        (None, {}, None, ()),
    ],
)
def test_ends_of_sequence(
    tmp_path: Path, settings: Any, config: Any, generation: Any, eos_ids: tuple[int, ...]
) -> None:
    directory = write(
        tmp_path / "m", "mixtral", tokenizer=byte_level(), tokenizer_config=settings, generation_config=generation
    )
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    assert ServedModel(directory, "m").eos_ids == eos_ids


def test_versioned_tokenizer_files(tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.4.30.1.json", "../tokenizer.9.json"]
    other = byte_level() | {"normalizer": {"type": "Lowercase"}}
    files = {"tokenizer": byte_level(), "tokenizer.4.0.0": byte_level(), "tokenizer.4.30.1": other}
    directory = write(tmp_path / "m", "mixtral", tokenizer_config={"fast_tokenizer_files": names[:3]}, **files)
    compare(directory)
    assert load_codec(directory).encode("HE", add_special=False) == load_codec(directory).encode(
        "he", add_special=False
    )
    write(directory, "mixtral", tokenizer_config={"fast_tokenizer_files": names[3:]})
    compare(directory)


def test_a_warning_where_texts_are_not_cleaned_up(tmp_path: Path) -> None:
    described = json.loads(json.dumps(byte_level()))
    described["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0]]}
    described |= {"pre_tokenizer": None, "added_tokens": [], "decoder": {"type": "Fuse"}}
    settings = {"clean_up_tokenization_spaces": True}
    directory = write(tmp_path / "m", "mixtral", tokenizer=described, tokenizer_config=settings)
    assert ["clean_up_tokenization_spaces" in warning for warning in ServedModel(directory, "m").warnings] == [True]


# ---- where the template comes from -----------------------------------------------------------------------------------

NAMED = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ("config", {}),
        (NAMED, {}),
        (NAMED[::-1] + [{"name": "default", "template": "again"}], {}),
        (NAMED[1:], {}),
        ({"default": "object"}, {}),
        (None, {}),
        ("config", {"chat_template": "file"}),
        (NAMED, {"chat_template": "file\r\n\r\nend"}),
        (NAMED, {"additional_chat_templates/tool_use": "tools"}),
        ("config", {"chat_template": "file", "additional_chat_templates/tool_use": "tools"}),
        ("config", {"chat_template": "file", "additional_chat_templates/default": "folder"}),
        (None, {"chat_template": "{{ bos_token }}", "additional_chat_templates/rag": "rag"}),
    ],
)
def test_where_the_template_comes_from(tmp_path: Path, settings: Any, files: dict[str, str]) -> None:
    directory = write(tmp_path / "m", "mixtral", tokenizer=byte_level())
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": settings}))
    (directory / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    (directory / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (directory / f"{name}.jinja").write_text(text, encoding="utf-8", newline="")
    theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    messages = [{"role": "user", "content": "x"}]
    ours = load_codec(directory)
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False)
    except ValueError:
        with pytest.raises(InvalidRequest, match=r"no chat template|none is called default"):
            ours.render(Conversation(messages=messages))
    else:
        assert ours.render(Conversation(messages=messages)) == expected


@pytest.mark.parametrize(
    ("settings", "file", "text"),
    [
        ("{% if %}", None, "does not compile"),
        (None, b"\xff", "chat_template.jinja is not UTF-8"),
        (None, b"x" * (5 << 20), "the limit is"),
        (5, None, "neither a text nor a list"),
        ([{"name": "default"}, 5], None, "neither a text nor a list"),
        ([{"name": "default", "template": 5}], None, "neither a text nor a list"),
    ],
)
def test_a_template_that_cannot_be_used_costs_chat_only(
    tmp_path: Path, settings: Any, file: bytes | None, text: str
) -> None:
    directory = write(tmp_path / "m", "mixtral", tokenizer=byte_level(), tokenizer_config={"chat_template": settings})
    if file is not None:
        (directory / "chat_template.jinja").write_bytes(file)
    model = ServedModel(directory, "m")
    assert model.codec.encode("hello", add_special=True) == [259]
    assert text in model.codec.inspect().text
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"cannot be used: .*use /v1/completions") as caught:
            model.codec.render(Conversation(messages=[{"role": "user", "content": "x"}]))
        assert caught.value.code == "bad_chat_template"


def test_a_template_that_is_no_file(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", "mixtral", tokenizer=byte_level())
    os.mkfifo(directory / "chat_template.jinja")
    assert "not a regular file" in load_codec(directory).inspect().text


def test_a_variable_that_the_template_must_read(tmp_path: Path) -> None:
    settings = {"chat_template": "{{ reasoning_effort }}"}
    model = ServedModel(write(tmp_path / "m", "mixtral", tokenizer=byte_level(), tokenizer_config=settings), "m")
    asked = Conversation(messages=[], variables={"reasoning_effort": "low"}, required=("reasoning_effort",))
    assert model.codec.render(asked) == "low"
    settings = {"chat_template": "x"}
    model = ServedModel(write(tmp_path / "n", "mixtral", tokenizer=byte_level(), tokenizer_config=settings), "m")
    with pytest.raises(InvalidRequest, match="reasoning_effort is not supported"):
        model.codec.render(asked)
