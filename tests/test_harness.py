"""Runs under lm-eval: scores against full passes, and the real harness."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from hope_jax import generation, harness, scoring, session
from hope_jax.config import Config, ConfigError, DataConfig
from hope_jax.data import tokenizer as tokenizer_lib
from hope_jax.data.tokenizer import Bytes
from hope_jax.model_config import CMSConfig
from hope_jax.models import language_model
from hope_jax.training import checkpoints, sharding, step, workdir
from tests.models.test_models import make
from tests.pallas_kernels.testing import fast_jit
from tests.tiers import slow_case

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from hope_jax.harness_model import HopeLM

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TASKS = str(REPOSITORY / "experiments" / "language_modeling" / "tasks")
CONTEXT = 120  # of attention
LENGTH = 160  # of the full passes
TOLERANCE = 3e-4  # of a sum of up to 120 log-probabilities
NAMES = {
  "transformer": {"context_length": CONTEXT},
  "titans": {},
  "hope": {
    "cms": CMSConfig(
      hidden=(8, 8, 16), chunk_lengths=(8, 16, 0), signal="next_token"
    )
  },
  "gated_deltanet": {},
}
SHOTS = "Q: What is the colour of the sea?\nA: blue\n\n" * 2
PAIRS = [
  (SHOTS + "Q: And of the sky?\nA:", " blue"),
  (SHOTS + "Q: And of the sky?\nA:", " a dull grey, as in all pictures"),
  (SHOTS + "Q: And of grass?\nA:", " green"),
  ("Q: Who?\nA:", " é"),
  ("Q: Who?\nA: ", "nobody at all"),
  ("", "So it begins"),
  ("x", "y"),
  (SHOTS[:60], SHOTS[60:75]),  # needs a larger cache than its context
]


@pytest.fixture(autouse=True)
def one_length(monkeypatch):
  """Of padded blocks: fewer programs to compile."""
  monkeypatch.setattr(scoring, "LEAST", scoring.BLOCK)


def make_run(folder, model):
  """A run with a checkpoint of random parameters, opened."""
  config = Config(model=model, data=DataConfig(sequence_length=32))
  workdir.claim(folder, config, {}, write=True)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  state = step.build(config, mesh).abstract_state
  rng = np.random.default_rng(0)
  normal = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
  params = jax.tree.map(normal, state.params)
  manager = checkpoints.open_manager(folder, config.train)
  checkpoints.save(manager, 0, zero.replace(params=params))
  manager.close()
  return session.open_run(folder)


@pytest.fixture(
  scope="module",
  params=["transformer", "titans", slow_case("hope"), "gated_deltanet"],
)
def run(request, tmp_path_factory):
  """A run of each kind of model."""
  fields = NAMES[request.param]
  model = make(request.param, vocab_size=256, num_layers=1, **fields)
  return make_run(epath.Path(tmp_path_factory.mktemp("run")), model)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
  model = make("transformer", vocab_size=256, num_layers=1, context_length=512)
  return make_run(epath.Path(tmp_path_factory.mktemp("run")), model)


@pytest.fixture(scope="module")
def full(run):
  """Log-probabilities [T, V] of one pass over LENGTH places at the most."""
  config = run.config.model
  network = language_model.LanguageModel(config)
  apply = fast_jit(
    lambda tokens: jax.nn.log_softmax(
      language_model.forward(network, run.params, tokens).logits[0]
    )
  )

  def log_probs(tokens):
    assert len(tokens) <= LENGTH
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(apply(padded))

  return log_probs


def expected(full, context, continuation):
  """(log-probability, is greedy) of a continuation, by a full pass."""
  tokens = [*context, *continuation]
  log_probs = full(tokens[:-1])[len(context) - 1 : len(tokens) - 1]
  chosen = log_probs[np.arange(len(continuation)), list(continuation)]
  return chosen.sum(), bool((log_probs.argmax(axis=1) == continuation).all())


def instances(kind, arguments):
  return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


def ask(run, kind, arguments, batch_size=8):
  model = HopeLM(run, batch_size=batch_size)
  with sharding.activate(run.mesh):
    return getattr(model, kind)(instances(kind, arguments))


def bounded(run, context, continuation):
  """Bytes of a request, as attention can read them."""
  context, continuation = context.encode() or b"\n", continuation.encode()
  spaces = len(context) - len(context.rstrip(b" "))
  if spaces:
    context, moved = context[:-spaces], context[-spaces:]
    continuation = moved + continuation
  if run.config.model.has_attention:
    context = context[-(CONTEXT + 1 - len(continuation)) :]
  return list(context), list(continuation)


def test_scores_equal_a_full_pass(run, full, monkeypatch):
  monkeypatch.setattr(scoring, "LEAST_CACHE", scoring.BLOCK)
  found = ask(run, "loglikelihood", PAIRS)
  for pair, (log_prob, is_greedy) in zip(PAIRS, found, strict=True):
    context, continuation = bounded(run, *pair)
    wanted, greedy = expected(full, context, continuation)
    assert (
      log_prob == pytest.approx(wanted, abs=TOLERANCE) and is_greedy == greedy
    )


def test_only_attention_forgets_the_beginning(run):
  model = HopeLM(run)
  context, continuation = list(range(200)), [7] * 5
  kept = context
  if run.config.model.has_attention:
    kept = context[-(CONTEXT + 1 - 5) :]
    with pytest.raises(ConfigError, match="121 tokens is too long.*=120"):
      model._bounded(context, [7] * (CONTEXT + 1))
  assert model._bounded(context, continuation) == (kept, continuation)


def test_attention_in_a_window_reads_any_length(transformer):
  lengths = []
  for window in (0, 16):
    config = transformer.config
    model = dataclasses.replace(config.model, attention_window=window)
    config = dataclasses.replace(config, model=model)
    run = transformer._replace(config=config)
    lengths.append(HopeLM(run).max_length)
    assert (scoring.with_cache(model, 1000) == model) == bool(window)
  assert lengths == [512, None]


def test_texts_begin_with_the_token_of_their_tokenizer(transformer):
  class WithBegin(Bytes):
    bos = 7

  model = HopeLM(transformer._replace(tokenizer=WithBegin()))
  assert model.prefix_token_id == 7 and model.tok_encode("\a") == [7]
  pair = model._encode_pair("a ", "b")
  assert pair == ([7, *b"a"], [*b" b"])
  asked = []
  model._score = lambda windows, _: (
    asked.extend(windows) or [scoring.Score(0.0, True)]
  )
  model.loglikelihood_rolling(instances("loglikelihood_rolling", [("ab",)]))
  assert asked == [scoring.Request([7], [*b"ab"])]


def test_rolling_scores_every_token_once(run, full):
  text = SHOTS + "and so on"
  found, empty = ask(run, "loglikelihood_rolling", [(text,), ("",)])
  assert empty == 0
  wanted, _ = expected(full, b"\n", text.encode())
  assert found == pytest.approx(wanted, abs=TOLERANCE)
  if run.config.model.has_attention:
    long = (text * 2).encode()
    (found,) = ask(run, "loglikelihood_rolling", [(text * 2,)])
    first, _ = expected(full, b"\n", long[:CONTEXT])
    begin = len(long) - CONTEXT - 1  # as much context as there can be
    rest, _ = expected(full, long[begin:CONTEXT], long[CONTEXT:])
    assert found == pytest.approx(first + rest, abs=TOLERANCE)


def test_what_is_shared_is_read_once(transformer, monkeypatch):
  count, original = [0], scoring.read_piece

  def counted(params, states, tokens, is_read, **options):
    count[0] += int(is_read.sum()) * tokens.shape[1]
    return original(params, states, tokens, is_read, **options)

  monkeypatch.setattr(scoring, "read_piece", counted)
  header = "".join(map(chr, range(32, 107)))  # 75 bytes: a block and a part
  pairs = [(header + end, choice) for end in "abc" for choice in ("x", "yz")]
  shared = ask(transformer, "loglikelihood", pairs)
  assert count == [64]
  apart = [ask(transformer, "loglikelihood", [pair])[0] for pair in pairs]
  np.testing.assert_allclose(shared, apart, atol=TOLERANCE)


def test_batches_do_not_matter_and_few_programs_are_compiled(transformer):
  together = ask(transformer, "loglikelihood", PAIRS)
  alone = ask(transformer, "loglikelihood", PAIRS, batch_size=1)
  np.testing.assert_allclose(together, alone, atol=TOLERANCE)
  programs = lambda: (
    scoring.read_piece._cache_size() + scoring.read_last._cache_size()
  )
  before = programs()
  others = [(c[1:] + "and more", " of " + t) for c, t in PAIRS[:4]]
  ask(transformer, "loglikelihood", others * 3)
  assert programs() == before


def test_greedy_text_is_greedy_and_ends_before_until(transformer):
  contexts, options = (
    ["Q: And of the sky?", "Q: Who?", ""],
    {"max_gen_toks": 12},
  )
  texts = ask(transformer, "generate_until", [(c, options) for c in contexts])
  with sharding.activate(transformer.mesh):
    wanted = generation.generate(
      transformer.params,
      [Bytes().encode(context or "\n") for context in contexts],
      config=transformer.config.model,
      count=12,
      sampling=generation.Sampling(temperature=0.0),
      vocab_size=256,
    )
  assert texts == [Bytes().decode(tokens) for tokens in wanted]
  until = {"until": [texts[0][4:6], "never there"], **options}
  (stopped,) = ask(transformer, "generate_until", [(contexts[0], until)])
  assert stopped == texts[0][: texts[0].index(texts[0][4:6])]


def test_draws_depend_on_the_request_alone(transformer):
  options = {"max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
  asked = [("Some text", options)] * 3 + [("and more", options)]
  texts = ask(transformer, "generate_until", asked)
  assert texts == ask(transformer, "generate_until", asked, batch_size=1)
  assert len(set(texts)) == 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_gen_toks": 512}, "max_gen_toks=512 leaves no room"),
    ({"max_gen_toks": 0}, "max_gen_toks=0 must be positive"),
    ({"temperature": -1.0, "do_sample": True}, "temperature=-1.0"),
  ],
)
def test_tasks_that_cannot_be_drawn(transformer, options, message):
  with pytest.raises(ConfigError, match=message):
    ask(transformer, "generate_until", [("x", options)])


def test_tokens_that_cross_the_border_are_the_continuation(transformer):
  text = ["in the house of the king the king is in the house\n"] * 40
  model = tokenizer_lib.train(text, 274)
  tokenizer = tokenizer_lib.SentencePiece(model, "small")
  model = HopeLM(transformer._replace(tokenizer=tokenizer))
  whole = tokenizer.encode("in the house of the king").tolist()
  for context, rest in (("in the house of", " the king"), ("in the ", "house")):
    begin, end = model._encode_pair(context, rest)
    text = tokenizer.encode(context.rstrip() + " " + rest.lstrip()).tolist()
    assert begin + end == text == whole[: len(text)] and begin and end
  assert tokenizer.decode(np.asarray([model.prefix_token_id])) == "\n"


QUESTION = "Question: Why?\nAnswer:"
DATA = {
  "commonsense/piqa_val.jsonl": {
    "goal": "Open a jar",
    "sol1": "turn it",
    "sol2": "burn it",
    "label": 0,
  },
  "commonsense/winogrande_val.jsonl": {
    "sentence": "Tim met Tom and _ left.",
    "option1": "Tim",
    "option2": "Tom",
    "answer": "2",
  },
  "commonsense/siqa_val.jsonl": {
    "context": "Al fell.",
    "question": "Why?",
    "answerA": "a",
    "answerB": "b",
    "answerC": "c",
    "gold": 2,
    "choices": ["a", "b", "c"],
  },
  "lambada/lambada_openai_ctx_cont.jsonl": {
    "context": "The end of the",
    "continuation": "story",
  },
  "squad/squad_v1_val_1000.jsonl": {
    "query": "Title: T\nBackground: B b.\nQuestion: Q?\nAnswer:",
    "answers_text": ["The b", "b"],
  },
}
CHOICES = {"query": QUESTION, "choices": list("abcd"), "gold": 1}
DATA |= {
  f"commonsense/{name}.jsonl": CHOICES
  for name in ("arc_easy_test", "arc_challenge_test", "openbookqa_test")
}
DATA["commonsense/hellaswag_val_1000.jsonl"] = CHOICES
DATA["commonsense/boolq_val.jsonl"] = CHOICES | {"choices": ["yes", "no"]}
DATA["commonsense/csqa_val.jsonl"] = CHOICES | {"choices": list("vwxyz")}
BABI = "1 Al is in Rome.\n2 Bo left.\n3 Where is Al? \tRome\t1\n4 Al ran.\n"
BABI += "5 Where is Al? \tRome\t1\n1 Cy sat.\n2 Who sat? \tCy\t1\n"
WIKITEXT = "".join(
  f" \n = {title} = \n \n {title} is 1 @.@ 5 . \n \n = = Use = = \n \n Few . \n"
  for title in ("Tea", "Du Fu", "Go ( game )")
)
PROMPTS = {  # of the last document, up to the answer
  "piqa": "Question: Open a jar\nAnswer:",
  "winogrande": "Tim met Tom and Tim",
  "social_iqa": "Q: Al fell. Why?\nA:",
  "lambada_openai": "The end of the",
  "squad": "Title: T\n\nBackground: B b.\n\nQuestion: Q?\n\nAnswer:",
  "boolq": QUESTION,
  "hellaswag": QUESTION,
  "arc_easy": QUESTION,
  "arc_challenge": QUESTION,
  "openbookqa": "Why?",
  "commonsense_qa": "Question: Why?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:",
  "wikitext": " = Go (game) =\n\nGo (game) is 1.5.\n\n== Use ==\n\nFew.\n",
  "babi_qa1": "Passage: Cy sat.\nQuestion: Who sat?\nAnswer:",
}
CHANCE = {"piqa": 1 / 2, "social_iqa": 1 / 3, "boolq": 1 / 2, "arc_easy": 1 / 4}
CHANCE |= {"commonsense_qa": 1 / 5, "winogrande": 1 / 2, "lambada_openai": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """The folder of `--data`: three lines of everything."""
  folder = tmp_path_factory.mktemp("data")
  for name, row in DATA.items():
    path = folder / "qa" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(3 * (json.dumps(row) + "\n"))
  (folder / "wikitext2").mkdir()
  (folder / "wikitext2" / "test.txt").write_text(WIKITEXT)
  (folder / "qa" / "babi" / "en").mkdir(parents=True)
  for split in ("train", "test"):
    name = f"qa1_single-supporting-fact_{split}.txt"
    (folder / "qa" / "babi" / "en" / name).write_text(BABI)
  return str(folder)


def test_local_tasks_through_the_harness(transformer, data):
  tasks = harness.load_tasks(list(PROMPTS), TASKS, data)
  lines = harness.evaluate(transformer, tasks)
  assert {line.task for line in lines} == set(PROMPTS)
  for task in tasks:
    asked = task.instances
    prompts = [request.args[0] for request in asked if request.doc_id == 2]
    assert prompts[0] == PROMPTS[task.task_name]
  by_name = {(line.task, line.metric): line for line in lines}
  for name, chance in CHANCE.items():
    assert by_name[name, "acc"].chance == pytest.approx(chance)
  assert ("piqa", "acc_norm") in by_name and ("squad", "f1") in by_name
  perplexity = by_name["lambada_openai", "perplexity"]
  assert perplexity.chance is None and perplexity.documents == 3
  (log_prob, _) = ask(
    transformer, "loglikelihood", [("The end of the", " story")]
  )[0]
  assert perplexity.score == pytest.approx(np.exp(-log_prob), rel=1e-3)
  pages = [r.args[0] for t in tasks for r in t.instances if "Few" in r.args[0]]
  log_probs = ask(transformer, "loglikelihood_rolling", [(x,) for x in pages])
  words = by_name["wikitext", "word_perplexity"]
  count = len(WIKITEXT.split()) + 2 * 3  # the harness counts the borders, too
  assert words.score == pytest.approx(np.exp(-sum(log_probs) / count), rel=1e-4)
  assert words.documents == 3 and words.chance is None
  scores = ask(
    transformer,
    "loglikelihood",
    [(PROMPTS["piqa"], " turn it"), (PROMPTS["piqa"], " burn it")],
  )
  assert by_name["piqa", "acc"].score == float(scores[0] > scores[1])
  table = harness.table(lines).splitlines()
  assert len(table) >= len(lines) + 2 and table[0].startswith("|")


@pytest.mark.parametrize(
  ("name", "path", "old"),
  [
    ("arc_easy", "commonsense/arc_easy_test.jsonl", "Why?"),
    ("lambada_openai", "lambada/lambada_openai_ctx_cont.jsonl", "The end"),
    ("squad", "squad/squad_v1_val_1000.jsonl", "Q?"),
  ],
)
def test_examples_are_other_questions(
  transformer, tmp_path, monkeypatch, name, path, old
):
  for method, answer in (
    ("loglikelihood", (0.0, True)),
    ("generate_until", ""),
  ):
    monkeypatch.setattr(
      HopeLM, method, lambda _, asked, answer=answer: [answer] * len(asked)
    )
  file = tmp_path / "qa" / path
  file.parent.mkdir(parents=True)
  row, numbers = json.dumps(DATA[path]), range(4)
  file.write_text("\n".join(row.replace(old, f"No{n}?") for n in numbers))
  tasks = harness.load_tasks([name], TASKS, str(tmp_path))
  harness.evaluate(transformer, tasks, num_fewshot=3)
  for request in tasks[0].instances:
    assert [request.args[0].count(f"No{n}?") for n in numbers] == [1] * 4


def test_examples_and_limit(transformer, data):
  tasks = harness.load_tasks(["babi_qa1"], TASKS, data)
  (line,) = harness.evaluate(transformer, tasks, limit=1, num_fewshot=2)
  assert (line.documents, line.shots, line.stderr) == (1, 2, None)
  prompt = tasks[0].instances[0].args[0]
  assert prompt.count("Passage: ") == 3 and prompt.count("\n\n") == 2
  assert prompt.endswith(
    "Passage: Al is in Rome.\nBo left.\nQuestion: Where is Al?\nAnswer:"
  )


@pytest.mark.parametrize(
  ("answer", "exact", "f1"),
  [
    (" b.", 1, 1),
    ("the B", 1, 1),
    (" b or c", 0, 0.5),
    (" c", 0, 0),
    ("", 0, 0),
  ],
)
def test_squad_scores(answer, exact, f1):
  from experiments.language_modeling.tasks import utils

  row = DATA["squad/squad_v1_val_1000.jsonl"]
  assert utils.squad_scores(row, [answer]) == {"exact_match": exact, "f1": f1}


FLAGS = dict(tasks=["piqa"], limit=None, num_fewshot=None, batch_size=8)
FLAGS |= {"include_path": None}


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"limit": 0}, "--limit=0 must be 1 or more"),
    ({"num_fewshot": -1}, "--num_fewshot=-1"),
    ({"batch_size": 0}, "--batch_size=0"),
    ({"tasks": []}, "--tasks is empty"),
    ({"tasks": ["piqa", ""]}, "--tasks is empty"),
    ({"include_path": "no/where"}, "--include_path=no/where is no folder"),
  ],
)
def test_wrong_flags(flags, message):
  with pytest.raises(ConfigError, match=message):
    harness.check(types.SimpleNamespace(**FLAGS | flags))


def test_wrong_tasks_and_data(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match="^cannot read .*--data must name the"):
    harness.load_tasks(["piqa"], TASKS, str(tmp_path))
  bad = tmp_path / "qa" / "commonsense" / "piqa_val.jsonl"
  bad.parent.mkdir(parents=True)
  bad.write_text("{")
  with pytest.raises(ConfigError, match="piqa_val.jsonl of --data is no JSON"):
    harness.load_tasks(["piqa"], TASKS, str(tmp_path))
  pages = tmp_path / "wikitext2" / "test.txt"
  pages.parent.mkdir()
  pages.write_text(" = = Uses = = \n")
  with pytest.raises(ConfigError, match="wikitext2/test.txt .* has no article"):
    harness.load_tasks(["wikitext"], TASKS, str(tmp_path))
  import lm_eval.tasks

  only_ours = functools.partial(
    lm_eval.tasks.TaskManager, include_path=TASKS, include_defaults=False
  )
  monkeypatch.setattr(  # to look through all tasks takes seconds
    lm_eval.tasks, "TaskManager", lambda **_: only_ours()
  )
  with pytest.raises(ConfigError, match="no task 'pikqa'; did you mean 'piqa'"):
    harness.load_tasks(["pikqa"], TASKS, str(tmp_path))


WITHOUT = """import runpy, sys
sys.modules["lm_eval"] = None
sys.argv = ["harness", "--workdir=x", "--tasks=piqa"]
runpy.run_module("hope_jax.harness", run_name="__main__")
"""


def test_without_the_extra():
  child = subprocess.run(
    [sys.executable, "-c", WITHOUT],
    env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert child.returncode == 1 and "install hope-jax[eval]" in child.stderr
  assert len(child.stderr.splitlines()) == 1
