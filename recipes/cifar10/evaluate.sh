#!/usr/bin/env bash
# Score a finished run, on the processor unless CPU=0: DATA=data/cifar10 bash recipes/cifar10/evaluate.sh RUN
# ../run.py reads recipe.toml; ../images/evaluate.py does the work.
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python3}" "$recipes/run.py" evaluate "$recipes/cifar10" "$@"
