#!/usr/bin/env bash
# All tests, on two processes; arguments go to pytest
# (scripts/test.sh -k mqar; --slow adds the longest tests, and repeats on further
# models).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# The TPU's compiler, for the tests that compile for one.  Apart from .venv: beside
# jax it would look for a TPU at every start.
libtpu=$("$python" -c 'import tomllib
with open("pyproject.toml", "rb") as file:
  print(tomllib.load(file)["project"]["optional-dependencies"]["aot"][0])')
compilers=.cache/compilers/$libtpu
if [ ! -d "$compilers" ] && ! .venv/bin/uv pip install --quiet \
  --python "$python" --no-deps --target "$compilers" "$libtpu"; then
  rm -rf "$compilers"
  echo "warning: no $libtpu: the tests that compile for a TPU are skipped" >&2
fi
export HOPE_COMPILERS=$compilers

# In the order of tests/conftest.py: a long file would be last and alone otherwise.
exec "$python" -m pytest -n "${TEST_JOBS:-2}" --dist loadfile \
  --no-loadscope-reorder "$@"
