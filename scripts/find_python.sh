#!/usr/bin/env bash
# Prints the first interpreter found of the given Python versions; by default
# those that the requirements have wheels for, the newest first (grain has none
# for 3.15).  Searches PATH and pyenv's installations.
set -uo pipefail

check='import ensurepip, sys, venv
if "%d.%d" % sys.version_info[:2] != sys.argv[1]:
  sys.exit(1)
print(sys.executable)'

[ $# -gt 0 ] || set -- 3.14 3.13 3.12 3.11
for version in "$@"; do
  for candidate in "python$version" python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if "$candidate" -c "$check" "$version" 2>/dev/null; then
      exit 0
    fi
  done
done
echo "error: no interpreter with venv of Python $* found" >&2
exit 1
