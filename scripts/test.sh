#!/usr/bin/env bash
# All tests, on two processes; arguments go to pytest
# (scripts/test.sh -k mqar; --slow adds the tests that take minutes).  Each
# process takes half of the suite in order, so that a module's models are
# compiled once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

exec "$python" -m pytest -n "${TEST_JOBS:-2}" --dist=worksteal "$@"
