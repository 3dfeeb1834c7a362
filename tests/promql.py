"""What is wrong with a PromQL query over our metrics: names, labels, and whether counters are treated as counters."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import promql_parser
from promql_parser import MatchOp

from canvasrt import wire
from canvasrt.serve.metrics import FAMILIES, Kind

# That Prometheus gives to every series of a target: by itself, in Kubernetes, by the chart's monitors.
TARGET = frozenset({"job", "instance", "namespace", "pod", "service"})
OUTCOMES = frozenset({"stop", "length", *get_args(wire.ErrorKind)})
OVER_COUNTERS = frozenset({"rate", "increase", "irate", "resets"})
OVER_GAUGES = frozenset({"deriv", "delta", "changes", "avg_over_time", "max_over_time", "min_over_time"})


@dataclass(frozen=True)
class Series:
    kind: Kind
    labels: frozenset[str] = frozenset()


# Of Prometheus itself, and those of Triton that the rules and the dashboard use.
OTHERS = {
    "up": Series("gauge"),
    "ALERTS": Series("gauge", frozenset({"alertname", "alertstate", "severity"})),
    "nv_gpu_utilization": Series("gauge", frozenset({"gpu_uuid"})),
    "nv_gpu_memory_used_bytes": Series("gauge", frozenset({"gpu_uuid"})),
    "nv_gpu_memory_total_bytes": Series("gauge", frozenset({"gpu_uuid"})),
    "nv_gpu_power_usage": Series("gauge", frozenset({"gpu_uuid"})),
    "nv_inference_request_failure": Series("counter", frozenset({"model", "version", "reason"})),
}


def known(recorded: Mapping[str, Series] | None = None) -> dict[str, Series]:
    """Every series that a query may name; a histogram is three of them."""
    series = dict(OTHERS) | dict(recorded or {})
    for family in FAMILIES:
        labels = frozenset(family.labels)
        if family.kind == "histogram":
            series[f"{family.name}_bucket"] = Series("histogram", labels | {"le"})
            series |= {f"{family.name}_{part}": Series("counter", labels) for part in ("sum", "count")}
        else:
            series[family.name] = Series(family.kind, labels)
    return series


@dataclass
class _Query:
    series: Mapping[str, Series]
    names: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)  # that the series named have
    asked: set[str] = field(default_factory=set)  # in by (...), without (...), on (...)


def faults(query: str, series: Mapping[str, Series]) -> list[str]:
    """``query`` may hold Grafana's variables. An empty list: nothing is wrong."""
    plain = query.replace("$__rate_interval", "5m")
    try:
        parsed = promql_parser.parse(plain)
    except ValueError as error:
        return [f"{query}: {error}"]
    state = _Query(series)
    found = list(_walk(parsed, state, ()))
    if not state.names:
        found.append("names no series")
    unknown = state.asked - state.labels - TARGET
    if unknown:
        found.append(f"groups by {sorted(unknown)}, which no series of it has")
    return [f"{query}: {fault}" for fault in found]


def _walk(node: Any, state: _Query, around: tuple[str, ...]) -> Iterator[str]:
    """``around``: the functions that a selector stands in, the outermost first."""
    kind = type(node).__name__
    if kind == "VectorSelector":
        yield from _selector(node, state, around, ranged=False)
    elif kind == "MatrixSelector":
        yield from _selector(node.vector_selector, state, around, ranged=True)
    elif kind == "Call":
        for each in node.args:
            yield from _walk(each, state, (*around, node.func.name))
    elif kind == "AggregateExpr":
        if node.modifier is not None:
            state.asked |= set(node.modifier.labels)
        yield from _walk(node.expr, state, around)
    elif kind == "BinaryExpr":
        if node.modifier is not None and node.modifier.matching is not None:
            state.asked |= set(node.modifier.matching.labels)
        yield from _walk(node.lhs, state, around)
        yield from _walk(node.rhs, state, around)
    elif kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        yield from _walk(node.expr, state, around)
    elif kind not in ("NumberLiteral", "StringLiteral"):
        yield f"{kind} is not known to this check"


def _selector(selector: Any, state: _Query, around: tuple[str, ...], ranged: bool) -> Iterator[str]:
    name = selector.name
    state.names.add(name)
    found = state.series.get(name)
    if found is None:
        yield f"{name} is no metric of ours"
        return
    state.labels |= found.labels
    inner = around[-1] if around else ""
    if found.kind == "gauge" and inner in OVER_COUNTERS:
        yield f"{inner} of {name}, which is a gauge"
    if found.kind != "gauge" and (not ranged or inner not in OVER_COUNTERS):
        yield f"{name} only rises: it needs rate or increase"
    if found.kind == "gauge" and ranged and inner not in OVER_GAUGES:
        yield f"{inner} of a range of {name}"
    for matcher in selector.matchers.matchers:
        if matcher.name not in found.labels | TARGET:
            yield f"{name} has no label {matcher.name}"
        if matcher.name == "le":
            yield f"{name}: which buckets there are, and how they are written, is Prometheus's affair"
        if matcher.name == "outcome":
            yield from _outcomes(matcher)


def _outcomes(matcher: Any) -> Iterator[str]:
    every = re.split(r"\|", matcher.value) if matcher.op in (MatchOp.Re, MatchOp.NotRe) else [matcher.value]
    unknown = set(every) - OUTCOMES
    if unknown:
        yield f"no request ends as {sorted(unknown)}"
