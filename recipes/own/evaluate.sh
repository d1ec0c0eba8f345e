#!/usr/bin/env bash
# Translate and score finished runs: DATA=prepared bash recipes/own/evaluate.sh RUN…
# Defaults: settings.sh. What is done with them: ../translation/evaluate.py.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$here/settings.sh"
exec "${PYTHON:-python3}" "$here/../translation/evaluate.py" "$@"
