"""`check_integrity()` of every owner of memory or blocks in a running deployment."""

from __future__ import annotations

from elasticmoe.common.protocol import scaler
from elasticmoe.common.protocol.codec import Message
from elasticmoe.common.protocol.hmm import CheckIntegrity, GetHmmStatus
from elasticmoe.common.protocol.rank import GetRankIntegrity
from elasticmoe.common.protocol.scaler import HmmStatus, Integrity, ToScaler
from elasticmoe.common.transport import Client, new_identity
from tests.procs.deployment import Deployment
from tests.procs.waiting import wait_until

CALL_MS = 20_000


def ask(deployment: Deployment, name: str, message: Message) -> ToScaler:
    """Send one control message to the process that listens as `name`; its answer. Refusals are raised."""
    client: Client[ToScaler] = Client(deployment.run_dir / f"sockets/{name}.sock", new_identity("test"), scaler.CODEC)
    try:
        answer, _ = client.call(message, deadline_ms=CALL_MS)
    finally:
        client.close()
    return answer


def hmm_status(deployment: Deployment) -> HmmStatus:
    """What the HMM says of itself."""
    status = ask(deployment, "hmm", GetHmmStatus())
    assert isinstance(status, HmmStatus)
    return status


def is_attached(status: HmmStatus) -> bool:
    """Whether the HMM knows a rank for each member; after its restart they come within a moment."""
    attached = {device.device for device in status.devices if device.attached}
    return status.layout is not None and {seat.device for seat in status.layout.seats} <= attached


def check_integrity(deployment: Deployment, *, checksums: bool = False) -> dict[str, int]:
    """Assert that the HMM and all ranks find nothing wrong; the checksums of all weight records, where asked for."""
    wait_until(lambda: is_attached(hmm_status(deployment)), "all ranks attached")
    answers = {"hmm": ask(deployment, "hmm", CheckIntegrity(checksums))}
    for rank in deployment.rank_pids():
        answers[f"rank-{rank}"] = ask(deployment, f"rank-{rank}", GetRankIntegrity())
    for name, answer in answers.items():
        assert isinstance(answer, Integrity)
        assert answer.findings == (), f"{name}: {answer.findings}"
    hmm = answers["hmm"]
    assert isinstance(hmm, Integrity)
    return hmm.checksums
