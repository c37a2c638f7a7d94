#!/usr/bin/env bash
# Trains Transformer++ (with and without convolution), Titans and Hope on tiny
# Shakespeare at equal tokens, and a small Hope and its twin on recall; prints
# the tables and a sample of text; writes results.json, table.md and the loss
# curves to runs/language_modeling-demo.  Run again, it continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$python" -m experiments.language_modeling.run --scale=demo --jobs=2 "$@"
