"""Table 2 in subwords: the plans and the report of scales `t2` and `gpu`.

Every row trains once on WikiText-2 and novels together, on equally many tokens
and one grid of learning rates; the tests of both are read whole.  Beside it
stand recall (MQAR) of a small model of the same kind, and reasoning tasks.

Legend: L mean loss in nats; N targets, W words, A bytes of a test split.
Perplexity exp(L), word perplexity exp(L N / W), bits per byte L N / (A ln 2).
"""

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from configs.subwords import CPU, GPU
from configs.subwords import Scale as Data
from experiments.language_modeling import paper, reasoning
from experiments.lib import plots, switch_off, tables
from experiments.lib.results import LEFT, Record
from experiments.lib.trials import Evaluation, Plan, Trial, slug, staged
from experiments.texts import subwords
from experiments.texts.subwords import Size
from hope_jax.training.evaluation import perplexity

MIN_ROWS = 10  # of a correlation
TEXT, RECALL = "text", "MQAR"
NOVELS = "novels"
# Both fast and slow kinds of memory, and attention; no rank is claimed.
PIPELINE_ROWS = (
  "Transformer++",
  "RetNet",
  "DeltaNet",
  "RWKV-7",
  "Comba",
  "Samba",
  "Titans",
  "Hope",
)
PIPELINE_NOTE = """\
**A check of the pipeline only**: too few tokens, too small models and a single
seed to rank anything.  Ranks and their correlation with the paper's are the
`gpu` scale's to claim.
"""
UNFINISHED_NOTE = """\
No ranks of ours and no correlation before every seed of every row is done.
"""
TASKS_NOTE = """\
Zero-shot, percent ± 95 % bounds over documents; `(n)`: by log-probability per
character of the answer.  What is within its bound of `chance` is guessed.
"""
PAPER_NOTE = """\
Paper: WikiText perplexity per subword / mean accuracy of eight reasoning tasks
(ranks by either, among the rows of this table that the paper has at that size).
Its subwords and training text are others: perplexities do not compare, ranks
may.
"""


class Scale(NamedTuple):
  """What a scale of Table 2 runs.

  Attributes:
    switch: of the configs' modes, for text; recall: the same for MQAR.
    recall_fields: overrides of all recall trials, the same for every row.
    documents: at most, of each reasoning task (None: all).
    is_claimed: ranks may be claimed, once all is done.
  """

  data: Data
  rows: tuple[str, ...]
  seeds: tuple[int, ...]
  switch: str
  rates: tuple[float, ...]
  recall: str
  recall_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
  recall_fields: Mapping[str, int] = {}
  documents: int | None = None
  is_claimed: bool = False


SCALES = {
  "t2": Scale(
    data=CPU,
    rows=switch_off.with_twins(PIPELINE_ROWS),
    seeds=(0,),
    switch="",
    rates=(2e-3, 4e-3, 8e-3),
    recall="",
    recall_fields={"train.steps": 800},
    documents=200,
  ),
  "t2_smoke": Scale(
    data=CPU,
    rows=("Transformer++", "Titans"),
    seeds=(0,),
    switch=",smoke",
    rates=(4e-3,),
    recall=",smoke",
    recall_rates=(4e-3,),
    documents=2,
  ),
  "gpu": Scale(
    data=GPU,
    rows=switch_off.with_twins((*paper.ROWS, "Transformer++ conv")),
    seeds=(0, 1, 2),
    switch=",gpu",
    rates=(5e-4, 1e-3, 2e-3),
    recall="_32",
    is_claimed=True,
  ),
}


def _trial(row: str, group: str, scale: Scale, data: str) -> Trial:
  """A row's trial, without its rate and seed."""
  off, common = switch_off.switch_offs(row), {"train.keep_checkpoints": 1}
  name = slug(f"{group}/{row}")
  if group == RECALL:
    return switch_off.trial(
      row,
      group=group,
      name=name,
      config="configs/mqar.py",
      suffix=scale.recall,
      overrides={**common, "train.eval_every": 0, **scale.recall_fields},
      evaluations=off[:1],
    )
  novels = f"--path={scale.data.folder}/{NOVELS}"
  tasks = reasoning.evaluation(data, scale.documents)
  return switch_off.trial(
    row,
    group=group,
    name=name,
    config="configs/subwords.py",
    suffix=scale.switch,
    overrides=common,
    evaluations=(Evaluation(NOVELS, ("--split=test", novels)), tasks, *off),
  )


def plan(scale: Scale, data: str) -> Plan:
  """Every row of text on the same grid and seeds, then recall likewise; the
  reasoning tasks are in the folder `data`."""
  grids = {TEXT: scale.rates, RECALL: scale.recall_rates}
  plans = [
    staged(
      [_trial(row, group, scale, data) for row in scale.rows],
      rates=rates,
      seeds=scale.seeds,
    )
    for group, rates in grids.items()
  ]
  return lambda results: [trial for part in plans for trial in part(results)]


def prepare(data: str, scale: Scale) -> None:
  """Makes the texts of a scale from the folder `data`."""
  reasoning.check(data)
  subwords.prepare(pathlib.Path(data), scale.data)


# ---------------------------------------------------------------- measures


def word_perplexity(loss: float, size: Size) -> float:
  """exp of the nats per word: does not depend on the tokenizer."""
  return perplexity(loss * size.tokens / size.words)


def bits_per_byte(loss: float, size: Size) -> float:
  """Bits per byte of the text: does not depend on the tokenizer."""
  return loss * size.tokens / (math.log(2) * size.bytes)


def _text_cells(
  name: str, losses: Sequence[float], size: Size, *, has_words: bool
) -> tables.Line:
  """The columns of a test split."""
  cells = {
    f"{name} ppl": tables.mean_std(map(perplexity, losses), 2),
    f"{name} word ppl": tables.mean_std(
      (word_perplexity(x, size) for x in losses), 1
    ),
    f"{name} bits/byte": tables.mean_std(
      bits_per_byte(x, size) for x in losses
    ),
  }
  if not has_words:
    del cells[f"{name} word ppl"]
  return cells


def _line(
  records: Mapping[str, Sequence[Record]],
  label: str | None,
  sizes: Mapping[str, Size],
) -> dict[str, str]:
  """A row's measures by group's records, of the evaluation `label`."""
  losses = {
    key: [tables.scores(r, which)["loss"] for r in tables.final(records[TEXT])]
    for key, which in (("wikitext2", label), (NOVELS, NOVELS))
  }
  line = dict(
    _text_cells(
      "WikiText", losses["wikitext2"], sizes["wikitext2"], has_words=True
    )
  )
  if label is None:
    line |= _text_cells(NOVELS, losses[NOVELS], sizes[NOVELS], has_words=False)
  recall = [
    100 * tables.scores(r, label)["accuracy"]
    for r in tables.final(records[RECALL])
    if label is None or label in r.evaluations
  ]
  if recall or label is None:
    line["MQAR %"] = tables.mean_std(recall, 1)
  return line


def lines(
  records: Sequence[Record], sizes: Mapping[str, Size]
) -> list[tables.Line]:
  """A line per row, and one below it for each of its switch-offs."""
  groups = {group: tables.by_row(records, group) for group in (TEXT, RECALL)}
  found: list[tables.Line] = []
  for row in groups[TEXT]:
    of_row = {group: rows.get(row, []) for group, rows in groups.items()}
    line = {"model": row, **_line(of_row, None, sizes)}
    done = tables.final(of_row[TEXT])
    line |= tables.description(done)
    line["seeds"] = str(len(done))
    line["trials"] = " + ".join(str(len(of_row[g])) for g in (TEXT, RECALL))
    found.append(line)
    labels = list(done[0].evaluations) if done else []
    for label in labels:
      if label not in (NOVELS, reasoning.LABEL):
        name = f"{row}, {switch_off.describe(label)}"
        found.append({"model": name, **_line(of_row, label, sizes)})
  return found


# ------------------------------------------------------------------- ranks


def perplexities(
  records: Sequence[Record],
) -> dict[int, dict[str, float]]:
  """Seed -> row of the paper -> WikiText perplexity."""
  found: dict[int, dict[str, float]] = {}
  for record in tables.final(records):
    trial = record.trial
    if trial.group == TEXT and trial.row in paper.ROWS:
      loss = tables.scores(record)["loss"]
      found.setdefault(trial.seed, {})[trial.row] = perplexity(loss)
  return found


def is_complete(records: Sequence[Record], scale: Scale) -> bool:
  """Whether every row has all its seeds, of text and of recall, and no rate of
  its grid is left (one that failed is named in the caption)."""
  done = {
    (r.trial.group, r.trial.row, r.trial.seed) for r in tables.final(records)
  }
  return all(r.status != LEFT for r in records) and all(
    (group, row, seed) in done
    for group in (TEXT, RECALL)
    for row in scale.rows
    for seed in scale.seeds
  )


def paper_lines(
  records: Sequence[Record], *, with_ranks: bool
) -> list[tables.Line]:
  """The paper's numbers and ranks beside our WikiText perplexity and mean
  accuracy; `with_ranks` also our own rank by perplexity, the median over seeds
  and their range."""
  by_seed = perplexities(records)
  planned = list(dict.fromkeys(r.trial.row for r in records))
  rows = [row for row in paper.ROWS if row in planned]
  accuracies = reasoning.by_row(records, TEXT)
  found = []
  for row in rows:
    ours = [seen[row] for seen in by_seed.values() if row in seen]
    means = [seed[reasoning.MEAN].score for seed in accuracies.get(row, ())]
    found.append(
      {
        "model": row,
        "WikiText ppl": tables.mean_std(ours, 2),
        "accuracy %": tables.mean_std(means, 1),
      }
    )
  for size in paper.TABLE:
    theirs = paper.ranked(size, rows)
    for line in found:
      row = line["model"]
      line[f"paper {size}"] = ""
      if row not in theirs:
        continue
      numbers = paper.TABLE[size][row]
      first, second = theirs[row]
      line[f"paper {size}"] = (
        f"{numbers.perplexity:.2f} / {numbers.accuracy:.2f}"
        f" ({first:g}, {second:g})"
      )
      if with_ranks:
        line[f"our rank, {size} rows"] = _our_rank(row, list(theirs), by_seed)
  return found


def _our_rank(
  row: str, rows: Sequence[str], by_seed: Mapping[int, Mapping[str, float]]
) -> str:
  """`3 (2 to 4)`: a row's rank among `rows`, median and range over seeds."""
  places = [
    paper.ranks([seen[r] for r in rows])[rows.index(row)]
    for seen in by_seed.values()
  ]
  middle = statistics.median(places)
  return f"{middle:g} ({min(places):g} to {max(places):g})"


def correlations(
  records: Sequence[Record],
) -> dict[str, dict[int, float]]:
  """Size -> seed -> Spearman's correlation of our ranks with the paper's, for
  sizes at which it has enough rows."""
  by_seed = perplexities(records)
  return {
    size: {seed: paper.spearman(seen, size) for seed, seen in by_seed.items()}
    for size, rows in paper.TABLE.items()
    if len(rows) >= MIN_ROWS
  }


def _correlation_text(found: Mapping[str, Mapping[int, float]]) -> str:
  text = (
    "Spearman's correlation of ranks by WikiText perplexity with the paper's"
  )
  text += " (mean over seeds; lowest and highest seed):\n\n"
  for size, by_seed in found.items():
    values = list(by_seed.values())
    text += (
      f"* {size}, {len(paper.TABLE[size])} rows: {statistics.fmean(values):.2f}"
      f" ({min(values):.2f} to {max(values):.2f})\n"
    )
  return text


# ------------------------------------------------------------------ report


def report(
  records: Sequence[Record],
  folder: pathlib.Path,
  name: str,
  sizes: Mapping[str, Size] | None = None,
) -> None:
  """Writes and prints the tables of scale `name`; curves and recall as PNG."""
  scale = SCALES[name]
  sizes = sizes or subwords.sizes(scale.data)
  is_claimed = scale.is_claimed and is_complete(records, scale)
  note = UNFINISHED_NOTE if scale.is_claimed else PIPELINE_NOTE
  found = correlations(records) if is_claimed else {}
  beside = paper_lines(records, with_ranks=is_claimed)
  tasks = tables.markdown(reasoning.lines(reasoning.by_row(records, TEXT)))
  text = (
    f"{tables.markdown(lines(records, sizes))}\n{tasks}\n{TASKS_NOTE}\n"
    f"{tables.markdown(beside)}\n"
    f"{_correlation_text(found) if is_claimed else note}\n{PAPER_NOTE}\n"
    f"{tables.caption(records)}"
  )
  rows = tables.final_by_row(records, TEXT)
  plots.loss_curves(folder / "loss.png", rows, f"text, scale {name}")
  recall = {
    row: {RECALL: values}
    for row, values in tables.accuracies(records, RECALL).items()
  }
  plots.bars(
    folder / "recall.png", recall, title="Recall", ylabel="test accuracy (%)"
  )
  tables.publish(
    folder,
    "language_modeling",
    records,
    text,
    test_splits={key: vars(size) for key, size in sizes.items()},
    correlations=found,
  )
