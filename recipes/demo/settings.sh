# The demo: Multi30k's small transformer on the grammar's corpus. Each may be given in the environment instead.
set -a
: "${RECIPE:=demo}" "${PREPARED_BY:=recipes/demo/prepare.py}" "${SOURCE:=en}" "${TARGET:=de}"
: "${ARCH:=transformer}" "${LAYERS:=2}" "${WIDTH:=128}" "${FFN:=256}" "${HEADS:=4}"
# Without dropout the scarce data is over-fitted within minutes, so that one sees what each objective does about it.
: "${DROPOUT:=0}"
: "${UPDATES:=900}" "${TOKENS:=700}" "${LR:=3e-3}" "${WARMUP:=200}" "${VALIDATE:=100}" "${VALID_TOKENS:=4000}"
# Soft targets with a constant α work from the first update, and a demo is short. In lockstep runs are reproducible.
: "${DISTANCE:=ce}" "${INTERVAL:=50}" "${SYNC:=1}" "${WIRE:=fp32}" "${GPUS_PER_PEER:=1}"
# Valid NLL is in the logs. A model that has hardly learned anything babbles up to fairseq's limit of 200 pieces.
: "${TEST_SETS=test:test}" "${NLL_SETS=}" "${BEAM:=5}" "${FAIRSEQ_GENERATE:=fairseq-generate --max-len-a 2 --max-len-b 10}"
set +a
