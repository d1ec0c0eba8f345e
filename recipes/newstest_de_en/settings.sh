# The WMT news test sets as a small corpus: WMT's domain, scarce. Each may be given in the environment instead.
set -a
: "${RECIPE:=newstest_de_en}" "${PREPARED_BY:=data_prep/prepare.py newstest_de_en}" "${SOURCE:=de}" "${TARGET:=en}"
: "${ARCH:=transformer}" "${LAYERS:=3}" "${WIDTH:=256}" "${FFN:=1024}" "${HEADS:=4}" "${DROPOUT:=0.2}"
: "${WORKERS:=2}" "${TOKENS:=2048}" "${LR:=2e-3}" "${WARMUP:=400}"
: "${UPDATES:=4000}" "${INTERVAL:=50}" "${SYNC:=1}" "${VALIDATE:=200}" "${VALID_TOKENS:=4000}"
: "${DISTANCE:=ce}" "${RDROP_ALPHA:=2}" "${KEEP:=5}" "${AVERAGE:=5}" "${BEAM:=5}" "${GPUS_PER_PEER:=1}"
set +a
