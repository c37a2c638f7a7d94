"""Plans and sweeps, without running anything."""

import dataclasses

import pytest

from experiments.language_modeling import run as language_modeling
from experiments.lib import switch_off, trials
from experiments.mqar import run as mqar
from hope_jax import config as config_lib

ROW = trials.Trial(
  group="text",
  row="hope",
  name="text/hope",
  config="configs/shakespeare.py",
  mode="hope",
)
RATES = (0.001, 0.002, 0.004)


def _result(valid_loss: float) -> dict:
  return {"valid_loss": valid_loss}


def _grid(*losses: float | None) -> dict:
  """Results of ROW's grid; None is a failed trial."""
  names = [f"text/hope/lr_{rate:g}-seed_0" for rate in RATES]
  results = [None if loss is None else _result(loss) for loss in losses]
  return dict(zip(names, results, strict=False))


@pytest.mark.parametrize(
  ("losses", "rate"),
  [
    ((2.0, 1.8, 1.9), 0.002),
    ((2.0, None, 1.9), 0.004),
    ((float("nan"), 1.8, float("inf")), 0.002),
    ((None, None, None), None),
    ((2.0, 1.8), None),  # the third is not finished
  ],
)
def test_best_is_the_lowest_finite_validation_loss(losses, rate):
  results = _grid(*losses)
  grid, chosen = trials.sweep(ROW, results, rates=RATES, seeds=(0, 1))
  assert [t.overrides["opt.peak_lr"] for t in grid] == list(RATES)
  expected = [] if rate is None else [(rate, 0), (rate, 1)]
  assert [(t.overrides["opt.peak_lr"], t.seed) for t in chosen] == expected


def test_staged_chosen_trial_replaces_its_twin_of_the_grid():
  plan = trials.staged([ROW], rates=RATES, seeds=(0, 1, 2))
  assert len(plan({})) == 3
  planned = plan(_grid(2.0, 1.8, 1.9))
  names = [t.name for t in planned]
  assert len(names) == len(set(names)) == 5
  assert sum(t.is_final for t in planned) == 3


def test_only_chosen_trials_are_evaluated():
  off = trials.Evaluation("off", ("--writes=off",))
  row = dataclasses.replace(ROW, evaluations=(off,))
  results = _grid(2.0, 1.8, 1.9)
  grid, chosen = trials.sweep(row, results, rates=RATES, seeds=(0, 1))
  assert [t.evaluations for t in grid] == [()] * 3
  assert [t.evaluations for t in chosen] == [(off,)] * 2


def test_staged_plans_one_group_after_the_other_as_given():
  rows = [
    dataclasses.replace(ROW, group=group, row=row, name=f"{group}/{row}")
    for row in ("hope", "titans")
    for group in ("text", "recall")
  ]
  planned = trials.staged(rows, rates=(0.1,), seeds=(0, 1))({})
  assert [(t.group, t.row) for t in planned] == [
    ("text", "hope"),
    ("text", "titans"),
    ("recall", "hope"),
    ("recall", "titans"),
  ]


def test_slug_is_a_name_without_spaces_and_pluses():
  assert trials.slug("Transformer++ conv") == "transformerpp_conv"


def test_seed_is_the_trials_whatever_its_overrides_say():
  trial = dataclasses.replace(ROW, overrides={"train.seed": 9}, seed=3)
  assert trial.fields() == {"train.seed": 3, "data.seed": 3}


def test_resolve_applies_overrides_and_seed():
  trial = dataclasses.replace(
    ROW, overrides={"model.inner_rates": "off", "opt.peak_lr": 0.25}, seed=3
  )
  config = trials.resolve(trial)
  assert config.model.inner_rates == "off"
  assert (config.opt.peak_lr, config.train.seed, config.data.seed) == (
    0.25,
    3,
    3,
  )


def test_resolve_missing_config_file_raises():
  with pytest.raises(config_lib.ConfigError, match="nowhere"):
    trials.resolve(dataclasses.replace(ROW, config="configs/nowhere.py"))


def test_is_same_ignores_what_moves_no_result():
  config = trials.resolve(ROW)
  recorded = config_lib.to_dict(config)
  assert trials.is_same({**recorded, "mesh": {"fsdp": 4}}, config)
  seldom = {**recorded["train"], "eval_every": 7, "dynamics_every": 7}
  assert trials.is_same({**recorded, "train": seldom}, config)
  longer = {**recorded["train"], "steps": 7}
  assert not trials.is_same({**recorded, "train": longer}, config)
  changed = {**recorded["opt"], "peak_lr": 0.25}
  assert not trials.is_same({**recorded, "opt": changed}, config)
  assert not trials.is_same({**recorded, "of_old": {}}, config)


@pytest.mark.parametrize(
  ("plan", "rows"),
  [
    (language_modeling.demo_plan(), 6),
    (language_modeling.demo_plan(",smoke"), 6),
    (language_modeling.cpu_plan("data"), 12 * 3),
    (mqar.PLANS["cpu"](), 3 * 6 * 3),
    (mqar.PLANS["smoke"](), 3 * 6 * 2),
  ],
)
def test_experiment_plans_resolve_with_unique_names(plan, rows):
  planned = plan({})
  assert len({trial.name for trial in planned}) == len(planned) == rows
  for trial in planned:
    trials.resolve(trial)


def test_experiments_give_every_row_the_same_grid_and_tokens():
  for plan in (language_modeling.cpu_plan("data"), mqar.PLANS["cpu"]()):
    settings: dict[str, dict[str, set]] = {}
    for trial in plan({}):
      config = trials.resolve(trial)
      tokens = config.train.steps * (
        config.data.batch_size * config.data.sequence_length
      )
      rate = config.opt.peak_lr if trial.group not in mqar.GROUPS else 0.0
      row = settings.setdefault(trial.group, {}).setdefault(trial.row, set())
      row.add((rate, tokens, config.opt.warmup_steps))
    for rows in settings.values():
      assert len(rows) == 6
      assert len(set(map(frozenset, rows.values()))) == 1


def test_mqar_has_three_seeds_of_every_row_at_all_sizes():
  planned = mqar.PLANS["cpu"]()({})
  for group, pairs in zip(mqar.GROUPS, (32, 64, 8), strict=True):
    final = [t for t in planned if t.group == group and t.is_final]
    seeds = sorted((t.row, t.seed) for t in final)
    assert seeds == sorted(
      (row, n) for row in switch_off.CORE_ROWS for n in range(3)
    )
    assert {trials.resolve(t).data.mqar.num_pairs for t in final} == {pairs}


def test_mqar_gives_a_memory_and_its_twin_one_rate():
  rates: dict[bool, set] = {}
  for trial in mqar.PLANS["cpu"]()({}):
    is_attention = trial.row.startswith("Transformer")
    rate = trials.resolve(trial).opt.peak_lr
    rates.setdefault(is_attention, set()).add(rate)
  assert rates == {True: {2e-3}, False: {4e-3}}


def test_twins_differ_from_the_live_rows_by_inner_rates_only():
  planned = language_modeling.cpu_plan("data")({})
  by_row = {(t.group, t.row, t.overrides["opt.peak_lr"]): t for t in planned}
  for (group, row, rate), trial in by_row.items():
    if row.endswith("twin"):
      live = by_row[group, row.removesuffix(" twin"), rate]
      off = {"model.inner_rates": "off"}
      assert trial.overrides == {**live.overrides, **off}
      assert trial.mode == live.mode


def test_controls_are_evaluated_on_the_test_split():
  for row in switch_off.ROWS:
    length, offs = switch_off.long_evaluation(row), switch_off.switch_offs(row)
    assert all("--split=test" in e.flags for e in (length, *offs))
    assert all("--writes=off" in e.flags for e in offs)
    assert "--length=4096" in length.flags
    assert ("--dynamics" in length.flags) == bool(offs)


def test_experiments_overrides_are_above_the_rows_own():
  trial = switch_off.trial(
    "Hope twin",
    group="g",
    name="n",
    config="configs/shakespeare.py",
    suffix=",smoke",
    overrides={"model.inner_rates": "on", "train.steps": 3},
  )
  assert trial.overrides == {"model.inner_rates": "on", "train.steps": 3}
  assert (trial.mode, trial.evaluations) == ("hope,smoke", ())


@pytest.mark.parametrize(
  ("label", "words"),
  [
    ("off", "writes off: all"),
    ("off_cms_0", "writes off: cms_0"),
    ("length_4096", "T 4,096"),
  ],
)
def test_labels_are_described_in_words(label, words):
  assert switch_off.describe(label) == words
