# One's own text and languages, which DATA/manifest.json names: a small transformer. Each may be given in the environment instead.
set -a
: "${RECIPE:=own}" "${PREPARED_BY:=data_prep/prepare.py own}"
: "${ARCH:=transformer_iwslt_de_en}" "${DROPOUT:=0.3}" "${WEIGHT_DECAY:=0.0001}"
: "${WORKERS:=2}" "${TOKENS:=4096}" "${LR:=5e-4}" "${WARMUP:=4000}" "${WARMUP_INIT_LR:=1e-07}"
# Soft targets with a constant α; an exchange every half epoch of a peer or so: 160,000 pairs are about 1,000 updates of one.
: "${DISTANCE:=ce}" "${UPDATES:=20000}" "${INTERVAL:=500}" "${SYNC:=0}"
: "${VALIDATE:=500}" "${LOG_EVERY:=100}" "${KEEP:=5}" "${AVERAGE:=5}" "${BEAM:=5}" "${LOADERS:=1}"
set +a
