#!/bin/sh
# Everything worth measuring on one CUDA device, in one command of under ten minutes: see benchmarks/gpu_bench.py.
# Without a CUDA device the same at toy size. $PYTHON names the interpreter; the report goes to $OUT or ./gpu_bench.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" benchmarks/gpu_bench.py "$@"
