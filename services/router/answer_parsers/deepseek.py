"""`<｜tool▁calls▁begin｜>…<｜tool▁calls▁end｜>`: DeepSeek V3, R1 and V3.1; each call between markers of its own."""

from __future__ import annotations

from elasticmoe.services.router.answer_parsers.tools import NoCall, Reading, ToolParser

NAME_CHARS_MAX = 256
_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_FENCE, _FENCE_END = "```json\n", "\n```"


class DeepSeekParser(ToolParser):
    """The source of the form: the chat templates of deepseek-ai/DeepSeek-V3-0324 (`function<｜tool▁sep｜>name`, then
    the arguments fenced as JSON) and deepseek-ai/DeepSeek-V3.1 (`name<｜tool▁sep｜>{…}`)."""

    name = "deepseek"
    markers = (_CALLS,)
    specials = (_CALLS, _CALLS_END, _CALL, _CALL_END, _SEPARATOR)

    def _calls(self) -> Reading:
        while True:
            yield from self._spaces()
            if (yield from self._has(_CALLS_END)):
                return
            if not (yield from self._has(_CALL)):
                raise NoCall
            yield from self._call()
            self._is_open = False

    def _call(self) -> Reading:
        words: list[str] = []
        yield from self._until((_SEPARATOR,), words.append, NAME_CHARS_MAX)
        name = "".join(words).strip()
        if name != "function":
            self._start(name)
            yield from self._spaces()
            yield from self._until_whole((_CALL_END,), self._arguments)
            return
        words.clear()
        yield from self._until(("\n",), words.append, NAME_CHARS_MAX)
        self._start("".join(words).strip())
        yield from self._spaces()
        if (yield from self._has(_FENCE)):
            yield from self._until((_FENCE_END,), self._arguments)
            yield from self._until((_CALL_END,), lambda _: None)
        else:
            yield from self._until_whole((_CALL_END,), self._arguments)
