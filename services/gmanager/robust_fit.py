"""Least squares for timings: few coefficients, none negative, robust, with forgetting. Pure.

Timings differ by orders of magnitude and their noise is proportional to them, so everything here is relative. With
a prior guess ``prior`` of the coefficients, what is estimated is the factor ``f`` on each of them, and an observation
``(x, y)`` enters as

    z = x * prior / s,   s = sqrt(y * predicted)          residual e = (y - x . coefficients) / s

which is dimensionless and, up to second order, the logarithm of observed over predicted: the same code fits
microseconds and minutes. ``A`` is the information about ``f``; the prior counts as ``_PRIOR_WEIGHT`` observations.

- *Robust* (Huber): ``w = min(1, _HUBER * scale / |e|)``, the scale being the running median of ``|e|``. An outlier
  counts as much as an observation at the edge of what is usual. If half of the window is unusual, that is the new
  normal, and a change of the device's rate is followed at full speed.
- *Forgetting with a floor*: ``A <- keep A + (1 - keep) A0 + w z z'``. ``A0`` (``_FLOOR_WEIGHT``, about relative changes
  of ``f``) stands around the present estimate, not around the prior: while all batches are alike, what was learned of
  others loses weight but is not altered, and ``A`` never loses a direction.
- *No negative coefficient*: the estimate is projected onto ``f >= 0`` in the metric of ``A`` (what is taken from one
  coefficient is made up for by the others).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from operator import mul

_PRIOR_WEIGHT = 1.0  # at start, in observations: one outlier must not undo a calibration
_FLOOR_WEIGHT = 0.003
_HUBER = 2.5
_FIRST_SCALE = 0.1  # as long as no error is known
_SCALE_FLOOR = 0.01  # timings are never known better than this
_MEDIAN_WINDOW = 31
_FARTHEST = 10.0  # a prediction that is off by more is treated as if it were off by this factor squared
_LEAST = 1e-9  # of what the prior predicts: where next to nothing was expected and came, no sum overflows
_RIDGE = 1e-9  # of the diagonal: rounding must not make a matrix singular
_TINY = 1e-12

Vector = Sequence[float]


class RunningMedian:
    """Median of the last ``_MEDIAN_WINDOW`` values."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: float) -> None:
        if len(self._recent) == _MEDIAN_WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(value)
        insort(self._sorted, value)

    @property
    def value(self) -> float | None:
        """None before the first value."""
        return self._sorted[len(self._sorted) // 2] if self._sorted else None


class RobustFit:
    """Follows the coefficients of ``y = x . coefficients``.

    Args:
        prior: a guess of each coefficient, > 0; units of y over those of x.
        keep: what remains of the information at every observation; ``1 / (1 - keep)`` of them are remembered.
    """

    def __init__(self, prior: Vector, keep: float = 0.98) -> None:
        if not all(math.isfinite(value) and value > 0 for value in prior):
            raise ValueError(f"priors must be positive and finite, got {tuple(prior)}")
        size = len(prior)
        self._prior = tuple(prior)
        self._keep = keep
        self._factors = [1.0] * size
        self._information = [[_PRIOR_WEIGHT * (row == column) for column in range(size)] for row in range(size)]
        self._error = RunningMedian()

    @property
    def coefficients(self) -> tuple[float, ...]:
        """All >= 0."""
        return tuple(prior * factor for prior, factor in zip(self._prior, self._factors, strict=True))

    @property
    def error(self) -> float | None:
        """Running median of the relative error of predictions, each made before its observation was used."""
        return self._error.value

    def update(self, x: Vector, y: float) -> None:
        """Takes in one observation. ``x >= 0``, not all 0. A ``y`` that is not positive and finite says nothing."""
        if not (math.isfinite(y) and y > 0):
            return
        scaled: list[float] = list(map(mul, x, self._prior))
        predicted = _dot(scaled, self._factors)
        norm = max(math.sqrt(y * predicted), y / _FARTHEST, predicted / _FARTHEST, sum(scaled) * _LEAST)
        z = [a / norm for a in scaled]
        residual = (y - predicted) / norm
        scale = self._error.value
        self._error.add(abs(residual))
        usual = max(_FIRST_SCALE if scale is None else scale, _SCALE_FLOOR)
        weight = min(1.0, _HUBER * usual / abs(residual)) if residual else 1.0
        self._forget_and_learn(z, weight)
        step = solve(self._information, [weight * residual * a for a in z])
        factors = [factor + change for factor, change in zip(self._factors, step, strict=True)]
        self._factors = project(self._information, factors) if min(factors) < 0 else factors

    def _forget_and_learn(self, z: Vector, weight: float) -> None:
        keep = 1.0 - weight * (1.0 - self._keep)
        floor = (1.0 - keep) * _FLOOR_WEIGHT
        for row, values in enumerate(self._information):
            known = weight * z[row]
            for column in range(len(values)):
                values[column] = keep * values[column] + known * z[column]
            values[row] += floor / max(self._factors[row], 0.1) ** 2


def least_squares(rows: Iterable[tuple[Vector, float]], size: int) -> tuple[list[float], float]:
    """Coefficients >= 0 that minimise the sum of squared relative errors of ``y = x . coefficients``; and that sum.

    Args:
        rows: (x, y), y > 0.
        size: length of every x.
    """
    observations = [([a / y for a in x]) for x, y in rows]
    units = [max((row[k] for row in observations), default=0.0) or 1.0 for k in range(size)]
    scaled = [[a / unit for a, unit in zip(row, units, strict=True)] for row in observations]
    information = [[sum(row[i] * row[k] for row in scaled) + 1e-9 * (i == k) for k in range(size)] for i in range(size)]
    free = solve(information, [sum(row[k] for row in scaled) for k in range(size)])
    best = project(information, free)
    misfit = sum((1.0 - _dot(row, best)) ** 2 for row in scaled)
    return [value / unit for value, unit in zip(best, units, strict=True)], misfit


def solve(matrix: Sequence[Vector], right: Vector) -> list[float]:
    """Solves ``matrix x = right``, matrix symmetric and positive definite (elimination without pivoting)."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for k in range(size):
        rows[k][k] += _RIDGE * rows[k][k] + _TINY
    for k in range(size):
        pivot = rows[k]
        inverse = 1.0 / pivot[k]
        for row in rows[k + 1 :]:
            factor = row[k] * inverse
            for column in range(k + 1, size + 1):
                row[column] -= factor * pivot[column]
    answer = [0.0] * size
    for k in reversed(range(size)):
        row = rows[k]
        answer[k] = (row[size] - _dot(row[k + 1 : size], answer[k + 1 :])) / row[k]
    return answer


def project(metric: Sequence[Vector], point: Vector) -> list[float]:
    """A vector ``v >= 0`` near ``point`` in ``(v - point)' metric (v - point)``.

    Negative coordinates are held at 0 and the others moved to where they are best then, until none is negative.
    """
    nearest = list(point)
    free = list(range(len(point)))
    while any(nearest[k] < 0 for k in free):
        free = [k for k in free if nearest[k] >= 0]
        held = [k for k in range(len(point)) if k not in free]
        pull = [sum(metric[k][j] * point[j] for j in held) for k in free]
        shift = solve([[metric[k][j] for j in free] for k in free], pull)
        nearest = [0.0] * len(point)
        for k, change in zip(free, shift, strict=True):
            nearest[k] = point[k] + change
    return nearest


def _dot(a: Vector, b: Vector) -> float:
    return float(sum(map(mul, a, b)))
