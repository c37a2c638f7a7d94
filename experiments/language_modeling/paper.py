"""Table 2 of the paper: perplexity, accuracy and the ranks by them.

Sources: 760M and 1.3B from Nested Learning; 340M Hope from its NeurIPS version,
all other rows of 340M and 400M from Titans (2501.00663).  `TTT` is compared
with TTT-Linear; the paper does not say which of the two it is.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Numbers(NamedTuple):
  """WikiText perplexity per subword; mean accuracy of eight tasks, percent."""

  perplexity: float
  accuracy: float


TOKENS = {"340M": "15B", "400M": "15B", "760M": "30B", "1.3B": "100B"}
# Size -> row of `switch_off.MODELS` -> numbers.
TABLE = {
  "340M": {
    "Transformer++": Numbers(31.52, 42.92),
    "RetNet": Numbers(32.50, 42.54),
    "Mamba": Numbers(30.83, 43.59),
    "DeltaNet": Numbers(28.65, 44.04),
    "TTT-Linear": Numbers(27.44, 44.51),
    "Gated DeltaNet": Numbers(27.01, 45.42),
    "Titans": Numbers(26.18, 46.17),
    "Titans MAC": Numbers(25.43, 47.36),
    "Titans MAG": Numbers(25.07, 47.54),
    "Titans MAL": Numbers(24.69, 46.55),
    "Hope": Numbers(26.05, 46.90),
  },
  "400M": {
    "Mamba2": Numbers(26.34, 46.91),
    "Samba": Numbers(25.32, 47.23),
    "Titans": Numbers(25.03, 47.83),
  },
  "760M": {
    "Transformer++": Numbers(24.18, 50.11),
    "Samba": Numbers(21.07, 51.46),
    "RetNet": Numbers(25.77, 48.19),
    "DeltaNet": Numbers(24.52, 49.63),
    "RWKV-7": Numbers(23.75, 50.55),
    "Comba": Numbers(22.41, 50.89),
    "TTT-Linear": Numbers(24.17, 47.32),
    "Memora": Numbers(22.28, 51.53),
    "DLA": Numbers(23.12, 50.48),
    "Titans": Numbers(20.08, 51.68),
    "Hope": Numbers(18.68, 52.28),
  },
  "1.3B": {
    "Transformer++": Numbers(17.92, 53.38),
    "Samba": Numbers(16.15, 54.46),
    "RetNet": Numbers(18.91, 52.60),
    "DeltaNet": Numbers(18.62, 51.39),
    "RWKV-7": Numbers(18.44, 55.30),
    "Comba": Numbers(18.16, 55.39),
    "TTT-Linear": Numbers(18.42, 55.58),
    "Memora": Numbers(15.90, 55.76),
    "DLA": Numbers(16.31, 53.72),
    "Titans": Numbers(15.60, 56.82),
    "Hope": Numbers(14.39, 58.04),
  },
}
# Every model of Table 2, in the order of `TABLE`.
ROWS = tuple(dict.fromkeys(row for rows in TABLE.values() for row in rows))


def ranks(values: Sequence[float]) -> list[float]:
  """1 for the lowest; equal values share the mean of their places, and what is
  not a number is as bad as infinity."""
  values = [math.inf if math.isnan(value) else value for value in values]
  places: dict[float, list[int]] = {}
  for place, value in enumerate(sorted(values), 1):
    places.setdefault(value, []).append(place)
  return [statistics.fmean(places[value]) for value in values]


def ranked(size: str, rows: Iterable[str]) -> dict[str, tuple[float, float]]:
  """Ranks by perplexity (lowest first) and by accuracy (highest first) of those
  `rows` that Table 2 has at `size`, among each other."""
  found = {row: TABLE[size][row] for row in rows if row in TABLE[size]}
  by_perplexity = ranks([numbers.perplexity for numbers in found.values()])
  by_accuracy = ranks([-numbers.accuracy for numbers in found.values()])
  pairs = zip(by_perplexity, by_accuracy, strict=True)
  return dict(zip(found, pairs, strict=True))


def spearman(ours: Mapping[str, float], size: str) -> float:
  """Correlation of the ranks by perplexity, ours and Table 2's at `size`."""
  rows = [row for row in ours if row in TABLE[size]]
  theirs = [TABLE[size][row].perplexity for row in rows]
  return statistics.correlation(
    ranks([ours[row] for row in rows]), ranks(theirs)
  )
