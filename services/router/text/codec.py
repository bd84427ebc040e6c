"""Texts to tokens and back, conversations to prompts: all that is done with a checkpoint's tokenizer and template.

The same object works in the router, for what is short, and in the workers, for everything else.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from elasticmoe.common.families import load_spec, read_config
from elasticmoe.common.grammar_text import Vocabulary, encode_vocabulary
from elasticmoe.common.protocol.errors import CheckpointError, InvalidRequest
from elasticmoe.services.router.answer_parsers.forms import MARKS
from elasticmoe.services.router.text.backend import TokenizerBackend, build, errors_as
from elasticmoe.services.router.text.bounds import measure
from elasticmoe.services.router.text.detokenizer import TokenTable
from elasticmoe.services.router.text.files import TemplateSource, read_tokenizer_files
from elasticmoe.services.router.text.jobs import (
    TAIL_CHARS,
    Chat,
    Compile,
    Compiled,
    Conversation,
    Decode,
    Decoded,
    Encode,
    Encoded,
    Inspect,
    Inspected,
    Job,
    Reply,
    Spell,
    Spelled,
    Tokenize,
    TokenizedBody,
)
from elasticmoe.services.router.text.template import ChatTemplate

if TYPE_CHECKING:
    from elasticmoe.services.router.grammar.compiler import GrammarCompiler


class TextCodec:
    """One checkpoint's tokenizer and chat template. Immutable; the template is compiled when it is first needed, and so
    is what reads grammars.

    `digest`: of the files that it was made of.
    """

    def __init__(self, backend: TokenizerBackend, source: TemplateSource, digest: str) -> None:
        self.backend = backend
        self.digest = digest
        self.bound = measure(backend.tokenizer)
        self._tokenizer = backend.tokenizer
        self._source = source
        self._made_compiler: GrammarCompiler | None = None

    @cached_property
    def table(self) -> TokenTable:
        """The bytes of each token. Raises ConfigError for a decoder that is not supported."""
        return TokenTable(self._tokenizer)

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Token ids of `text`, as the tokenizer of transformers gives them. `add_special`: as it begins a sequence.

        Blocks for one to four seconds per million characters, without the interpreter's lock. Raises InvalidRequest
        for a text that the tokenizer does not take.
        """
        with errors_as(lambda text: InvalidRequest(f"the text cannot be tokenized: {text}", param="prompt")):
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of whole sequences of ids."""
        with errors_as(lambda text: InvalidRequest(f"the tokens have no text: {text}", param="tokens")):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def render(self, conversation: Conversation) -> str:
        """The prompt's text for a conversation. Raises InvalidRequest, also for a model without a chat template that
        can be used."""
        template = self._template
        if isinstance(template, Inspected):
            raise InvalidRequest(template.text, code=template.code)
        for name in conversation.required:
            if not template.takes(name):
                text = f"{name} is not supported: the model's chat template does not read it"
                raise InvalidRequest(text, code="unsupported", param=name)
        return template.render(
            conversation.messages,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            documents=conversation.documents,
            tools=conversation.tools,
            variables=conversation.variables,
        )

    def inspect(self) -> Inspected:
        """What is wrong with the chat template: what chat requests are told."""
        return self._template if isinstance(self._template, Inspected) else Inspected()

    @property
    def template_text(self) -> str:
        """The chat template's source; empty without one."""
        return self._source.text or ""

    @cached_property
    def _template(self) -> ChatTemplate | Inspected:
        problem = self._source.problem
        if self._source.text is not None:
            try:
                return ChatTemplate(self._source.text, self.backend.specials)
            except CheckpointError as error:
                problem = error.message
        if problem:
            text = f"the model's chat template cannot be used: {problem}; use /v1/completions"
            return Inspected(text, "bad_chat_template")
        return Inspected("the model has no chat template; use /v1/completions", "no_chat_template")

    def perform(self, job: Job) -> Reply:
        """Do one job. Raises InvalidRequest."""
        match job:
            case Encode(texts, add_special, context):
                return Encoded([self._encode_within(text, add_special, context) for text in texts])
            case Chat(conversation, context):
                text = self.render(conversation)
                packed = self._encode_within(text, conversation.add_special, context)
                return Encoded([packed], text[-TAIL_CHARS:])
            case Tokenize():
                return TokenizedBody(self._tokenize(job))
            case Decode(packed, skip_special):
                return Decoded(self.decode(array.array("I", packed), skip_special=skip_special))
            case Compile(structure, thought, size):
                return Compiled(self._compiler(size).compile(structure, thought))
            case Spell(size, eos):
                return Spelled(self._spell(size, eos))
            case Inspect():
                return self.inspect()

    def _compiler(self, size: int) -> GrammarCompiler:
        """Made with the first grammar: only a worker that is asked for one loads the library."""
        if self._made_compiler is None:
            from elasticmoe.services.router.grammar.compiler import GrammarCompiler

            special = {token_id: self.table.bytes_of(token_id) for token_id in self._unspelled(size)}
            self._made_compiler = GrammarCompiler(special, size)
        return self._made_compiler

    def _unspelled(self, size: int) -> list[int]:
        """Tokens that no text of a grammar is made of: special ones, and marks that a tokenizer has as plain ones."""
        marks = {self._tokenizer.token_to_id(mark) for mark in MARKS}
        return sorted(i for i in self.table.special.union(marks) if i is not None and i < size)

    def _spell(self, size: int, eos: Sequence[int]) -> bytes:
        """Blocks for about 0.3 s for 150,000 tokens."""
        tokens = [self.table.bytes_of(token_id) for token_id in range(size)]
        special = sorted({*self._unspelled(size), *eos})  # a model may end with what its tokenizer has as a plain token
        return encode_vocabulary(Vocabulary(tokens, special, list(eos)))

    def check_length(self, text: str, context: int) -> None:
        """Raises InvalidRequest for a text that cannot fit into `context` tokens, without tokenizing it."""
        if self.bound is not None:
            self.bound.check(text, context)

    def _encode_within(self, text: str, add_special: bool, context: int) -> bytes:
        self.check_length(text, context)
        return array.array("I", self.encode(text, add_special=add_special)).tobytes()

    def _tokenize(self, job: Tokenize) -> bytes:
        """The body of an answer to /tokenize: it may be large, so it is encoded where the tokens are made."""
        text, add_special = job.text, job.add_special
        if job.conversation is not None:
            text, add_special = self.render(job.conversation), job.conversation.add_special
        self.check_length(text, job.context)
        ids = self.encode(text, add_special=add_special)
        texts = [self.table.text_of(token_id) for token_id in ids] if job.with_strings else None
        return msgspec.json.encode(
            {"count": len(ids), "max_model_len": job.context, "tokens": ids, "token_strs": texts}
        )


def load_codec(directory: Path) -> TextCodec:
    """Read a checkpoint's files. Blocks for about 0.5 s for 150,000 tokens. Raises CheckpointError."""
    family = load_spec(directory, "bfloat16").family
    files = read_tokenizer_files(directory, read_config(directory))
    return TextCodec(build(files, family), files.template, files.digest())
