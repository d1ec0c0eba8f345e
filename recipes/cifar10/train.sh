#!/usr/bin/env bash
# CIFAR-10 with a ResNet-20 on one GPU: METHOD=codistill DATA=cifar10 OUT=runs bash train.sh; see ../images/train.sh.
set -euo pipefail
export ARCH="${ARCH:-resnet20}" AUGMENTATION="${AUGMENTATION:-small}" IMAGE_SIZE="${IMAGE_SIZE:-32}"
export IMAGE_OPTIONS="${IMAGE_OPTIONS:---image-cache}" EPOCHS="${EPOCHS:-180}" BATCH="${BATCH:-128}"
export WEIGHT_DECAY="${WEIGHT_DECAY:-5e-4}" INTERVAL="${INTERVAL:-400}" VALIDATE="${VALIDATE:-1000}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../images/train.sh"
