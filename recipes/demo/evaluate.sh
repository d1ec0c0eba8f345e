#!/usr/bin/env bash
# Translate and score finished runs: DATA=demo/data bash recipes/demo/evaluate.sh RUN…
# ../run.py reads recipe.toml; ../translation/evaluate.py does the work. DRY_RUN=1 prints the commands.
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python3}" "$recipes/run.py" evaluate "$recipes/demo" "$@"
