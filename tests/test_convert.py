"""Checkpoints of transformers: the same functions, and what is refused.

transformers' own models are the oracle; gradients are mapped by the same rules.
"""

import copy
import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors

from configs import wikitext2
from hope_jax import config as config_lib
from hope_jax.config import ConfigError, DataConfig, MemoryConfig, ModelConfig
from hope_jax.convert import to_hf
from hope_jax.data import text as text_lib
from hope_jax.inference import evaluation, generation
from hope_jax.inference import texts as texts_lib
from hope_jax.interchange import formats, hugging_face, mapping
from hope_jax.models import language_model
from hope_jax.models.language_model import LanguageModel
from hope_jax.runs import workdir
from tests.support.jit import fast_jit
from tests.test_commands import command

B, T, V, L = 2, 24, 97, 2
SIZES = {"vocab_size": V, "hidden_size": 64, "num_hidden_layers": L}
LLAMA = SIZES | {"num_attention_heads": 4, "intermediate_size": 96}
ROPE = {
  "rope_type": "llama3",
  "rope_theta": 500.0,
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
MAMBA2 = SIZES | {
  "num_heads": 2,
  "n_groups": 1,
  "chunk_size": 16,
  "layer_norm_epsilon": 1e-3,
}
QWEN = LLAMA | {
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-3,
  "layer_types": ["linear_attention"] * L,
  "linear_num_key_heads": 3,
  "linear_num_value_heads": 3,
  "linear_key_head_dim": 16,
  "linear_value_head_dim": 32,
}
EXPERTS = {"num_experts": 2, "mlp_only_layers": [0, 1]}
# Case -> (model_type, its config.json).
CASES = {
  "llama": (
    "llama",
    LLAMA
    | {"num_key_value_heads": 2, "rope_parameters": ROPE, "rms_norm_eps": 1e-3},
  ),
  "llama_tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
  "mistral": (
    "mistral",
    LLAMA | {"sliding_window": 7, "num_key_value_heads": 1},
  ),
  "mamba": ("mamba", SIZES | {"layer_norm_epsilon": 1e-3}),
  "mamba2": ("mamba2", MAMBA2),
  "mamba2_tied": ("mamba2", MAMBA2 | {"tie_word_embeddings": True}),
  "qwen3_next": ("qwen3_next", QWEN | EXPERTS),
  "qwen3_5_text": ("qwen3_5_text", QWEN),
}
TOKENS = np.random.default_rng(0).integers(0, V, (B, T))


@functools.cache
def theirs(case):
  """A model of transformers in float64, all its parameters random.

  Its gated delta rule stays in float32: with larger noise the gradients of the
  decays have errors of 1e-4 there, and here in chunks of 64.
  """
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  kind, fields = CASES[case]
  config = transformers.AutoConfig.for_model(kind, **fields)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.05 * torch.randn_like(p))
  return model.double()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """Name, folder of the checkpoint; Llama's in several files."""
  folder = epath.Path(tmp_path_factory.mktemp(request.param))
  size = {"max_shard_size": "50KB"} if request.param == "llama" else {}
  model = copy.deepcopy(theirs(request.param))
  model.float().save_pretrained(folder, **size)
  return request.param, folder


def logits_of(model):
  import torch

  tokens = torch.tensor(TOKENS)
  return model(tokens, labels=tokens, use_cache=False)


def tree(flat):
  return traverse_util.unflatten_dict(flat, sep=".")


def test_logits_and_gradients_are_those_of_transformers(case):
  name, folder = case
  model, flat = formats.read_checkpoint(folder)
  parts = 7 if name == "llama" else 1
  assert len(list(folder.glob("*.safetensors"))) == parts
  model = dataclasses.replace(model, memory=MemoryConfig(chunk_length=8))
  out = logits_of(theirs(name))
  theirs(name).zero_grad()
  out.loss.backward()

  def loss(params):
    logits = LanguageModel(model).apply({"params": params}, TOKENS).logits
    picked = jnp.take_along_axis(
      nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1
    )
    return -jnp.mean(picked), logits

  grad = fast_jit(jax.value_and_grad(loss, has_aux=True))
  (_, logits), gradient = grad(tree(flat))
  np.testing.assert_allclose(logits, out.logits.detach(), atol=1e-4)
  ours = traverse_util.flatten_dict(gradient, sep=".")
  grads = {n: p.grad.double() for n, p in theirs(name).named_parameters()}
  rules = hugging_face.ARCHITECTURES[CASES[name][0]].rules(model)
  wanted, zero = (
    mapping.to_ours(rules, L, lambda n, by=by: by * grads[n].numpy())
    for by in (1, 0)
  )
  assert wanted.keys() == ours.keys()
  for path, x in wanted.items():
    x = x - zero[path]  # without the 1 of norms
    error = np.abs(ours[path] - x).max() / np.abs(x).max()
    assert error < 1e-4, (path, error)


@pytest.mark.parametrize(
  "case", ["llama", "mamba2", "qwen3_next"], indirect=True
)
def test_reading_in_pieces_gives_the_logits_of_transformers(case):
  name, folder = case
  model, flat = formats.read_checkpoint(folder)
  apply = fast_jit(lambda *a: LanguageModel(model).apply(*a))
  params, state = {"params": tree(flat)}, language_model.init_state(model, B)
  found = []
  for first, last in ((0, 17), (17, 18), (18, T)):
    out = apply(params, TOKENS[:, first:last], state)
    state = out.state
    found.append(out.logits)
  wanted = logits_of(theirs(name)).logits.detach()
  np.testing.assert_allclose(np.concatenate(found, 1), wanted, atol=1e-4)


def test_checkpoint_there_and_back_is_the_same(case):
  name, folder = case
  model, flat = formats.read_checkpoint(folder)
  rules = hugging_face.ARCHITECTURES[CASES[name][0]].rules(model)
  found = mapping.to_theirs(rules, L, flat)
  wanted = {n: p.detach().numpy() for n, p in theirs(name).named_parameters()}
  assert found.keys() == wanted.keys()
  centred = {rule.theirs for rule in rules if rule.form is mapping.CENTRED}
  centred = {n.format(number) for n in centred for number in range(L)}
  for n, x in wanted.items():  # 1 + weight rounds the weight
    np.testing.assert_allclose(
      found[n], x, rtol=0, atol=1e-7 if n in centred else 0, err_msg=n
    )


def test_our_parameters_are_what_transformers_loads(case, tmp_path):
  transformers = pytest.importorskip("transformers")
  model, flat = formats.read_checkpoint(case[1])
  rng = np.random.default_rng(1)
  flat = {
    name: (x + rng.normal(size=x.shape) / 20).astype(np.float32)
    for name, x in flat.items()
  }
  folder = epath.Path(tmp_path / "model")
  formats.write_checkpoint(folder, model, flat)
  loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(found.values()), found
  ours = fast_jit(LanguageModel(model).apply)({"params": tree(flat)}, TOKENS)
  wanted = logits_of(loaded.double()).logits.detach()
  np.testing.assert_allclose(ours.logits, wanted, atol=1e-4)
  again, back = formats.read_checkpoint(folder)
  assert again.sequence_layer == model.sequence_layer
  assert back.keys() == flat.keys()
  for name, x in flat.items():
    np.testing.assert_array_equal(back[name], x, err_msg=name)


@pytest.fixture
def llama(tmp_path):
  """A folder of one file, and its tensors, to spoil."""
  flat = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
  folder = epath.Path(tmp_path / "hf")
  folder.mkdir()
  write(folder, flat, LLAMA)
  return folder, flat


def write(folder, tensors, fields):
  safetensors.save_file(tensors, folder / "model.safetensors")
  config = {"model_type": "llama", **fields}
  (folder / "config.json").write_text(json.dumps(config))


SHAPES = {
  "model.embed_tokens.weight": (V, 64),
  "model.norm.weight": (64,),
  "lm_head.weight": (V, 64),
} | {
  f"model.layers.{i}.{name}.weight": shape
  for i in range(L)
  for name, shape in {
    "input_layernorm": (64,),
    "post_attention_layernorm": (64,),
    **{f"self_attn.{p}_proj": (64, 64) for p in "qkvo"},
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
  }.items()
}


def test_tensors_that_are_missing_or_too_many_are_named(llama):
  folder, flat = llama
  assert formats.read_checkpoint(folder)[0].width == 64
  norm = "model.layers.1.input_layernorm.weight"
  for tensors, message in (
    ({k: v for k, v in flat.items() if k != norm}, f"{norm} is nothing there"),
    (
      flat | {"model.bias": flat[norm]},
      r"model.bias is \(64,\) there and noth",
    ),
    (flat | {norm: np.zeros(3, np.float32)}, r"is \(3,\) there and \(64,\) by"),
    (flat | {norm: np.zeros(64, np.int8)}, f"{norm} is of type I8, not one"),
  ):
    write(folder, tensors, LLAMA)
    with pytest.raises(ConfigError, match=message):
      formats.read_checkpoint(folder)
  inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": flat[norm]}
  write(folder, flat | inverse, LLAMA | {"tie_word_embeddings": True})
  assert "lm_head.kernel" not in formats.read_checkpoint(folder)[1]


def test_numbers_that_are_not_finite_are_named_and_nothing_is_made(llama):
  folder, flat = llama
  flat["model.norm.weight"][3] = np.nan
  write(folder, flat, LLAMA)
  run = folder.parent / "run"
  with pytest.raises(ConfigError, match="hf: norm.* not finite: copy it again"):
    formats.from_hf(folder, run)
  assert not run.exists()


def test_files_that_cannot_be_read_are_named(llama):
  folder, _ = llama
  index = folder / "model.safetensors.index.json"
  for content, message in (
    ("{}", "has no weight_map"),
    ('{"weight_map": {"a": "part.safetensors"}}', "cannot read .*part.safe"),
  ):
    index.write_text(content)
    with pytest.raises(ConfigError, match=message):
      formats.read_checkpoint(folder)
  index.unlink()
  (folder / "model.safetensors").write_bytes(b"broken")
  with pytest.raises(ConfigError, match=r"cannot read .*model.safetensors \("):
    formats.read_checkpoint(folder)
  (folder / "model.safetensors").unlink()
  with pytest.raises(ConfigError, match="has neither model.safetensors nor"):
    formats.read_checkpoint(folder)
  with pytest.raises(ConfigError, match="is no checkpoint of transformers"):
    formats.read_checkpoint(folder / "none")


@pytest.mark.parametrize(
  ("case", "fields", "message"),
  [
    ("llama", {"model_type": "gpt2"}, "model_type='gpt2', but only 'llama' or"),
    ("llama", {"attention_bias": True}, "attention_bias=True, but only False"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', but only 'silu'"),
    ("llama", {"head_dim": 32}, "head_dim=32, but only 16"),
    ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}, "'yarn', but"),
    ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "has no 'factor'"),
    ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3 does not divide"),
    ("llama", {"quantization_config": {}}, "quantization_config"),
    (
      "llama",
      {"vocab_size": "97"},
      "model.vocab_size='97' must be of type int",
    ),
    ("mamba2", {"n_groups": 8}, "n_groups=8, but only 1"),
    ("mamba2", {"num_heads": 4}, "num_heads=4, but only 2"),
    ("mamba2", {"time_step_limit": [0.1, 1.0]}, "time_step_limit"),
    ("qwen3_next", {"layer_types": ["full_attention"]}, "'full_attention'"),
    ("qwen3_next", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_next", {"linear_num_value_heads": 6}, "value_heads=6, but only 3"),
  ],
)
def test_fields_that_no_model_has_are_named(case, fields, message):
  kind, values = CASES[case]
  with pytest.raises(ConfigError, match=message):
    hugging_face.read_config({"model_type": kind, **values, **fields})


def test_config_of_transformers_4_is_understood():
  fields = {"rope_theta": 500.0, "torch_dtype": "bfloat16"}
  scaling = {k: v for k, v in ROPE.items() if k != "rope_theta"}
  config = {"model_type": "llama", **LLAMA, **fields, "rope_scaling": scaling}
  _, model = hugging_face.read_config(config)
  assert model.rope_base == 500.0 and model.dtype == "bfloat16"
  assert model.rope_scaling.original_context_length == 32


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (ModelConfig("hope"), "no model like model.sequence_layer=hope"),
    (
      ModelConfig("transformer"),
      "model.conv_window=4 cannot be expressed in a",
    ),
    (ModelConfig("mamba2"), "model.ffn_hidden=448 cannot be expressed"),
  ],
)
def test_models_that_transformers_has_not_are_refused(model, message):
  with pytest.raises(ConfigError, match=message):
    hugging_face.write_config(model)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gated_deltanet"])
def test_models_of_the_configs_are_written(name):
  """However their training began."""
  config = config_lib.from_config_dict(wikitext2.get_config(name)).model
  assert config.initializer != "normal"
  _, values = hugging_face.write_config(config)
  _, again = hugging_face.read_config(values)
  assert again.sequence_layer == name and again.width == config.width


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """One in bfloat16 with a tokenizer.json."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from tests.data.test_tokenizer import train_hugging_face

  folder = epath.Path(tmp_path_factory.mktemp("hf"))
  fields = LLAMA | {"vocab_size": 320, "max_position_embeddings": 64}
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
  model.to(torch.bfloat16).save_pretrained(folder)
  train_hugging_face(folder)
  return folder


def test_run_of_a_checkpoint_is_evaluated_continued_and_written(
  checkpoint, tmp_path
):
  load = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained
  run = epath.Path(tmp_path / "run")
  path = tmp_path / "text.txt"
  path.write_text((text_lib.REPOSITORY / DataConfig().path).read_text()[:9000])
  config = formats.from_hf(checkpoint, run, text=str(path), context_length=40)
  assert workdir.read_config(run) == config
  assert config.model.dtype == "bfloat16" and config.data.sequence_length == 40
  scores = evaluation.evaluate(config, run, "test")
  assert 4 < scores["loss"] < 8 and "bits_per_byte" not in scores
  assert scores["targets"] < 450  # of that many bytes
  sampling = generation.Sampling()
  texts = texts_lib.generate(run, ["To be"], count=5, sampling=sampling)
  assert texts[0]
  assert to_hf(run, epath.Path(tmp_path / "back")) == 0
  for name in ("tokenizer.json", "model.safetensors"):
    assert (tmp_path / "back" / name).exists()
  first, last = (
    load(folder, dtype="float32").state_dict()
    for folder in (checkpoint, tmp_path / "back")
  )
  assert first.keys() == last.keys()
  for name, x in first.items():
    np.testing.assert_array_equal(last[name], x, err_msg=name)
  for convert_again in (
    lambda: formats.from_hf(checkpoint, run),
    lambda: to_hf(run, checkpoint),
  ):
    with pytest.raises(ConfigError, match="exists and is not empty"):
      convert_again()


def test_command_converts_or_says_why_not(llama, tmp_path):
  folder, flat = llama
  flags = "--from_hf=hf", "--workdir=run"
  child = command("convert", *flags, cwd=tmp_path)
  assert child.returncode == 0, child.stderr
  assert "transformer: 2 layers of width 64" in child.stdout
  assert "has no tokenizer: texts are bytes" in child.stderr
  write(folder, flat, LLAMA | {"mlp_bias": True})
  child = command("convert", "--from_hf=hf", "--workdir=new", cwd=tmp_path)
  assert child.returncode == 2
  *_, line = child.stderr.strip().splitlines()
  assert line.startswith("error: ") and "mlp_bias=True" in line
  assert not (tmp_path / "new").exists()
