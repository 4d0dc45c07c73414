#!/usr/bin/env bash
# bash run.sh              set up, then the whole method on the embedded problems (the same as: bash run.sh run)
# bash run.sh test         set up, then the tests
# bash run.sh evidence     set up, then every arm over six seeds, for the README's table (resumable)
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

python=.venv/bin/python

# One seed of every arm; base, vanilla run and pool are shared by its arms. Finished runs return at once.
evidence_seed() {
    local seed=$1 at=runs/evidence/seed$1
    arm() { "$python" rlep.py "$1" --seed "$seed" --threads 1 --out "$at/$2" "${@:3}" || echo "no $2 in seed $seed"; }
    arm run main
    local base=$at/main/base/policy pool=$at/main/pool.jsonl
    arm collect failed --model "$at/main/vanilla/policy" --replay_failed
    arm train vanilla-twice --model "$base" --steps 24
    arm train sft --model "$base" --pool "$pool" --sft_steps 4
    arm train m1 --model "$base" --pool "$pool" --replays 1
    arm train m4 --model "$base" --pool "$pool" --replays 4
    arm train m2-failed --model "$base" --pool "$at/failed/pool.jsonl" --replay_failed
    arm train m2-rescue --model "$base" --pool "$pool" --rescue
}

# Six seeds, two at a time, one core each. Started again, it goes on where it was. An arm may be impossible (M = 4 with a
# pool of fewer answers): the log says so, and the table counts the seeds of each arm.
evidence() {
    mkdir -p runs/evidence
    export python && export -f evidence_seed
    echo "run.sh: evidence is under way, the logs are runs/evidence/seed*.log" >&2
    seq 0 5 | xargs -P 2 -I @ bash -c 'set -e; evidence_seed @ >runs/evidence/seed@.log 2>&1'
    local runs=()
    for summary in runs/evidence/seed?/{main,vanilla-twice,sft,m1,m4,m2-failed,m2-rescue}/summary.json; do
        runs+=("${summary%/summary.json}")
    done
    "$python" rlep.py plot "${runs[@]}" --out runs/evidence | tee runs/evidence/table.md
}

case "${1:-run}" in
    test) shift; exec "$python" -m pytest -q "$@" ;;
    evidence) evidence ;;
    *) exec "$python" rlep.py "$@" ;;
esac
