"""Tokenizer classes: what transformers does with the `tokenizer_class` that a checkpoint names.

Most classes take tokenizer.json as it is. Some keep only its vocabulary, merges and post-processor and put a pipeline
of their own around them, so the same file gives other tokens under another class. The source is transformers 5:
`AutoTokenizer.from_pretrained` and the classes' own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from elasticmoe.common.protocol.errors import CheckpointError

Settings = Mapping[str, Any]


class TokenizerClass(NamedTuple):
    """A class that builds its own pipeline. `defaults`: its named tokens where no file names them; `build` takes the
    vocabulary, the merges and the settings with those defaults."""

    defaults: dict[str, str | None]
    build: Callable[[dict[str, int], list[tuple[str, str]], Settings], Tokenizer]
    readds_special: bool = False  # all special tokens are added once more, without flags
    drops_post_processor: bool = False


_ENDOFTEXT: Final = "<|endoftext|>"
_QWEN2: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN3_5: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen(pattern: str) -> Callable[[dict[str, int], list[tuple[str, str]], Settings], Tokenizer]:
    def build(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> Tokenizer:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        add_prefix_space = bool(settings.get("add_prefix_space"))
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    return build


def _gpt2(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt_neox(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> Tokenizer:
    tokenizer = _gpt2(vocab, merges, settings)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _llama(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    has_prefix = settings.get("add_prefix_space") is not False
    scheme = "never" if not has_prefix else "always" if settings.get("legacy") else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if has_prefix else []))
    return tokenizer


def _gemma(vocab: dict[str, int], merges: list[tuple[str, str]], settings: Settings) -> Tokenizer:
    unknown = str(settings["unk_token"])
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=True, unk_token=unknown, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


_BPE_DEFAULTS: Final[dict[str, str | None]] = {"unk_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT}
_QWEN_DEFAULTS: Final = _BPE_DEFAULTS | {"bos_token": None, "pad_token": _ENDOFTEXT}

REBUILT: Final[dict[str, TokenizerClass]] = {
    "Qwen2Tokenizer": TokenizerClass(_QWEN_DEFAULTS, _qwen(_QWEN2), readds_special=True),
    "Qwen3_5Tokenizer": TokenizerClass(_QWEN_DEFAULTS, _qwen(_QWEN3_5)),
    "GPT2Tokenizer": TokenizerClass(_BPE_DEFAULTS | {"bos_token": _ENDOFTEXT, "pad_token": None}, _gpt2),
    "GPTNeoXTokenizer": TokenizerClass(
        _BPE_DEFAULTS | {"bos_token": _ENDOFTEXT, "pad_token": "<|padding|>"}, _gpt_neox, drops_post_processor=True
    ),
    "LlamaTokenizer": TokenizerClass({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, _llama),
    "GemmaTokenizer": TokenizerClass(
        {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        _gemma,
    ),
}

# The other classes of transformers 5 that do more than to read tokenizer.json (a test compares with its list).
_REFUSED_NAMES = """
    Albert Bart Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot
    BlenderbotSmall ByT5 CLIP CTRL Camembert Canine Clvp CodeGen CodeLlama Cohere ConvBert Cpm CpmAnt
    DPRContextEncoder DPRQuestionEncoder DPRReader Deberta DebertaV2 Dia DistilBert Esm Esmc FNet FSMT
    FastSpeech2Conformer Flaubert Funnel GPTNeoXJapanese GPTSw3 Herbert Lasr LayoutLMv2 LayoutLMv3 LayoutXLM
    Luke M2M100 MBart MBart50 MLuke MPNet Marian MarkupLM Mgpstr MobileBert MyT5 Nllb Nougat OpenAIGPT PLBart
    Parakeet Pegasus Perceiver Phobert Pop2Piano ProphetNet Rag Reformer RemBert RoCBert RoFormer Roberta
    SeamlessM4T Siglip Siglip2 Speech2Text SpeechT5 Splinter SqueezeBert T5 Tapas Tipsv2 Udop VideoPrism Vits
    Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper XGLM XLM XLMRoberta XLNet
"""
REFUSED: Final = frozenset(f"{name}Tokenizer" for name in _REFUSED_NAMES.split()) | {"BertTokenizerLegacy"}

# What AutoTokenizer has registered for the served families; None: the class that takes tokenizer.json as it is.
BY_FAMILY: Final[dict[str, str | None]] = {
    "mixtral": None,
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "olmoe": "GPTNeoXTokenizer",
    "granitemoe": None,
    "glm4_moe": None,
    "glm4_moe_lite": None,
}


def class_of(family: str, settings: Settings, config_class: str | None, tokenizer_json: bytes) -> TokenizerClass | None:
    """The class that AutoTokenizer chooses for a model of `family`; None: tokenizer.json is taken as it is.

    Raises CheckpointError for a class whose pipeline is not known here.
    """
    own = settings.get("tokenizer_class")
    own = own if isinstance(own, str) else None
    declared = config_class if own is None else own  # an empty name is no class, and hides the configuration's
    if declared is not None and not _has_code(settings.get("auto_map")):
        if _base(declared) == "LlamaTokenizer" and b'"ByteLevel"' in tokenizer_json:
            return None
        if family in BY_FAMILY:
            return None if BY_FAMILY[family] is None else _named(declared)
    if declared is not None:
        return _named(declared)
    return _named(BY_FAMILY.get(family))


def _has_code(auto_map: Any) -> bool:
    """The checkpoint brings a tokenizer class as Python code. It is never run; AutoTokenizer then asks less."""
    return bool(auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map)


def _base(name: str) -> str:
    return name.removesuffix("Fast")


def _named(name: str | None) -> TokenizerClass | None:
    base = _base(name or "")
    if base in REFUSED:
        raise CheckpointError(
            f"tokenizer_class {name} is not supported: transformers gives it a pipeline of its own; "
            f"supported: {', '.join(REBUILT)}, and classes that take tokenizer.json as it is"
        )
    return REBUILT.get(base)
