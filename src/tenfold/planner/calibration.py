"""How published rows move the coefficients.

Each term of a coefficient has a prior of zero with a width; the fit is a regularised robust least squares (Student-t
weights, Gauss-Newton with Levenberg damping) on log(predicted / reported tokens per second).
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from tenfold.planner.coefficients import OFFSETS, PRIORS, attention_unfused, tag_values
from tenfold.planner.config import Cluster
from tenfold.planner.data import Row
from tenfold.planner.memory import inferred_recompute
from tenfold.planner.operators import Coefficients, UnitSeconds, hardware_vector, plan_vector, unit_seconds
from tenfold.planner.pipeline import Stage, partition, stage_times
from tenfold.planner.shapes import shape_vector, stacked
from tenfold.planner.simulation import makespan_slopes

NOISE = 0.06  # scale of a trustworthy row's logarithmic error
_BLOCKS = ("dense", "moe", "moe_pair", "head", "embed", "mtp")
_SCALARS = (*(f"{block}_{way}" for block in _BLOCKS for way in ("forward", "backward")), "send")


class _Table:
    """Rows laid out as arrays, with the pipeline's dependence on the building blocks linearised row by row."""

    def __init__(
        self, rows: list[Row], base: dict[str, dict[str, float]] | None = None, tightness: float = 1.0
    ) -> None:
        """Args: rows; terms to start from and to stay near (None: the priors); factor on the widths of the priors."""
        self.rows = rows
        self.shape = stacked([shape_vector(r.model) for r in rows])
        self.hardware = stacked([hardware_vector(r.hardware, r.plan.precision) for r in rows])
        plans = [plan_vector(r.plan, r.devices, attention_unfused(r.plan.stack)) for r in rows]
        self.inferred = [0.0] * len(rows)
        for index, (row, vector) in enumerate(zip(rows, plans, strict=True)):
            if row.plan.recompute == "unstated":
                self.inferred[index] = inferred_recompute(
                    row.model, Cluster(row.hardware, row.devices), row.plan, vector
                )
                vector.inferred = self.inferred[index]
        self.plan = stacked(plans)
        self.target = np.log(np.array([r.tokens_per_s for r in rows], dtype=float))
        self.tokens = np.array([r.plan.gbs * r.plan.seq / r.devices for r in rows], dtype=float)
        self.stages = [partition(r.model, r.plan) for r in rows]
        self.linear = np.zeros((len(rows), len(_SCALARS)))
        self.basis = [_basis(r, stages) for r, stages in zip(rows, self.stages, strict=True)]
        self.names: list[tuple[str, str]] = []
        columns: dict[tuple[str, str], np.ndarray] = {}
        for index, row in enumerate(rows):
            for name in PRIORS:
                for tag, factor in tag_values(name, row.hardware, row.model, row.plan).items():
                    columns.setdefault((name, tag), np.zeros(len(rows)))[index] = factor
        for key, column in columns.items():
            prior = PRIORS[key[0]]
            width = prior.width if key[1] == "base" else prior.tags[key[1].split(":")[0]]
            if width > 0:
                self.names.append(key)
                del column
        self.columns = {key: columns[key] for key in self.names}
        known = base or {}
        self.offset = np.array(
            [known.get(name, {}).get(tag, OFFSETS.get((name, tag), 0.0)) for name, tag in self.names]
        )
        self.width = np.array(
            [PRIORS[n].width if t == "base" else PRIORS[n].tags[t.split(":")[0]] for n, t in self.names]
        )
        self.width = self.width * tightness

    def coefficients(self, theta: np.ndarray) -> Coefficients:
        shift = {name: np.zeros(len(self.rows)) for name in PRIORS}
        for value, (name, tag) in zip(theta + self.offset, self.names, strict=True):
            shift[name] = shift[name] + value * self.columns[(name, tag)]
        return Coefficients(
            **{n: np.clip(PRIORS[n].value * np.exp(s), PRIORS[n].low, PRIORS[n].high) for n, s in shift.items()}
        )

    def units(self, theta: np.ndarray, nudged: tuple[str, ...] = ()) -> UnitSeconds:
        """Unit seconds of every row; with `nudged`, [coefficients, rows]: a line has one coefficient moved by 1e-4."""
        coefficients = self.coefficients(theta)
        for line, name in enumerate(nudged):
            prior = PRIORS[name]
            value = getattr(coefficients, name)
            lines = np.repeat(value[None], len(nudged), axis=0)
            lines[line] = np.clip(value * np.exp(1e-4), prior.low, prior.high)
            setattr(coefficients, name, lines)
        return unit_seconds(self.shape, self.hardware, self.plan, coefficients)

    def jacobian(self, theta: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Derivative of `predict` [rows, terms]: a term moves its coefficient by its column, row by row."""
        names = tuple(sorted({name for name, _ in self.names}))
        slopes = dict(zip(names, (self.predict(theta, names) - current) / 1e-4, strict=True))
        return np.stack([slopes[name] * self.columns[(name, tag)] for name, tag in self.names], axis=1)

    def linearise(self, theta: np.ndarray) -> None:
        """Seconds of the pipeline per second of each block: the makespan is homogeneous and piecewise linear in the
        blocks."""
        u = self.units(theta)
        for index, row in enumerate(self.rows):
            scalars = {
                name: float(np.broadcast_to(getattr(u, name), len(self.rows))[index])
                for name in (f.name for f in fields(u))
                if name != "parts"
            }
            self.linear[index] = _row_slopes(row, self.stages[index], self.basis[index], scalars)

    def predict(self, theta: np.ndarray, nudged: tuple[str, ...] = ()) -> np.ndarray:
        """log tokens/s/device [rows]; with `nudged` [coefficients, rows]."""
        u = self.units(theta, nudged)
        seconds = sum(self.linear[:, i] * getattr(u, name) for i, name in enumerate(_SCALARS))
        return np.log(self.tokens / ((seconds + u.step) * u.factor))


def _basis(row: Row, stages: list[Stage]) -> np.ndarray:
    """Stage times per second of each block [scalars, columns of `StageTimes`, stages]: linear."""
    zero = {field.name: 0.0 for field in fields(UnitSeconds) if field.name != "parts"}
    columns = []
    for name in _SCALARS:
        times = stage_times(stages, UnitSeconds(**{**zero, name: 1.0}, parts={}), row.plan)
        columns.append([times.forward, times.backward, times.weight, times.pair_forward, times.pair_backward])
    return np.array(columns, dtype=float)


def _row_slopes(row: Row, stages: list[Stage], basis: np.ndarray, scalars: dict[str, float]) -> np.ndarray:
    """Derivatives of a row's pipeline seconds by the seconds of each block [scalars]."""
    times = stage_times(stages, UnitSeconds(**scalars, parts={}), row.plan)
    count = row.plan.microbatches(row.devices) or 1
    pp, vpp = row.plan.pp, row.plan.vpp
    # Some rows give a batch that does not fill the last round; time grows by rounds, so they are measured in whole
    # ones.
    whole = count if vpp == 1 or count % pp == 0 else -(-count // pp) * pp
    schedule = row.plan.resolved_schedule()
    if schedule in ("adaptive", "dualpipe", "dualpipev") and whole < 2 * pp:
        schedule = "interleaved" if vpp > 1 else "1f1b"  # too few micro-batches to join any
    slopes = makespan_slopes(schedule, pp, vpp, whole, times)
    path = np.array([slopes.forward, slopes.backward, slopes.weight, slopes.pair_forward, slopes.pair_backward])
    answer = np.tensordot(basis, path, axes=2)
    answer[-1] += slopes.send
    return answer * count / whole


def usable(rows: list[Row]) -> list[Row]:
    """Rows that the metric counts: throughput reported, batch known."""
    return [row for row in rows if row.tokens_per_s and "gbs" not in row.assumed]


def _weights(rows: list[Row]) -> np.ndarray:
    """Rows of one cluster repeat nearly the same run: a cluster of n rows counts like sqrt(n)."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.cluster] = sizes.get(row.cluster, 0) + 1
    return np.array([sizes[row.cluster] ** -0.5 for row in rows])


def _solve(table: _Table, theta: np.ndarray, weight: np.ndarray, noise: np.ndarray, steps: int) -> np.ndarray:
    """Gauss-Newton with Levenberg damping on Student-t errors (4 degrees of freedom) and normal priors."""

    def cost(th: np.ndarray, predicted: np.ndarray) -> float:
        return float(
            (weight * 2.5 * np.log1p(((predicted - table.target) / noise) ** 2 / 4)).sum()
            + 0.5 * ((th / table.width) ** 2).sum()
        )

    damping = 1e-2
    current = table.predict(theta)
    for _ in range(steps):
        error = current - table.target
        scaled = weight * 5.0 / (4.0 + (error / noise) ** 2) / noise**2
        jacobian = table.jacobian(theta, current)
        normal = jacobian.T @ (scaled[:, None] * jacobian) + np.diag(1 / table.width**2)
        gradient = jacobian.T @ (scaled * error) + theta / table.width**2
        before = cost(theta, current)
        after = before
        for _ in range(6):
            trial = theta - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            predicted = table.predict(trial)
            after = cost(trial, predicted)
            if after < before:
                theta, current, damping = trial, predicted, max(damping / 4, 1e-6)
                break
            damping *= 5
        if before - after < 1e-3:
            break
    return theta


def _noise(rows: list[Row]) -> np.ndarray:
    return np.array([2.0 if row.recalled else 1.0 for row in rows]) * NOISE


def _terms(table: _Table, theta: np.ndarray) -> dict[str, dict[str, float]]:
    terms: dict[str, dict[str, float]] = {}
    for value, (name, tag) in zip(theta + table.offset, table.names, strict=True):
        if abs(value) > 5e-4:
            terms.setdefault(name, {})[tag] = round(float(value), 4)
    return terms


def fit(
    rows: list[Row], outer: int = 3, inner: int = 10, base: dict[str, dict[str, float]] | None = None
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """Fit the terms on rows.

    Args:
        rows: from `read_rows`; unusable ones are dropped.
        outer: times the pipeline is linearised anew.
        inner: Gauss-Newton steps in between.
        base: terms of another calibration to adapt: priors are centred on it at half their width, and rows are
            trusted to 2%.

    Returns:
        Terms, and log(predicted/reported) of the usable rows.
    """
    rows = usable(rows)
    table = _Table(rows, base, 0.5 if base else 1.0)
    noise = _noise(rows) * (0.02 / NOISE if base else 1.0)
    theta = np.zeros(len(table.names))
    for _ in range(outer):
        table.linearise(theta)
        theta = _solve(table, theta, _weights(rows), noise, inner)
    table.linearise(theta)
    terms = _terms(table, theta)
    if base:
        terms = {name: {**base.get(name, {}), **terms.get(name, {})} for name in {**base, **terms}}
    return terms, table.predict(theta) - table.target


def cross_validate(rows: list[Row], inner: int = 6, family: str = "") -> np.ndarray:
    """log(predicted/reported) of every usable row by a fit that never saw its cluster (same model and hardware).

    Every fold starts from the fit on all rows but with the left-out rows at weight zero; terms that only they support
    fall back to their prior.
    """
    rows = usable(rows)
    table = _Table(rows)
    theta = np.zeros(len(table.names))
    for _ in range(2):
        table.linearise(theta)
        theta = _solve(table, theta, _weights(rows), _noise(rows), 10)
    table.linearise(theta)
    support = np.stack([table.columns[key] != 0 for key in table.names])
    error = np.empty(len(rows))
    for cluster in sorted({row.cluster for row in rows}):
        out = np.array([row.cluster == cluster for row in rows])
        start = np.where((support & ~out).any(axis=1), theta, 0.0)
        fold = _solve(table, start, _weights(rows) * ~out, _noise(rows), inner)
        error[out] = (table.predict(fold) - table.target)[out]
    return error


def predict_rows(rows: list[Row], terms: dict[str, dict[str, float]]) -> np.ndarray:
    """log(predicted/reported) of usable rows under given terms (terms of unknown tags are left out)."""
    table = _Table(usable(rows))
    theta = (
        np.array([terms.get(name, {}).get(tag, OFFSETS.get((name, tag), 0.0)) for name, tag in table.names])
        - table.offset
    )
    table.linearise(theta)
    return table.predict(theta) - table.target
