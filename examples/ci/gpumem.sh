#!/bin/sh
# Gate a change on peak GPU memory, on any machine; it needs no GPU. Run it in the root of
# your project, with gpumem-requirements.txt there, in an environment of its own:
#   python -m venv .venv && . .venv/bin/activate && sh gpumem.sh
set -eu

python -m pip install -r gpumem-requirements.txt
python -m pip install -e .

# Fails if a test needs over 5 % more than the committed file says, breaks a limit of its
# own, or does not fit into the budget.
python -m pytest \
    --gpu-backend=simulated \
    --gpu-card=T4 \
    --gpu-budget=8GiB \
    --gpu-baseline=gpu-baseline.json \
    --gpu-compare-fail=allocated:5% \
    --gpu-report=json:reports/gpumem.json \
    --gpu-snapshots=reports/snapshots \
    --junitxml=reports/junit.xml
