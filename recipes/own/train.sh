#!/usr/bin/env bash
# Train one run: METHOD=codistill SEED=1 DATA=prepared OUT=runs bash recipes/own/train.sh
# Defaults: settings.sh. What is done with them: ../translation/train.sh. Every variable is listed in README.md.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$here/settings.sh"
exec bash "$here/../translation/train.sh"
