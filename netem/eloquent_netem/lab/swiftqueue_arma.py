"""ARMA models of series that are observed one by one, and forecast several steps ahead.

Needs scipy.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from eloquent_netem.lab.swiftqueue_knowledge import Floats, Ints

LONG_ORDER = 32
"Of the autoregression whose residuals stand for the innovations."
MOST_AHEAD = 128
"Forecasts further ahead than this many steps are as for this many."
LARGEST_ROOT = 0.98


class ArmaModel:
    """x[k] = c + sum of phi[j] x[k-j] + e[k] + sum of theta[j] e[k-j], in seconds."""

    def __init__(self, constant: float, phi: Floats, theta: Floats) -> None:
        self._theta = theta
        self._phi = phi
        self._constant = constant
        p, q = len(phi), len(theta)
        # The state is x's last p, e's last q, and 1: a step ahead is a product with this.
        step = np.zeros((p + q + 1, p + q + 1))
        step[0, :p], step[0, p : p + q], step[0, -1] = phi, theta, constant
        step[1:p, : p - 1] = np.eye(p - 1)
        if q > 1:
            step[p + 1 : p + q, p : p + q - 1] = np.eye(q - 1)
        step[-1, -1] = 1.0
        ahead = [step[0]]
        for _ in range(MOST_AHEAD - 1):
            ahead.append(ahead[-1] @ step)
        self._ahead = np.stack(ahead)

    @classmethod
    def white(cls) -> "ArmaModel":
        """Return the model that has seen nothing and says the base."""
        return cls(0.0, np.zeros(1), np.zeros(0))

    def ahead(self, x: Floats, position: Ints, steps: Ints) -> Floats:
        """Return the wait so many steps after each position of a series; NaN where that is -1."""
        if not len(x):
            return np.full(len(position), np.nan)
        p, q = len(self._phi), len(self._theta)
        states = np.concatenate(
            (_lags(x, p, x[0]), _lags(self.innovations(x), q, 0.0), np.ones((len(x), 1))), axis=1
        )
        at = np.maximum(position, 0)
        found = np.einsum("ij,ij->i", states[at], self._ahead[np.clip(steps, 1, MOST_AHEAD) - 1])
        return np.where(position >= 0, found, np.nan)

    def innovations(self, x: Floats) -> Floats:
        """Return e along a series; what lies before it counts as its first value."""
        from scipy.signal import lfilter

        p = len(self._phi)
        before = np.concatenate((np.full(1, x[0]), x[:-1]))
        explained = self._constant + _lags(before, p, x[0]) @ self._phi
        found: Floats = lfilter([1.0], np.concatenate(([1.0], self._theta)), x - explained)
        return found


def fit_arma(series: Iterable[Floats], p: int, q: int) -> ArmaModel:
    """Fit one model to all series, by least squares; too short ones are left out.

    The moving average is fitted on the residuals of a long autoregression (Hannan and Rissanen
    1982). With no series at all, the model is that the last value stays.
    """
    waits = [x for x in series if len(x) > LONG_ORDER]
    if not waits:
        return ArmaModel(0.0, np.concatenate(([1.0], np.zeros(p - 1))), np.zeros(q))
    errors = [np.zeros(len(x)) for x in waits]
    if q:
        constant, phi, _ = _regress(waits, errors, LONG_ORDER, 0)
        long = ArmaModel(constant, phi, np.zeros(0))
        errors = [long.innovations(x) for x in waits]
    constant, phi, theta = _regress(waits, errors, p, q)
    # What grows without bound is no forecast.
    return ArmaModel(constant, _stable(phi), -_stable(-theta))


def _regress(
    waits: Sequence[Floats], errors: Sequence[Floats], p: int, q: int
) -> tuple[float, Floats, Floats]:
    """Return c, phi and theta by least squares over all series, the beginnings left out."""
    square = np.zeros((p + q + 1, p + q + 1))
    joint = np.zeros(p + q + 1)
    for x, e in zip(waits, errors, strict=True):
        known = np.concatenate(
            (np.ones((len(x) - 1, 1)), _lags(x[:-1], p, x[0]), _lags(e[:-1], q, 0.0)), axis=1
        )[LONG_ORDER - 1 :]
        square += known.T @ known
        joint += known.T @ x[LONG_ORDER:]
    # A trace of ridge, for flows in which nothing ever waits.
    found = np.linalg.solve(square + 1e-9 * np.eye(len(joint)), joint).astype(np.float64)
    return float(found[0]), found[1 : p + 1], found[p + 1 :]


def _stable(coefficients: Floats) -> Floats:
    """Shrink a recursion's coefficients until its largest root is below one."""
    if not len(coefficients):
        return coefficients
    root = float(np.max(np.abs(np.roots(np.concatenate(([1.0], -coefficients))))))
    if root <= LARGEST_ROOT:
        return coefficients
    shrunk: Floats = coefficients * (LARGEST_ROOT / root) ** np.arange(1, len(coefficients) + 1)
    return shrunk


def _lags(x: Floats, count: int, before: float) -> Floats:
    """Return (m, count): each value and the `count` - 1 before it, newest first."""
    if not count:
        return np.zeros((len(x), 0))
    padded = np.concatenate((np.full(count - 1, before), x))
    return np.lib.stride_tricks.sliding_window_view(padded, count)[:, ::-1]
