#!/usr/bin/env bash
# ImageNet with ResNet-50: METHOD=codistill DATA=imagenet OUT=runs GPUS_PER_PEER=8 bash train.sh; see ../images/train.sh.
set -euo pipefail
# What recipes/images/train.sh has as its defaults is Sodhani et al.'s setting. The usual numbers of ImageNet spare a pass.
export IMAGE_OPTIONS="${IMAGE_OPTIONS:---image-mean 0.485,0.456,0.406 --image-std 0.229,0.224,0.225}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/../images/train.sh"
