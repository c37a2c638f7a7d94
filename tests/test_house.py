"""The layout of the library holds: floors, rooms, sizes of signatures."""

import ast
import pathlib

import pytest

from scripts import floors

COMMANDS = {
  "convert",
  "evaluate",
  "export",
  "generate",
  "harness",
  "levels",
  "session",
  "train",
}


def functions():
  for path in floors.LIBRARY.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef):
        yield f"{path.relative_to(floors.LIBRARY)}::{node.name}", node


def test_library_has_at_most_nine_floors_and_no_circle():
  found = floors.floors(floors.rooms())
  assert max(found.values()) <= 9, found
  assert found["config"] == 1


def test_circles_of_rooms_are_found():
  with pytest.raises(ValueError, match="a -> b -> a"):
    floors.floors({"a": {"b"}, "b": {"a"}})
  assert floors.floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {
    "a": 3,
    "b": 2,
    "c": 1,
  }


def test_at_the_top_there_are_commands_and_what_they_share():
  tops = {path.stem for path in floors.LIBRARY.glob("*.py")}
  assert tops == COMMANDS | {"__init__", "cli"}


def test_libraries_import_no_command():
  for room, below in floors.rooms().items():
    if room not in COMMANDS:
      assert not below & (COMMANDS | {"cli"}), room


def test_few_functions_have_six_positional_arguments():
  found = [
    name
    for name, node in functions()
    if len([a for a in node.args.args if a.arg not in ("self", "cls")]) >= 6
  ]
  assert len(found) < 8, found


# Modules without a test file of their own -> where they are tested.
TESTED_IN = {
  "analysis/costs.py": "test_levels.py",
  "analysis/levels.py": "test_levels.py",
  "analysis/topology.py": "pallas_kernels/test_compilation.py",
  "config/data.py": "test_configs.py",
  "config/fields.py": "test_config.py",
  "config/layers.py": "test_config.py",
  "config/model.py": "test_config.py",
  "config/optimizer.py": "test_configs.py",
  "config/run.py": "test_config.py",
  "data/documents.py": "data/test_prepare.py",
  "evaluate.py": "test_commands.py",
  "export.py": "test_commands.py",
  "generate.py": "test_commands.py",
  "inference/evaluation.py": "test_commands.py",
  "inference/lm_eval_answers.py": "test_tasks.py",
  "inference/lm_eval_model.py": "test_harness.py",
  "inference/lm_eval_tasks.py": "test_tasks.py",
  "inference/reading.py": "test_session.py",
  "inference/sampling.py": "inference/test_generation.py",
  "inference/session_folder.py": "test_session.py",
  "inference/sessions.py": "test_session.py",
  "inference/texts.py": "test_commands.py",
  "inference/trained.py": "test_session.py",
  "inference/variants.py": "test_commands.py",
  "interchange/formats.py": "test_convert.py",
  "interchange/mapping.py": "test_convert.py",
  "memory/architectures.py": "memory/test_deep.py",
  "memory/chunks.py": "memory/test_deep.py",
  "memory/devices.py": "training/test_sharding.py",
  "memory/memora.py": "memory/test_baselines.py",
  "memory/norms.py": "models/test_equations.py",
  "memory/ttt.py": "memory/test_baselines.py",
  "models/block.py": "models/test_models.py",
  "models/cms.py": "models/test_equations.py",
  "models/fast_state.py": "inference/test_streaming.py",
  "models/interface.py": "models/test_models.py",
  "models/language_model.py": "models/test_models.py",
  "models/layers.py": "models/test_models.py",
  "models/mamba2.py": "models/test_equations.py",
  "models/next_token_levels.py": "models/test_next_token.py",
  "models/problems.py": "test_levels.py",
  "models/registry.py": "models/test_models.py",
  "models/rotary.py": "models/test_attention.py",
  "models/titans.py": "models/test_equations.py",
  "models/ttt.py": "models/test_equations.py",
  "optim/adamw.py": "optim/test_registry.py",
  "optim/moments.py": "test_levels.py",
  "optim/roles.py": "models/test_parameters.py",
  "optim/schedules.py": "optim/test_registry.py",
  "runs/digest.py": "runs/test_checkpoints.py",
  "runs/errors.py": "training/test_faults.py",
  "runs/interruption.py": "training/test_faults.py",
  "runs/supervisor.py": "runs/test_processes.py",
  "train.py": "test_commands.py",
}


def test_every_module_has_a_test_file_or_a_line_that_says_which():
  tests = pathlib.Path(__file__).parent
  without = set()
  for path in floors.LIBRARY.rglob("*.py"):
    module = path.relative_to(floors.LIBRARY)
    own = tests / module.with_name(f"test_{module.name}")
    if module.name != "__init__.py" and not own.exists():
      without.add(module.as_posix())
  assert without == set(TESTED_IN)
  for file in TESTED_IN.values():
    assert (tests / file).is_file(), file
