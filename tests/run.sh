#!/usr/bin/env bash
# The whole test suite, on all cores: sets up .venv on first use, then runs pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/setup_env.sh
export OMP_NUM_THREADS=1        # every core has a test of its own
exec "$PYTHON" -m pytest "${@:-tests}" -q -p no:cacheprovider -n auto --dist loadfile \
  --no-loadscope-reorder --durations=15
