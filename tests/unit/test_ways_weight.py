"""Which files a weight passes, from the checkpoint to the model that computes with it: as docs/architecture.md says,
and none twice. What hands it over between the two processes, the HMM's socket, has a stand-in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch

from elasticmoe.common.families import record
from elasticmoe.common.model_spec import RecordKey
from elasticmoe.services.hmm.loading.loader import ModelLoad
from elasticmoe.services.hmm.loading.reader import Reader
from elasticmoe.services.hmm.sessions.handles import Importer, attach_reply, full_view, seat_memory, shares
from elasticmoe.services.worker.backends.host import HostBackend
from elasticmoe.services.worker.hmm.memory import RankMemory
from elasticmoe.services.worker.model.decoder import Decoder
from elasticmoe.services.worker.model.registry import build_model
from tests.unit.loading import PAGE, World
from tests.unit.ways import Trace, hands_of, said

HANDS = hands_of(
    load=ModelLoad.run,
    read=Reader.read,
    name=seat_memory,
    share=shares,
    map=RankMemory.__init__,
    wrap=RankMemory._wrap_record,
    build=build_model,
    bind=Decoder.__init__,
)


def copies(fds: Iterable[int]) -> list[int]:
    """As they come by a socket."""
    return [os.dup(fd) for fd in fds]


def test_a_weight_passes_the_files_that_the_page_names_and_none_twice(tiny_mixtral: Path) -> None:
    world, trace = World(), Trace(HANDS)
    memory, bells = world.memories["host:0"], {0: os.eventfd(0), 1: os.eventfd(0)}
    try:
        with trace.follow():
            loaded = world.load(tiny_mixtral).run()
            holdings: Any = SimpleNamespace(
                loaded=loaded, segment=world.segment, granularity=PAGE, doorbells=bells, memories=world.memories
            )
            reply, fds = attach_reply(memory, holdings)
            seat, offer = seat_memory(full_view(memory, loaded, None), memory, holdings, Importer(0))
            seat = msgspec.structs.replace(seat, revision=1)
            handed = [(told, copies(own)) for told, own in (*(make() for make in shares(offer, ())), (seat, offer.fds))]
            mapped = RankMemory(reply, copies(fds), "host:0", 0, handed)
            build_model(HostBackend(), mapped.weights, 16)
        described = next(one for one in record(loaded.spec, RecordKey("base")).tensors if one.name == "embed")
        assert torch.equal(mapped.weights.base["embed"], world.tensor("host:0", RecordKey("base"), described))
        mapped.close()
    finally:
        world.close()
        for fd in bells.values():
            os.close(fd)
    assert not trace.returns
    assert set(trace.hands) == set(HANDS.values())
    assert trace.files == said("a weight")
