#!/usr/bin/env bash
# bash run.sh              set up, then the whole method on the embedded problems (as: run.sh run)
# bash run.sh test         set up, then the tests
# bash run.sh evidence     set up, then every arm over ten seeds, for the README's table; it resumes
# bash run.sh bench ...    set up, then time steps: --model FOLDER --prompts FILE.jsonl
# bash run.sh WORDS ...    set up, then rlep.py WORDS ..., such as: bash run.sh train --help
# RLEP_PYTHON=python3 bash run.sh ...    uses that Python and its packages instead of making .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

find_python() {
    for name in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "run.sh: error: Python 3.11 or newer is needed; install it and start again" >&2
    exit 2
}

python=${RLEP_PYTHON:-.venv/bin/python}
if [ -z "${RLEP_PYTHON:-}" ] && ! cmp -s requirements.txt .venv/installed.txt; then
    base=$(find_python)
    echo "run.sh: installing requirements.txt into .venv (once)" >&2
    "$base" -m venv .venv ||
        { echo "run.sh: error: no virtual environment; Debian: apt install python3-venv" >&2; exit 2; }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi

# Shapes vary from batch to batch: without this, a GPU's memory is soon in pieces.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
if [ -n "${RLEP_PYTHON:-}" ]; then  # packages of its own: which are not those that were tested?
    "$python" - <<'END' >&2
from importlib.metadata import PackageNotFoundError, version
for line in open("requirements.txt"):
    name, _, tested = line.strip().partition("==")
    try:
        found = version(name).split("+")[0]
    except PackageNotFoundError:
        found = "missing"
    if found != tested:
        print(f"run.sh: {name} is {found}; tested was {tested}")
END
fi

# Ten seeds, two at a time, one core each. Started again, it goes on where it was.
evidence() {
    mkdir -p runs/evidence
    echo "run.sh: evidence is under way, the logs are runs/evidence/seed*.log" >&2
    export python
    seq 0 9 | xargs -P 2 -I @ sh -c \
        '"$python" .github/evidence.py seed @ runs/evidence >runs/evidence/seed@.log 2>&1' ||
        { echo "run.sh: error: a seed did not end well, see its log; start again to go on" >&2; exit 2; }
    exec "$python" .github/evidence.py report runs/evidence
}

case "${1:-run}" in
    test) shift; exec "$python" -m pytest -q "$@" ;;
    evidence) evidence ;;
    bench) shift; exec "$python" .github/bench.py "$@" ;;
    *) echo "run.sh: loading torch" >&2; exec "$python" rlep.py "$@" ;;
esac
