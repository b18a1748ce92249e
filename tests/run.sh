#!/usr/bin/env bash
# The whole test suite: sets up .venv on first use, then runs pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/setup_env.sh
exec "$PYTHON" -m pytest tests -q -p no:cacheprovider --durations=10 "$@"
