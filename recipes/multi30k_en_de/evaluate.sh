#!/usr/bin/env bash
# Translate and score finished runs: DATA=data/multi30k bash recipes/multi30k_en_de/evaluate.sh RUN…
# ../run.py reads recipe.toml; ../translation/evaluate.py does the work. DRY_RUN=1 prints the commands.
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python3}" "$recipes/run.py" evaluate "$recipes/multi30k_en_de" "$@"
