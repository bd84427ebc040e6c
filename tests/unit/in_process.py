"""The router's text workers without processes."""

from __future__ import annotations

from elasticmoe.services.router.text.codec import TextCodec
from elasticmoe.services.router.text.jobs import Job, Reply


class InProcess:
    """In place of the worker processes: does each job at once."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    async def run(self, job: Job, client: str) -> Reply:
        """As TextWorkers."""
        return self._codec.perform(job)
