"""Rows of weights and importance weights that are hard to quantize: what parity tests and property tests share."""

from __future__ import annotations

import numpy as np

from quantkit import GGMLType

N_PER_ROW = 768  # three super-blocks of 256: an odd number, and every other block size divides it


# Without importance weights ggml refuses these.
NEED_WEIGHTS = {GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ1_S}


def named_rows(n: int = N_PER_ROW) -> dict[str, np.ndarray]:
    """Single rows of `n` finite float32, each with the property that its name says."""
    random = np.random.default_rng(1)

    def normal() -> np.ndarray:
        return random.standard_normal(n)

    def spike(at: int, value: float, base: np.ndarray | float = 0.0) -> np.ndarray:
        row = np.zeros(n) + base
        row[at] = value
        return row

    rows = {
        "zeros": np.zeros(n),
        "negative zeros": np.full(n, -0.0),
        "zeros of both signs": np.where(random.random(n) < 0.5, 0.0, -0.0),
        "single nonzero": spike(37, 5.0),
        "single negative": spike(300, -1e5),
        "one outlier": spike(5, 1e6, normal()),
        "half zero": np.where(np.arange(n) < n // 2, 0.0, normal()),
        "every other zero": np.where(np.arange(n) % 2 == 0, 0.0, normal()),
        "blocks of zeros": np.where(np.arange(n) // 16 % 2 == 0, -0.0, normal()),
        "negative": -np.abs(normal()),
        "positive": np.abs(normal()),
        "negative, tiny spread": -1 - 1e-3 * np.abs(normal()),
        "negative, spread of an ulp": -1 - 1e-7 * np.abs(normal()),
        "positive, tiny spread": 1 + 1e-6 * np.abs(normal()),
        "uniform": random.uniform(-1, 1, n),
        "laplace": random.laplace(size=n),
        "heavy tails": random.standard_t(1.5, size=n),
        "heaviest tails": random.standard_cauchy(size=n),
        "quarters": np.round(normal() * 4) / 4,
        "two values": random.choice([-1.0, 1.0], n),
        "three values": random.choice([-1.0, 0.0, 1.0], n),
        "ramp": np.linspace(-1, 1, n),
        "ties between levels": random.integers(-8, 8, n) + 0.5,
        "ties between float4 levels": random.choice([0.5, 1.5, 2.5, 3.5, 5, 7, 10, 12, -0.5, -2.5, -5, -7, -10], n),
        "powers of two": np.ldexp(random.choice([-1.0, 1.0], n), random.integers(-20, 20, n)),
        "just below powers of two": np.repeat(np.ldexp(1 - 2.0**-24, np.arange(n // 32) * 9 - 100), 32),
        "every scale in turn": normal() * np.ldexp(1.0, np.arange(n) // 16 * 5 - 120),
        "denormal and zero": np.where(random.random(n) < 0.5, 1e-40, -1e-41),
        "smallest denormals": random.integers(-3, 4, n) * 1.4e-45,
        "denormal and normal": np.where(np.arange(n) // 32 % 2 == 0, 1e-40, 1.0) * normal(),
        "largest and least": np.where(np.arange(n) % 2 == 0, 3e38, 1e-38) * random.choice([-1, 1], n),
        "huge of both signs": random.uniform(-3e38, 3e38, n),
        "huge outlier": spike(100, -3e38, normal()),
    }
    for value in (1, -1, 1e-20, 3e-39, -3e-39, 6e-8, 65504, 7e4, 1e30, -1e38, 3e38):
        rows[f"constant {value:g}"] = np.full(n, value)
    for scale in (1, 0.02, 1e-3, 1e-5, 1e-8, 1e-15, 1e-16, 1e-20, 1e-30, 1e-38, 1e-42, 1e4, 1e10, 1e19, 1e30):
        rows[f"normal of scale {scale:g}"] = normal() * scale
    return {name: row.astype(np.float32) for name, row in rows.items()}


def random_rows(count: int = 120, n: int = N_PER_ROW) -> np.ndarray:
    """Rows as models have them: normal at every scale between columns, mild and wild."""
    random = np.random.default_rng(2)
    spread = random.uniform(0, 3, (count, 1))
    return (0.02 * random.standard_normal((count, n)) * np.exp(random.standard_normal((count, n)) * spread)).astype(
        np.float32
    )


def all_rows() -> np.ndarray:
    """Every row of this module, in one array."""
    return np.concatenate([np.stack(list(named_rows().values())), random_rows()])


def importance() -> dict[str, np.ndarray | None]:
    """Importance weights for rows of N_PER_ROW columns."""
    random = np.random.default_rng(3)
    n = N_PER_ROW
    uneven = np.exp(2 * random.standard_normal(n))
    weights: dict[str, np.ndarray | None] = {
        "none": None,
        "uniform": np.ones(n),
        "uneven": uneven,
        "with zeros": np.where(random.random(n) < 0.5, 0.0, uneven),
        "blocks of zeros": np.where(np.arange(n) // 32 % 2 == 0, 0.0, uneven),
        "all zero": np.zeros(n),
        "one": np.where(np.arange(n) == 70, 1.0, 0.0),
        "huge": 1e30 * uneven,
        "largest": np.full(n, 3e38),
        "denormal": 1e-41 * uneven,
    }
    return {name: None if w is None else w.astype(np.float32) for name, w in weights.items()}


# Formats whose reference ends the process where its sums leave float32: every distance from the grid is infinite.
GRIDS = [k for k in GGMLType if k.name.startswith(("IQ1", "IQ2", "IQ3"))]


def encodable_by_ggml(rows: np.ndarray, kind: GGMLType, weights: np.ndarray | None) -> np.ndarray:
    """`rows`, with zeros for those that the reference cannot encode as `kind` without ending the process."""
    if kind not in GRIDS:
        return rows
    most = 1.0 if weights is None else float(weights.max())
    limit = 5e10 if most < 1e10 else 2e4 if most < 1e32 else 0
    return np.where(np.abs(rows).max(axis=1, keepdims=True) <= limit, rows, np.float32(0))
