"""What answers have to look like, made to grammars by the text workers, and the vocabulary of these grammars."""

from __future__ import annotations

import asyncio

from elasticmoe.common.protocol.rank import Grammar
from elasticmoe.services.router.dispatch.vocabulary import KnownVocabulary
from elasticmoe.services.router.grammar.structure import Structure, Thought
from elasticmoe.services.router.text.jobs import Compile, Spell
from elasticmoe.services.router.text.texts import Texts
from elasticmoe.services.router.text.tokenizer import ServedModel


class Structures:
    """Of one router and its loop. `vocabulary`: filled with the first grammar."""

    def __init__(self, model: ServedModel, texts: Texts, vocabulary: KnownVocabulary) -> None:
        self._model = model
        self._texts = texts
        self._vocabulary = vocabulary
        self._spelling = asyncio.Lock()

    async def compile(self, structure: Structure, thought: Thought | None, client: str) -> Grammar:
        """Its grammar, which has been tried. Raises InvalidRequest, Overloaded, Unavailable."""
        packed = await self._texts.compile(Compile(structure, thought, self._model.vocab), client)
        async with self._spelling:
            if not self._vocabulary.digest:
                data = await self._texts.spell(Spell(self._model.vocab, self._model.eos_ids))
                self._vocabulary.learn(data)
        return Grammar(packed, self._vocabulary.digest)
