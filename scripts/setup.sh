#!/usr/bin/env bash
# Makes a virtual environment with the pinned requirements; the other scripts
# source it.  Does nothing if the pins have not changed since the last time.
#
#   HOPE_PYTHON  the interpreter, if not the newest that find_python.sh finds
#   HOPE_VENV    the environment's folder, if not .venv
#   HOPE_CORE=1  only what the library and scripts/test.sh --core need
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${HOPE_VENV:-.venv}
python=$venv/bin/python

version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

make_venv() {
  local found
  found=${HOPE_PYTHON:-$(scripts/find_python.sh || true)}
  if ! "$found" -c \
    'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
    2>/dev/null; then
    echo "error: ${found:-none found} is no Python >= 3.11 with venv:" \
      "set HOPE_PYTHON to one" >&2
    return 1
  fi
  echo "making $venv with $("$found" --version) ($(command -v "$found"))"
  "$found" -m venv --clear "$venv"
}

# uv is four times as fast as pip, but does not know pip's folders of wheels.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
pins=$(cat requirements.txt pyproject.toml | cksum)
installed=$(cat "$venv/requirements.cksum" 2>/dev/null || true)
if ! "$python" -c '' 2>/dev/null; then
  make_venv
  installed=
elif [ -n "${HOPE_PYTHON:-}" ] &&
  [ "$(version "$HOPE_PYTHON")" != "$(version "$python")" ]; then
  echo "error: $venv is of Python $(version "$python"), not of $HOPE_PYTHON:" \
    "remove it, or name another folder with HOPE_VENV" >&2
  exit 1
fi
if [ "$installed" != "$pins" ] &&
  ! { [ -n "${HOPE_CORE:-}" ] && [ "$installed" = "core $pins" ]; }; then
  what=(-r requirements.txt)
  if [ -n "${HOPE_CORE:-}" ]; then
    what=(-c requirements.txt -r pyproject.toml pytest pytest-xdist hypothesis)
    pins="core $pins"
  fi
  echo "installing ${what[*]} into $venv"
  "$python" -m pip install --quiet --disable-pip-version-check \
    "$(grep '^uv==' requirements.txt)"
  "$venv/bin/uv" pip install --quiet --python "$python" "${what[@]}"
  echo "$pins" >"$venv/requirements.cksum"
fi
