#!/usr/bin/env bash
# Runs all tests, in three processes (or TEST_JOBS), for with two one of two cores
# would often wait for a start or a compiler.  Arguments go to pytest (scripts/test.sh
# -k mqar; --slow adds the longest tests, and repetitions on further models; --core
# runs one file of each room, and installs only what these need).
set -euo pipefail
case " $* " in *" --core "*) export HOPE_CORE=1 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# The TPU's compiler, for the tests that compile for one.  Kept outside of .venv:
# installed next to jax, it would look for a TPU at every start.
libtpu=$("$python" -c 'import tomllib
with open("pyproject.toml", "rb") as file:
  print(tomllib.load(file)["project"]["optional-dependencies"]["aot"][0])')
compilers=.cache/compilers/$libtpu
if [ -z "${HOPE_CORE:-}" ] && [ ! -d "$compilers" ] &&
  ! "$venv/bin/uv" pip install --quiet --python "$python" --no-deps \
    --target "$compilers" "$libtpu"; then
  rm -rf "$compilers"
  echo "warning: no $libtpu: the tests that compile for a TPU are skipped" >&2
fi
export HOPE_COMPILERS=$compilers

# In the order of tests/conftest.py; otherwise a long file might run last and alone.
exec "$python" -m pytest -n "${TEST_JOBS:-3}" --dist loadfile \
  --no-loadscope-reorder "$@"
