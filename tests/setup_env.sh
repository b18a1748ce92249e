# Sourced by run_all.sh and tests/run.sh: sets PYTHON to an interpreter that has the requirements.
# PYTHON given: used as it is (conda, a container). Otherwise .venv, made here and rebuilt when requirements.txt changes.
[ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -ge 44 ] ||
  { echo "error: this is bash $BASH_VERSION; install 4.4 or newer (macOS: brew install bash)" >&2; exit 2; }
if [ -z "${PYTHON:-}" ]; then
  installed=.venv/requirements.txt
  if ! cmp -s requirements.txt "$installed"; then
    if [ -e .venv ] && [ ! -e "$installed" ]; then
      echo "error: .venv was not made by this script; give PYTHON=.venv/bin/python or move it away" >&2; exit 2
    fi
    echo "setting up .venv (once, some minutes: PyTorch is large)"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "error: python3 is older than 3.11; install a newer one or give PYTHON=/path/to/python" >&2; exit 2; }
    rm -rf .venv
    mkdir .venv
    touch "$installed"                          # first of all: a set-up that was stopped is begun anew
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt ||
      { echo "error: pip could not install requirements.txt into .venv (its message is above)" >&2; exit 2; }
    .venv/bin/python -m compileall -q -j 0 .venv >/dev/null || true        # on all cores; some files are templates
    cp requirements.txt "$installed"
  fi
  PYTHON=.venv/bin/python
fi
export PYTHON
