"""Several curves as one: their mean and range at the points that all of them cover."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence

from .log import Curve


def band(curves: Sequence[Curve]) -> list[tuple[float, float, float, float]]:
    """(x, lowest, mean, highest) at every x of a curve that all curves cover; between its points a curve is a line."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    places = sorted({x for curve in curves for x, _ in curve if first <= x <= last})
    values = [[value_at(curve, x) for curve in curves] for x in places]
    return [(x, min(found), statistics.fmean(found), max(found)) for x, found in zip(places, values)]


def value_at(curve: Curve, x: float) -> float:
    """A curve's value at `x`, which it must cover."""
    number = bisect.bisect_right(curve, (x, math.inf))
    (left, low), (right, high) = curve[number - 1], curve[min(number, len(curve) - 1)]
    return low + (high - low) * (x - left) / (right - left) if left < right else low


def along(curve: Curve, axis: Curve) -> Curve:
    """`curve` over what `axis` holds for its updates, (update, samples) say; [] where `axis` has no points.

    The axis is 0 at update 0, and goes on as it ended: a validation may be logged after the last line of training.
    """
    axis = [(0, 0.0), *((update, value) for update, value in axis if update > 0)]
    if len(axis) < 2:
        return []
    (left, low), (right, high) = axis[-2:]
    rate = (high - low) / (right - left)
    return [(value_at(axis, x) if x <= right else high + rate * (x - right), value) for x, value in curve if x >= 0]


def finite(curve: Curve) -> Curve:
    return [(x, value) for x, value in curve if math.isfinite(value)]


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Empty if there are no curves with a finite value, or they cover nothing together."""
    curves = [curve for curve in map(finite, curves) if curve]
    return [(x, mean) for x, _, mean, _ in band(curves)] if curves else []
