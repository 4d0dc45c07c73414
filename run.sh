#!/usr/bin/env bash
# bash run.sh              set up, then the whole method on the embedded problems (the same as: bash run.sh run)
# bash run.sh test         set up, then the tests
# bash run.sh evidence     set up, then every arm over five seeds, for the README's table (resumable)
# bash run.sh WORDS ...    set up, then rlep.py WORDS ..., such as: bash run.sh train --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

find_python() {
    for name in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "run.sh: error: Python 3.11 or newer is needed; install it and start again" >&2
    exit 2
}

if ! cmp -s requirements.txt .venv/installed.txt; then
    python=$(find_python)
    echo "run.sh: installing requirements.txt into .venv (once)" >&2
    "$python" -m venv .venv || { echo "run.sh: error: no virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi

case "${1:-run}" in
    test) shift; exec .venv/bin/python -m pytest -q "$@" ;;
    *) exec .venv/bin/python rlep.py "$@" ;;
esac
