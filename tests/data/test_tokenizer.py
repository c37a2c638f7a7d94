import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hope_jax.data import tokenizer


@given(st.text())
def test_tokenizer_decode_inverts_encode(text):
  tokens = tokenizer.encode(text)
  assert tokens.dtype == np.int32
  assert tokenizer.decode(tokens) == text


def test_tokenizer_replaces_broken_bytes():
  assert tokenizer.decode(np.array([0xC3, 65])) == "\ufffdA"
