"""The measuring scripts measure what they say."""

import pytest

from scripts import backward_memory


@pytest.mark.parametrize("policy", ["chunk", "sqrt"])
def test_saved_states_of_a_real_memory_follow_the_policy(policy):
  # 128 chunks of 64 tokens: 10 groups of 12, and 8 chunks by themselves; M_0,
  # which has no momentum, is half a state.
  expected = {"chunk": 128.5, "sqrt": 10 + 8.5}
  assert backward_memory.saved_states(8192, policy) == expected[policy]


def test_backward_memory_prints_a_table_and_plots(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(backward_memory, "LENGTHS", (128, 256))
  backward_memory.main([f"--plot={tmp_path / 'curve.png'}"])
  shown = capsys.readouterr().out.splitlines()
  assert [line.split("|")[1].strip() for line in shown[2:4]] == ["128", "256"]
  assert (tmp_path / "curve.png").stat().st_size > 1000
