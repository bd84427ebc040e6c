"""What a load tells at its end: as text and as JSON. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from elasticmoe.cli.load.histogram import Histogram
from elasticmoe.cli.load.result import Totals
from elasticmoe.cli.traces.scale import Fitted, TraceFigures
from elasticmoe.common.wording import counted

LAG_S_MAX = 0.05  # p99: beyond it the client's own lateness is part of what is measured
CPU_SHARE_MAX = 0.8
_PERCENTILES = (50, 95, 99)


def progress_line(elapsed_s: float, num_running: int, totals: Totals) -> str:
    """How far it is."""
    counts = ", ".join(f"{num} {_plainly(outcome)}" for outcome, num in totals.outcomes.items())
    return f"  {elapsed_s:.0f} s: {num_running} under way, {counts or 'none ended'}, {totals.tokens} tokens"


class Report:
    """One load. Filled in while it goes on: `source` names the trace, `num_without_output` requests that made nothing
    where it was recorded; `elapsed_s` and `cpu_share` are of the load, the share being of one core."""

    def __init__(self, totals: Totals) -> None:
        self.totals = totals
        self.source = ""
        self.num_without_output = 0
        self.elapsed_s = 0.0
        self.cpu_share = 0.0
        self._fitted: Fitted | None = None
        self._figures: TraceFigures | None = None

    def set_trace(self, fitted: Fitted, figures: TraceFigures) -> None:
        """The trace as it is sent."""
        self._fitted, self._figures = fitted, figures

    def trace_json(self) -> dict[str, Any]:
        """The trace's figures. After `set_trace`."""
        assert self._fitted is not None
        return {
            "source": self.source,
            "without_output": self.num_without_output,
            "length_factor": self._fitted.factor,
            "cut": self._fitted.num_cut,
            "figures": msgspec.to_builtins(self._figures),
        }

    def trace_text(self) -> str:
        """The same as lines."""
        assert self._fitted is not None
        assert self._figures is not None
        found, fitted = self._figures, self._fitted
        spread = " / ".join(_number(value) for value in found.dispersion.values())
        windows = " / ".join(str(seconds) for seconds in found.dispersion)
        lines = [
            f"{self.source}: {counted(found.num, 'request')} in {found.duration_s:.1f} s, {found.rate:.2f} per second",
            f"bursts      gap CV {_number(found.gap_cv)}; variance/mean of counts {spread} in {windows} s; "
            f"fullest 10 s over the mean {_number(found.peak_ratio)}",
            f"tokens      {found.input_tokens:.0f} in, {found.output_tokens:.0f} out, on average",
        ]
        if fitted.factor < 1 or fitted.num_cut:
            lines.append(f"lengths     times {fitted.factor:.3g}, to fit the model; {fitted.num_cut} cut all the same")
        if self.num_without_output:
            left_out = counted(self.num_without_output, "request")
            lines.append(f"left out    {left_out} that made nothing where they were recorded")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """Everything. Times in milliseconds but for `elapsed_s`."""
        totals = self.totals
        return {
            "trace": self.trace_json(),
            "elapsed_s": round(self.elapsed_s, 3),
            "outcomes": dict(totals.outcomes),
            "errors": dict(totals.errors),
            "attainment": totals.attainment,
            "ttft_ms": _spread_json(totals.ttft),
            "itl_ms": _spread_json(totals.gaps),
            "latency_ms": _spread_json(totals.latency),
            "refusal_ms": _spread_json(totals.refusals),
            "prompt_tokens": totals.prompt_tokens,
            "output_tokens": totals.tokens,
            "prompt_tokens_per_s": round(totals.prompt_tokens / self._active_s, 3),
            "output_tokens_per_s": round(totals.tokens / self._active_s, 3),
            "lag_ms": _spread_json(totals.lag),
            "cpu_share": round(self.cpu_share, 4),
            "warnings": self._warnings(),
        }

    def text(self) -> str:
        """The same as lines."""
        totals = self.totals
        counts = [f"{num} {_plainly(outcome)}" for outcome, num in sorted(totals.outcomes.items())]
        lines = [f"requests    {', '.join(counts) or 'none'}"]
        if totals.errors:
            lines.append("errors      " + ", ".join(f"{code} {num}" for code, num in totals.errors.most_common()))
        if totals.attainment is not None:
            lines.append(f"attained    {totals.attainment * 100:.2f} % kept the objectives{self._objectives()}")
        for name, spread in (
            ("TTFT", totals.ttft),
            ("ITL", totals.gaps),
            ("latency", totals.latency),
            ("refusal", totals.refusals),
        ):
            if spread.num:
                lines.append(f"{name:<12}{_spread_text(spread)}")
        lines.append(
            f"tokens/s    {totals.prompt_tokens / self._active_s:.1f} in, {totals.tokens / self._active_s:.1f} out"
        )
        lines.append(f"client      late {_spread_text(totals.lag)}; {self.cpu_share * 100:.0f} % of a core")
        lines += [f"warning     {warning}" for warning in self._warnings()]
        return "\n".join(lines)

    @property
    def _active_s(self) -> float:
        """From the begin to the last token."""
        return self.totals.last_token_s or max(self.elapsed_s, 1e-9)

    def _objectives(self) -> str:
        wanted = self.totals.objectives
        told = [
            f"{name} {bound * 1e3:g} ms"
            for name, bound in (("TTFT", wanted.ttft_s), ("ITL", wanted.itl_s))
            if bound is not None
        ]
        return f" ({', '.join(told)})" if told else ": to end whole"

    def _warnings(self) -> list[str]:
        found, lag = [], self.totals.lag.percentile(99) or 0.0
        if lag > LAG_S_MAX:
            found.append(
                f"the client itself was late: p99 {lag * 1e3:.0f} ms, more than {LAG_S_MAX * 1e3:.0f} ms; "
                f"what is told here is in part its own"
            )
        if self.cpu_share > CPU_SHARE_MAX:
            found.append(
                f"the client used {self.cpu_share * 100:.0f} % of a core, more than {CPU_SHARE_MAX * 100:.0f} %; "
                f"it may be what limits the load"
            )
        if num := self.totals.outcomes["not_sent"]:
            found.append(f"{counted(num, 'request')} not sent: all connections were in use (--connections-max)")
        return found


def _plainly(outcome: str) -> str:
    return outcome.replace("_", " ")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _spread_json(values: Histogram) -> dict[str, float | None]:
    found = {f"p{percent}": values.percentile(percent) for percent in _PERCENTILES}
    found |= {"mean": values.mean, "max": values.largest if values.num else None}
    return {name: None if value is None else round(value * 1e3, 3) for name, value in found.items()}


def _spread_text(values: Histogram) -> str:
    told = [f"p{percent} {(values.percentile(percent) or 0.0) * 1e3:.1f}" for percent in _PERCENTILES]
    return f"{', '.join(told)}, max {values.largest * 1e3:.1f} ms"
