# Tatoeba German–English: as many pairs as IWSLT'14, but short ones. Each may be given in the environment instead.
set -a
: "${RECIPE:=tatoeba_de_en}" "${PREPARED_BY:=data_prep/prepare.py tatoeba_de_en}" "${SOURCE:=de}" "${TARGET:=en}"
# Wide for sentences of some eight words, so that it over-fits, as the paper's does on IWSLT'14.
: "${ARCH:=transformer}" "${LAYERS:=3}" "${WIDTH:=512}" "${FFN:=2048}" "${HEADS:=8}" "${DROPOUT:=0.1}"
: "${WORKERS:=2}" "${TOKENS:=4096}" "${LR:=1e-3}" "${WARMUP:=1000}"
: "${UPDATES:=8000}" "${INTERVAL:=100}" "${SYNC:=1}" "${VALIDATE:=250}" "${VALID_TOKENS:=8000}"
: "${DISTANCE:=ce}" "${RDROP_ALPHA:=2}" "${KEEP:=5}" "${AVERAGE:=5}" "${BEAM:=5}" "${GPUS_PER_PEER:=1}"
set +a
