#!/usr/bin/env bash
# All GPU checks and measurements of this repository in one run of under eight minutes: bench/gpu_suite.sh [options]
# Uses the Python whose torch sees CUDA; makes .venv only where there is none. Options: python -m bench.gpu_suite -h
set -euo pipefail
cd "$(dirname "$0")/.."
sees() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }
python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 .venv/bin/python; do
        if sees "$candidate"; then python=$candidate; break; fi
    done
fi
if [ -z "$python" ]; then
    case " $* " in
        *[\ =]cpu\ *) python=.venv/bin/python; "$python" -c 'import torch' 2>/dev/null || python=python3 ;;
        *)
            test -x .venv/bin/python || python3 -m venv .venv
            .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,engine,cuda]'
            python=.venv/bin/python
            ;;
    esac
fi
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" -m bench.gpu_suite "$@"
