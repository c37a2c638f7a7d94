#!/usr/bin/env bash
# Checks and times this project on a machine with one GPU, where nothing can be
# installed: kernels, training steps, memories, decoding, a profile; at most
# nine minutes.  Writes results.json and report.md after every job, and
# continues where it stopped.
#
#   scripts/gpu_check.sh [--output=DIR] [--tiny] [--parts=A,B] [--seconds=N]
#
#   --tiny       toy sizes on the CPU: checks this script itself
#   HOPE_PYTHON  the interpreter, if not the first one found that has jax
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has_jax='import importlib.util as util, sys
sys.exit(sys.version_info < (3, 11) or util.find_spec("jax") is None)'
python=
for candidate in ${HOPE_PYTHON:-python3 python .venv/bin/python}; do
  if "$candidate" -c "$has_jax" 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: no Python >= 3.11 with jax in ${HOPE_PYTHON:-PATH or .venv}:" \
    "set HOPE_PYTHON to one" >&2
  exit 2
fi

# A job gets nearly all of the GPU's memory; warnings would hide the results.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
export PYTHONDONTWRITEBYTECODE=1
exec "$python" -m scripts.gpu_check "$@"
