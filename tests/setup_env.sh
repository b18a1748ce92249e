# Sourced by run_all.sh and tests/run.sh: sets PYTHON to an interpreter that has the requirements.
# PYTHON given: used as it is (conda, a container). Otherwise .venv, made here and rebuilt when requirements.txt changes.
if [ -z "${PYTHON:-}" ]; then
  stamp=.venv/requirements.sha256
  wanted=$(sha256sum requirements.txt | cut -d' ' -f1)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    if [ -e .venv ] && [ ! -e "$stamp" ]; then
      echo "error: .venv was not made by this script; give PYTHON=.venv/bin/python or move it away" >&2; exit 2
    fi
    echo "setting up .venv (once, some minutes: PyTorch is large)"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "error: python3 is older than 3.11; install a newer one or give PYTHON=/path/to/python" >&2; exit 2; }
    rm -rf .venv
    mkdir .venv
    touch "$stamp"                              # first of all: a set-up that was stopped is begun anew
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
      { echo "error: pip could not install requirements.txt into .venv (its message is above)" >&2; exit 2; }
    echo "$wanted" > "$stamp"
  fi
  PYTHON=.venv/bin/python
fi
export PYTHON
