#!/usr/bin/env bash
# Makes .venv with the pinned requirements; the other scripts source it.
# Does nothing when requirements.txt has not changed since the last time.
# HOPE_PYTHON names another interpreter than the first Python >= 3.11 found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in ${HOPE_PYTHON:-python3.11 python3.12 python3.13 python3.14 \
    python3 python}; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python >= 3.11 with venv found; set HOPE_PYTHON to one" >&2
  return 1
}

python=.venv/bin/python
# uv is four times as fast as pip, but does not know pip's folders of wheels.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
wanted=$(cksum <requirements.txt)
if [ "$(cat .venv/requirements.cksum 2>/dev/null)" != "$wanted" ]; then
  if ! "$python" -c '' 2>/dev/null; then
    found=$(find_python)
    echo "making .venv with $("$found" --version)"
    "$found" -m venv --clear .venv
  fi
  echo "installing requirements.txt"
  "$python" -m pip install --quiet --disable-pip-version-check \
    "$(grep '^uv==' requirements.txt)"
  .venv/bin/uv pip install --quiet --python "$python" -r requirements.txt
  echo "$wanted" >.venv/requirements.cksum
fi
