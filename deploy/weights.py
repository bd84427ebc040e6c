"""Run inside the hmm's container: prints the catalog's identity and the checksum of every weight record, one a line."""

import sys

from elasticmoe.common.config import HmmConfig, load
from elasticmoe.common.protocol.errors import ElasticMoEError
from elasticmoe.common.protocol.hmm import CheckIntegrity, GetHmmStatus
from elasticmoe.common.protocol.scaler import CODEC, HmmStatus, Integrity
from elasticmoe.common.transport import Client, describe, new_identity

DEADLINE_MS = 60_000


def main() -> int:
    """Exit status 1 when the HMM does not answer or its memory is not as it should be."""
    client = Client(load(HmmConfig).socket("hmm"), new_identity("weights"), CODEC)
    try:
        status, _ = client.call(GetHmmStatus(), deadline_ms=DEADLINE_MS)
        integrity, _ = client.call(CheckIntegrity(checksums=True), deadline_ms=DEADLINE_MS)
    except ElasticMoEError as error:
        print(describe(error), file=sys.stderr)
        return 1
    finally:
        client.close()
    assert isinstance(status, HmmStatus)
    assert isinstance(integrity, Integrity)
    epoch = status.layout.epoch if status.layout is not None else None
    print(f"phase {status.phase}, operation {status.op_id}, layout {epoch}")
    for device in status.devices:
        print(f"{device.device} weights {device.weights} kv {device.kv} experts {device.num_experts}")
    for name, checksum in sorted(integrity.checksums.items()):
        print(f"{name} {checksum:016x}")
    print(*integrity.findings, sep="\n", file=sys.stderr, end="")
    return 1 if integrity.findings or not integrity.checksums else 0


if __name__ == "__main__":
    sys.exit(main())
