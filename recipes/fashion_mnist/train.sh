#!/usr/bin/env bash
# Fashion-MNIST, halved to 14 × 14, with a ResNet-8 on CPUs: METHOD=codistill DATA=fashion OUT=runs bash train.sh; see ../images/train.sh.
set -euo pipefail
export ARCH="${ARCH:-resnet8}" AUGMENTATION="${AUGMENTATION:-none}" IMAGE_SIZE="${IMAGE_SIZE:-14}" WORKERS="${WORKERS:-0}"
export IMAGE_OPTIONS="${IMAGE_OPTIONS:---image-resize 14 --image-channels 1 --image-cache}" CPU="${CPU:-1}" THREADS="${THREADS:-1}"
export EPOCHS="${EPOCHS:-6}" BATCH="${BATCH:-128}" WEIGHT_DECAY="${WEIGHT_DECAY:-1e-2}" INTERVAL="${INTERVAL:-100}" BURN_IN="${BURN_IN:-0}"
export ALPHA="${ALPHA:-0.1}" ALPHA_SCHEDULE="${ALPHA_SCHEDULE:-constant}" VALIDATE="${VALIDATE:-160}" LR="${LR:-0.05}" EXTRA="${EXTRA:---clip-norm 5}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../images/train.sh"
