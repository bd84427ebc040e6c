"""Routes for who looks again and again, such as the web page: small answers, of what has changed since the last one."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request, Response

from elasticmoe.common.clock import SYSTEM_CLOCK
from elasticmoe.common.http.app import json_response
from elasticmoe.services.scaler.api import docs
from elasticmoe.services.scaler.api.docs import describe
from elasticmoe.services.scaler.api.experts import ExpertLoads
from elasticmoe.services.scaler.api.now import Board
from elasticmoe.services.scaler.api.processes import processes_view
from elasticmoe.services.scaler.api.query import query_of
from elasticmoe.services.scaler.api.series import STEPS_S, Series, step_of
from elasticmoe.services.scaler.api.snapshot import StatusCache

_SINCE = ("`cursor` of an earlier answer: only what has come since is told", "scaler:105c73cc0c704e27.40")
_STEP_S = (f"Seconds from row to row, one of {', '.join(map(str, STEPS_S))}", "1")


def add_watching(app: FastAPI, status_cache: StatusCache, series: Series, experts: ExpertLoads, run_dir: Path) -> None:
    """Add them to the app. `run_dir`: of the deployment."""
    board = Board(series.origin)

    @app.get("/v1/now", **describe("Now", docs.READING, query={"since": _SINCE}))
    async def now(request: Request) -> Response:
        """How the deployment is; with `since`, of devices and ranks only those that have changed."""
        return json_response(board.read(status_cache.snapshot, query_of(request, "since").get("since", "")))

    @app.get("/v1/series", **describe("SeriesView", docs.READING, query={"since": _SINCE, "step_s": _STEP_S}))
    async def figures(request: Request) -> Response:
        """Figures over time: each second for a quarter of an hour, means of 15 or 360 seconds for a day, or of 60 for 4
        hours. At most 1,000 rows at once; with `since`, only later ones."""
        query = query_of(request, "since", "step_s")
        return json_response(series.read(step_of(query.get("step_s", "1")), query.get("since", "")))

    @app.get("/v1/experts", **describe("ExpertsView", docs.READING))
    async def loads() -> Response:
        """Where each expert lives, and how often it was routed to lately; how evenly that falls on the ranks."""
        return json_response(experts.read(status_cache.snapshot, SYSTEM_CLOCK.monotonic()))

    @app.get("/v1/processes", **describe("Processes", docs.READING))
    async def processes() -> Response:
        """The processes that the launcher keeps running, and how often it has started each of them again."""
        return json_response(processes_view(run_dir))
