"""Sequences with a grammar in an engine: same tokens whatever befalls them, nobody waits, faults are theirs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TimedOut
from pathlib import Path
from typing import Any

import msgspec
import pytest
from llguidance import LLParserLimits

from elasticmoe.cli.models.byte_tokenizer import ASSISTANT, EOS_ID, VOCAB_SIZE, build_byte_tokenizer
from elasticmoe.common import grammar
from elasticmoe.common.grammar import FREE_SPELLING
from elasticmoe.common.grammar_text import Vocabulary, digest_of, encode_vocabulary, pack_grammar
from elasticmoe.common.protocol.rank import Grammar, Sampling, Submit, VocabularyPiece
from elasticmoe.common.protocol.router import Delta, Failed, WantVocabulary
from elasticmoe.services.router.grammar.compiler import GrammarCompiler
from elasticmoe.services.router.grammar.structure import Structure, Thought
from elasticmoe.services.router.text.detokenizer import TokenTable
from elasticmoe.services.worker.engine.adoption import adopt_rows
from elasticmoe.services.worker.engine.engine import Engine
from elasticmoe.services.worker.engine.outcome import Outcome
from elasticmoe.services.worker.grammar import grammars, guide, vocabularies
from tests.oracle import next_tokens
from tests.procs.waiting import wait_until
from tests.unit.migration_world import MAX_MODEL_LEN, MAX_SEQUENCES, make_engine, run_step
from tests.unit.ranks import Ranks

PEER = b"router:1"
TABLE = TokenTable(build_byte_tokenizer())
DATA = encode_vocabulary(Vocabulary([TABLE.bytes_of(n) for n in range(VOCAB_SIZE)], sorted(TABLE.special), [EOS_ID]))
DIGEST = digest_of(DATA)
WORDS = "([a-z]{2,3} ){4,6}!"
COMPILER = GrammarCompiler({n: TABLE.bytes_of(n) for n in TABLE.special}, VOCAB_SIZE)


def pieces(data: bytes = DATA, digest: str = DIGEST, size: int = 700) -> list[VocabularyPiece]:
    return [VocabularyPiece(digest, at, len(data), data[at : at + size]) for at in range(0, len(data), size)]


class Seat:
    """One rank's engine, its router, and the engines that follow on it. `is_known`: the router gives the vocabulary
    when it is asked."""

    def __init__(self, ranks: Ranks, *, is_known: bool = True) -> None:
        self._ranks = ranks
        self.engine = make_engine(ranks)
        self._dead: list[Engine] = []
        self.is_known = is_known
        self.asked: list[WantVocabulary] = []
        self.now = 0.0
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.failed: dict[str, Failed] = {}
        self.stop_tokens: dict[str, int | None] = {}

    def add(
        self, name: str, pattern: str | None, prompt: bytes = b"Say", thought: Thought | None = None, **fields: Any
    ) -> None:
        packed = None if pattern is None else pack_grammar(FREE_SPELLING + f"start: /{pattern}/")
        if thought is not None:
            packed = COMPILER.compile(Structure("regex", pattern or "", "structured_outputs.regex"), thought)
        guided = None if packed is None else Grammar(packed, DIGEST)
        options = {key: fields.pop(key) for key in ("temperature", "seed", "logit_bias") if key in fields}
        sampling = Sampling(**{"seed": 3, "temperature": 1.0, **options}, grammar=guided)
        fields = {"stop_token_ids": (EOS_ID,), **fields}
        max_tokens = fields.pop("max_tokens", 60)
        self.engine.add(Submit(name, tuple(prompt), max_tokens, sampling, **fields), PEER, 0.0)
        self.tokens[name] = []

    def turn(self) -> bool:
        """What a rank does in one; whether it had something to compute."""
        engine = self.engine
        self.now += 0.01
        if engine.scheduler.unready:
            self.take(Outcome({}, engine.prepare_grammars()))
            for router, question in engine.grammars.questions(engine.scheduler.unready, self.now):
                assert router == PEER
                self.asked.append(question)
                for piece in pieces() if self.is_known else ():
                    engine.grammars.take(piece, VOCAB_SIZE)
        plan = engine.plan()
        if plan.num_tokens:
            self.take(run_step(engine, plan))
        assert engine.check_integrity() == []
        return plan.num_tokens > 0

    def run(self) -> None:
        wait_until(lambda: not self.compute() and not self.engine.scheduler.sequences(), "all to end", 60.0)

    def run_until(self, name: str, num: int) -> None:
        wait_until(lambda: self.compute(name, num), f"{num} tokens of {name}", 60.0)

    def compute(self, name: str = "", num: int = 0) -> bool:
        """Turns while there is something to compute, up to so many tokens of one; whether it has them."""
        while self.turn():
            if name and len(self.tokens[name]) >= num:
                return True
        return False

    def die(self) -> None:
        """The seat's next engine goes on from the ledger."""
        old = self.engine
        self._dead.append(old)  # the ledger's memory is the first one's
        self.engine = Engine(
            self._ranks.models[0],
            self._ranks.exchanges[0],
            old.kv,
            old.ledger,
            max_tokens=16,
            max_sequences=MAX_SEQUENCES,
            max_model_len=MAX_MODEL_LEN,
        )
        self.take(adopt_rows(self.engine, VOCAB_SIZE))

    def take(self, outcome: Outcome) -> None:
        for delta in outcome.deltas.get(PEER, []):
            assert isinstance(delta, Delta)
            known = self.tokens[delta.request_id]
            assert list(delta.ids[: len(known) - delta.index]) == known[delta.index :][: len(delta.ids)]
            known += delta.ids[len(known) - delta.index :]
            if delta.finish:
                self.finish[delta.request_id] = delta.finish
                self.stop_tokens[delta.request_id] = delta.stop_token
        for _, failed in outcome.failures:
            self.failed[failed.request_id] = failed

    def text(self, name: str) -> str:
        return bytes(self.tokens[name]).decode()


@pytest.fixture
def seat(ranks: Ranks) -> Seat:
    return Seat(ranks)


@pytest.fixture
def calm(ranks: Ranks) -> dict[str, list[int]]:
    """What requests say when nothing happens: by their seeds."""
    seat = Seat(ranks)
    for seed in range(4):
        seat.add(f"{seed}", WORDS, seed=seed)
    seat.run()
    assert all(re.fullmatch(WORDS, seat.text(name)) for name in seat.tokens), seat.tokens
    assert set(seat.finish.values()) == {"stop"}
    assert len({seat.text(name) for name in seat.tokens}) == 4
    return seat.tokens


def test_the_end_of_the_grammar_is_the_end(seat: Seat) -> None:
    """With and without an end of the model's own, before `min_tokens` too; before it nothing ends it but a limit."""
    seat.add("fixed", "abc")
    seat.add("ignores", "abc", stop_token_ids=())
    seat.add("least", "abc", min_tokens=9)
    seat.add("empty", "")
    seat.run()
    seat.add("open", "a[bc]*", logit_bias=((EOS_ID, 100.0),))
    seat.add("goes on", "a[bc]*", logit_bias=((EOS_ID, 100.0),), min_tokens=5)
    seat.add("cut", "[a-z]*", stop_token_ids=(), max_tokens=7)
    seat.run()
    assert [seat.text(name) for name in ("fixed", "ignores", "least", "empty", "open")] == [
        "abc",
        "abc",
        "abc",
        "",
        "a",
    ]
    assert len(seat.tokens["goes on"]) == 5
    assert (len(seat.tokens["cut"]), seat.finish["cut"]) == (7, "length")
    assert {seat.finish[name] for name in seat.tokens if name != "cut"} == {"stop"}
    assert (seat.stop_tokens["open"], seat.stop_tokens["fixed"]) == (EOS_ID, None)
    assert seat.failed == {}


def test_the_same_in_any_company(seat: Seat, calm: dict[str, list[int]], directory: Path) -> None:
    """In chunks of long prompts, beside requests without a grammar, after hits in the prefix cache, and without room
    for all: some lose their KV and start over."""
    prompts = {name: list(range(97, 97 + 20 + 3 * n)) for n, name in enumerate("xyz")}
    for name, prompt in prompts.items():
        seat.add(name, None, bytes(prompt), temperature=0.0, stop_token_ids=(), max_tokens=30)
    for name in calm:
        seat.add(name, WORDS, seed=int(name))
    seat.engine.resize_kv(18, 100)
    seat.run()
    assert {name: seat.tokens[name] for name in calm} == calm
    for name, prompt in prompts.items():
        assert seat.tokens[name] == next_tokens(directory, prompt, 30)
    assert seat.engine.scheduler.recomputed > 0


def test_the_same_after_every_death(seat: Seat, calm: dict[str, list[int]]) -> None:
    """A rank that dies leaves the grammar and the tokens; its successor has neither matcher nor vocabulary."""
    for name in calm:
        seat.add(name, WORDS, seed=int(name))
    for num in (1, 2, 5, 9):
        seat.run_until("0", num)
        seat.die()
    seat.run()
    assert seat.tokens == calm
    assert len(seat.asked) == 5


@pytest.mark.parametrize("close", ["]", ASSISTANT], ids=["spelled", "a token"])
def test_the_same_after_deaths_on_both_sides_of_the_end_of_the_thinking(ranks: Ranks, close: str) -> None:
    """A successor finds its place before the mark, at it and behind it from the tokens alone."""
    (mark,) = build_byte_tokenizer().encode(close).ids

    def begin() -> Seat:
        seat = Seat(ranks)
        seat.add("a", WORDS, b"Tell", Thought("[", close, True), logit_bias=((mark, 26.0),), max_tokens=90)
        return seat

    calm = begin()
    calm.run()
    tokens = calm.tokens["a"]
    end = tokens.index(mark)
    assert end > 2
    assert re.fullmatch(WORDS, bytes(tokens[end + 1 :]).decode().lstrip())
    seat = begin()
    for num in (end - 1, end, end + 1, end + 4):
        seat.run_until("a", num)
        seat.die()
    seat.run()
    assert seat.tokens["a"] == tokens


def test_the_same_where_another_rank_goes_on(seat: Seat, calm: dict[str, list[int]]) -> None:
    """With the tokens so far, as a router submits it anew."""
    for name, tokens in calm.items():
        seat.add(name, WORDS, seed=int(name), output=tuple(tokens[:4]))
        seat.tokens[name] = tokens[:4]
    seat.run()
    assert seat.tokens == calm


def test_steps_that_are_given_up_change_nothing(
    seat: Seat, calm: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in calm:
        seat.add(name, WORDS, seed=int(name))
    compute = seat.engine.compute
    turns = iter(range(10_000))

    def twice(*args: Any) -> Any:
        if next(turns) % 2:
            compute(*args)
        return compute(*args)

    monkeypatch.setattr(seat.engine, "compute", twice)
    seat.run()
    assert seat.tokens == calm


class Held:
    """In place of the thread that advances matchers: it works when it is told to."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append(lambda: future.set_result(work(*args)))
        return future

    def work(self) -> None:
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job()


@pytest.fixture
def held(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held()
    monkeypatch.setattr(seat.engine.grammars, "_stepper", held)
    monkeypatch.setattr(grammars, "LATE_S", 0.0)
    monkeypatch.setattr(grammars, "SLOW_S", 1e9)  # a machine that is busy makes no sequence a slow one
    return held


def test_others_go_on_while_a_matcher_is_late(
    seat: Seat, held: Held, calm: dict[str, list[int]], directory: Path
) -> None:
    """What may follow comes only every third turn: who waits for it is left out, and has the same tokens in the end."""
    for name in calm:
        seat.add(name, WORDS, seed=int(name))
    while seat.engine.scheduler.unready:
        seat.turn()
        held.work()
    prompt = list(b"free")
    for turn in range(400):
        if turn == 10:
            seat.run_until("0", len(seat.tokens["0"]))
            seat.engine.cancel(PEER, "3")
            seat.add("free", None, bytes(prompt), temperature=0.0, stop_token_ids=(), max_tokens=20)
        before = len(seat.tokens.get("free", []))
        seat.turn()
        if "free" in seat.tokens and "free" not in seat.finish:
            assert len(seat.tokens["free"]) == before + 1
        if turn % 3 == 2:
            held.work()
    assert {name: seat.tokens[name] for name in "012"} == {name: calm[name] for name in "012"}
    assert seat.tokens["free"] == next_tokens(directory, prompt, 20)


def test_who_has_no_vocabulary_yet_waits_alone(ranks: Ranks, directory: Path) -> None:
    seat = Seat(ranks, is_known=False)
    seat.add("guided", "abc")
    seat.add("free", None, b"free", temperature=0.0, stop_token_ids=(), max_tokens=30)
    for _ in range(31):
        seat.turn()
    assert seat.tokens["free"] == next_tokens(directory, list(b"free"), 30)
    assert seat.tokens["guided"] == []
    assert seat.asked == [WantVocabulary(DIGEST)]
    seat.now += vocabularies.ASK_S
    seat.turn()
    assert len(seat.asked) == 2
    *most, last = pieces()
    for piece in (*most, *most, msgspec.structs.replace(last, digest="0" * 64)):  # twice, and what nobody asked for
        seat.engine.grammars.take(piece, VOCAB_SIZE)
    seat.turn()
    assert seat.tokens["guided"] == []
    seat.engine.grammars.take(last, VOCAB_SIZE)
    seat.run()
    assert seat.text("guided") == "abc"


def test_what_is_no_vocabulary_costs_those_who_need_it(ranks: Ranks) -> None:
    seat = Seat(ranks, is_known=False)
    seat.add("first", "abc")
    seat.turn()
    for piece in pieces(DATA[:-1] + b"\x00"):
        seat.engine.grammars.take(piece, VOCAB_SIZE)
    seat.run()
    assert seat.failed["first"].code == "protocol_error"
    seat.is_known = True  # the next one asks again
    seat.add("second", "abc")
    seat.now += 2 * vocabularies.ASK_S
    seat.run()
    assert seat.text("second") == "abc"


def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(
    seat: Seat, calm: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in calm:
        seat.add(name, WORDS, seed=int(name))
    seat.run_until("0", 2)
    seat.engine.cancel(PEER, "3")
    seat.add("broken", "(a")
    seat.run()
    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(max_lexer_states=60))
    seat.add("too large", "[ab]*a[ab]{18}c", max_tokens=120, stop_token_ids=())
    seat.run()
    assert {name: failed.code for name, failed in seat.failed.items()} == {
        "broken": "grammar_failed",
        "too large": "grammar_failed",
    }
    assert {name: seat.tokens[name] for name in "012"} == {name: calm[name] for name in "012"}


@pytest.mark.parametrize("part", ["_open", "_advance"])
def test_a_grammar_without_memory_ends_its_request_alone(
    seat: Seat, directory: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(grammars.Grammars if part == "_open" else grammars, part, fail)
    seat.add("guided", WORDS)
    seat.add("free", None, b"free", temperature=0.0, stop_token_ids=(), max_tokens=20)
    seat.run()
    assert (seat.failed["guided"].code, seat.failed["guided"].retryable) == ("out_of_memory", True)
    assert seat.tokens["free"] == next_tokens(directory, list(b"free"), 20)


def test_grammars_fit_into_the_ledger(seat: Seat) -> None:
    seat.add("r", "|".join(f"{n * 7919 % 10007:05d}" for n in range(1_500)))
    seat.run()
    assert len(seat.text("r")) == 5


def test_a_step_waits_once_for_all_that_are_late(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that each wait moves: all waits of a step together are no longer than one may be."""
    now, waits = 0.0, []

    class Late(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            nonlocal now
            assert timeout is not None
            waits.append(timeout)
            now += timeout
            raise TimedOut

    for name in "abc":
        seat.add(name, "[a-z]*", stop_token_ids=(), max_tokens=150)  # none is over when the last one begins
        seat.run_until(name, 1)
    sequences = [s for s in seat.engine.scheduler.sequences() if s.guide is not None]
    assert len(sequences) == 3
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pending = [sequence.guide.pending for sequence in sequences if sequence.guide]
    for sequence in sequences:
        assert sequence.guide is not None
        sequence.guide.pending = Late()
    assert [choice.is_late for choice in seat.engine.grammars.choices_before(sequences)] == [True] * 3
    assert waits == [grammars.LATE_S, 0.0, 0.0]
    for sequence, future in zip(sequences, pending, strict=True):
        assert sequence.guide is not None
        sequence.guide.pending = future
    monkeypatch.undo()
    seat.run()


def test_nobody_waits_for_a_grammar_that_was_slow(
    seat: Seat, calm: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its masks come from a thread of its own: others end before it goes on, with the same tokens."""
    seat.add("hostile", WORDS)
    seat.run_until("hostile", 2)
    (hostile,) = seat.engine.scheduler.sequences()
    assert hostile.guide is not None
    hostile.guide.slowest_s = 2 * grammars.SLOW_S
    slow = Held()
    monkeypatch.setattr(seat.engine.grammars, "_slow_stepper", slow)
    wait_until(lambda: bool(seat.turn() and slow.jobs), "a slow mask", 60.0)
    for name in "01":
        seat.add(name, WORDS, seed=int(name))
    opened = seat.engine.grammars._stepper
    monkeypatch.setattr(seat.engine.grammars, "_slow_stepper", opened)  # of those that begin
    wait_until(lambda: not seat.compute() and {"0", "1"} <= set(seat.finish), "the others to end", 60.0)
    assert "hostile" not in seat.finish
    assert [seat.tokens[name] for name in "01"] == [calm[name] for name in "01"]
    slow.work()
    seat.run()
    assert seat.finish["hostile"] == "stop"


def test_a_grammar_may_take_so_much_time_and_no_more(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    seat.add("hostile", WORDS)
    seat.run_until("hostile", 2)
    (hostile,) = seat.engine.scheduler.sequences()
    assert hostile.guide is not None
    hostile.guide.spent_s = guide.TIME_S + 60 * guide.TOKEN_TIME_S
    seat.run()
    assert seat.failed["hostile"].code == "grammar_failed"
    assert "the limit is 2.0" in seat.failed["hostile"].message


def test_a_vocabulary_that_could_not_be_read_is_asked_for_again(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("once")

    seat = Seat(ranks)
    with monkeypatch.context() as broken:
        broken.setattr(vocabularies, "ReadVocabulary", fail)
        seat.add("first", "abc")
        seat.run()
    assert "first" in seat.failed
    seat.now += 2 * vocabularies.ASK_S
    seat.add("second", "abc")
    seat.run()
    assert seat.text("second") == "abc"


def test_what_has_not_begun_for_a_sequence_that_ends_is_given_up(seat: Seat, monkeypatch: pytest.MonkeyPatch) -> None:
    seat.add("warm", "abc")
    seat.run()
    opener = Held()
    monkeypatch.setattr(seat.engine.grammars, "_opener", opener)
    seat.add("ended", "abcd")
    seat.turn()
    (sequence,) = seat.engine.scheduler.sequences()
    assert sequence.guide is not None
    opening = sequence.guide.opening
    assert opening is not None
    seat.engine.cancel(PEER, "ended")
    assert opening.cancelled()


def test_grammars_are_kept_by_the_size_of_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of many rules takes thousands of bytes for each of its own."""
    texts = [FREE_SPELLING + f"start: /{word}/" for word in ("aaa", "bbb", "ccc")]
    monkeypatch.setattr(grammars, "KEPT_BYTES_MAX", 2 * len(texts[0]))
    made: list[str] = []
    monkeypatch.setattr(grammars, "unpack_grammar", lambda packed: made.append(texts[packed[0]]) or made[-1])
    vocabulary = vocabularies.ReadVocabulary(DATA, DIGEST, VOCAB_SIZE)
    rank = grammars.Grammars()
    for number in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, which came last before 0
        rank._open(vocabulary, DIGEST, bytes([number]), list(b"a" if number == 0 else b"b" if number == 1 else b"c"))
    assert made == [texts[0], texts[1], texts[2], texts[1]]
    monkeypatch.setattr(grammars, "KEPT_BYTES_MAX", 1)
    for _ in range(2):
        rank._open(vocabulary, DIGEST, b"\2", [])  # too large to be kept
    assert made[4:] == [texts[2], texts[2]]
    assert not rank._kept
