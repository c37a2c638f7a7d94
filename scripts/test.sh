#!/usr/bin/env bash
# All tests, on two processes; arguments go to pytest
# (scripts/test.sh -k mqar; --slow adds the tests that take minutes).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$python" -m pytest -n "${TEST_JOBS:-2}" "$@"
