"""What the Grafana boards ask of Prometheus."""

from __future__ import annotations

from scripts.boards import BOARDS, LAYOUT_CHANGED, Query

QUERIES: list[Query] = [query for board in BOARDS for panel in board.panels for query in panel.queries]
QUERIES.append(LAYOUT_CHANGED)
