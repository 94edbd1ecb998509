"""Queries of declared metrics: a name that services/runtime/metrics.py does not declare cannot be written."""

from __future__ import annotations

from typing import Literal

from services.runtime.metric_spec import MetricSpec

CLUSTER = 'cluster=~"$cluster"'
OWN_MEMBER = 'member=~"$instance"'
Suffix = Literal["", "_bucket", "_sum", "_count"]


def series(spec: MetricSpec, *matchers: str, suffix: Suffix = "") -> str:
    """A metric's series in the chosen cluster.

    Args:
        matchers: of labels, as 'state="free"'.
        suffix: of a histogram's or summary's series.
    """
    assert bool(suffix) == (spec.kind in ("histogram", "summary"))
    return f"{spec.name}{suffix}{{{','.join((CLUSTER, *matchers))}}}"


def rate(spec: MetricSpec, *matchers: str, suffix: Suffix = "") -> str:
    """Growth per second of each of them."""
    return f"rate({series(spec, *matchers, suffix=suffix)}[$__rate_interval])"


def total(query: str, by: str = "") -> str:
    """The sum, of all or for each value of the labels ``by``."""
    return f"sum by ({by}) ({query})" if by else f"sum({query})"


def quantile(share: float, spec: MetricSpec, *matchers: str, by: str = "") -> str:
    """An estimate from a histogram's buckets, in the metric's unit."""
    buckets = total(rate(spec, *matchers, suffix="_bucket"), f"le, {by}" if by else "le")
    return f"histogram_quantile({share}, {buckets})"


def mean(spec: MetricSpec, *matchers: str, by: str = "") -> str:
    """Of what a histogram or summary observed."""
    observed, count = rate(spec, *matchers, suffix="_sum"), rate(spec, *matchers, suffix="_count")
    return f"{total(observed, by)} / {total(count, by)}"
