#!/usr/bin/env bash
# scikit-learn's digits, 8 × 8, in a minute on one core: METHOD=codistill DATA=digits OUT=runs bash train.sh; see ../images/train.sh.
set -euo pipefail
export ARCH="${ARCH:-resnet8}" AUGMENTATION="${AUGMENTATION:-none}" IMAGE_SIZE="${IMAGE_SIZE:-8}" WORKERS="${WORKERS:-0}"
export IMAGE_OPTIONS="${IMAGE_OPTIONS:---image-channels 1 --image-cache}" CPU="${CPU:-1}" THREADS="${THREADS:-1}"
export EPOCHS="${EPOCHS:-18}" BATCH="${BATCH:-32}" WEIGHT_DECAY="${WEIGHT_DECAY:-3e-3}" INTERVAL="${INTERVAL:-20}"
export ALPHA_SCHEDULE="${ALPHA_SCHEDULE:-constant}" VALIDATE="${VALIDATE:-40}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../images/train.sh"
