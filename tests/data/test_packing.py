import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hope_jax.data import packing

DTYPE = np.dtype(np.uint16)


def document(count, first=0):
  tokens = np.arange(first, first + count).astype(DTYPE)
  return packing.Document(tokens, np.ones(count, np.float16))


def test_documents_begin_at_multiples_and_go_on():
  documents = [
    document(4, 100),
    document(8, 200),
    document(1),
    document(3, 300),
  ]
  first, second = packing.pack(documents, 8, 2, DTYPE)
  np.testing.assert_array_equal(
    first["tokens"], [100, 101, 102, 0, 200, 201, 202, 203]
  )
  np.testing.assert_array_equal(
    first["targets"], [101, 102, 103, 0, 201, 202, 203, 204]
  )
  np.testing.assert_array_equal(first["weights"], [1, 1, 1, 0, 1, 1, 1, 1])
  np.testing.assert_array_equal(first["segments"], [1, 1, 1, 1, 2, 2, 2, 2])
  np.testing.assert_array_equal(first["positions"], [0, 1, 2, 0, 0, 1, 2, 3])
  np.testing.assert_array_equal(
    second["tokens"], [204, 205, 206, 0, 300, 301, 0, 0]
  )
  np.testing.assert_array_equal(second["segments"], [0, 0, 0, 0, 1, 1, 1, 1])
  np.testing.assert_array_equal(second["positions"], [4, 5, 6, 0, 0, 1, 0, 0])


def test_prompt_has_no_weight():
  tokens = np.arange(6).astype(DTYPE)
  weights = np.array([0, 0, 0, 1, 1, 1], np.float16)
  (example,) = packing.pack([packing.Document(tokens, weights)], 8, 1, DTYPE)
  np.testing.assert_array_equal(example["weights"][:5], [0, 0, 1, 1, 1])


@given(
  st.lists(st.integers(0, 30), max_size=12),
  st.sampled_from([(8, 1), (8, 4), (12, 3), (16, 16)]),
)
def test_nothing_is_lost_or_mixed(counts, sizes):
  length, align = sizes
  documents = [document(n, 100 * i) for i, n in enumerate(counts)]
  read, number = {}, 0
  for example in packing.pack(documents, length, align, DTYPE):
    before = 0
    for t in range(length):
      segment = int(example["segments"][t])
      if segment != before:
        assert segment == before + 1 and t % align == 0
        assert example["positions"][t] == 0
        number, before = number + 1, segment
      if example["weights"][t]:
        place = int(example["positions"][t])
        assert place == len(read.setdefault(number, []))
        read[number].append((example["tokens"][t], example["targets"][t]))
  kept = [d.tokens for d in documents if len(d.tokens) > 1]
  assert len(read) == len(kept)
  for tokens, pairs in zip(kept, read.values(), strict=True):
    assert pairs == list(zip(tokens[:-1], tokens[1:], strict=True))


def test_more_documents_than_numbers(monkeypatch):
  monkeypatch.setattr(packing, "_MAX_DOCUMENTS", 2)
  packed = list(packing.pack([document(2)] * 5, 8, 1, DTYPE))
  assert [list(e["segments"]) for e in packed] == [
    [1, 2, 2, 2, 2, 2, 2, 2],
    [1, 2, 2, 2, 2, 2, 2, 2],
    [1, 1, 1, 1, 1, 1, 1, 1],
  ]


@pytest.mark.parametrize("counts", [[], [1, 0]])
def test_nothing_to_pack(counts):
  assert not list(packing.pack(map(document, counts), 8, 1, DTYPE))
