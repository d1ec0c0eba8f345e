# Multi30k: a small transformer where it over-fits within minutes. Each may be given in the environment instead.
set -a
: "${RECIPE:=multi30k_en_de}" "${PREPARED_BY:=data_prep/multi30k.py}" "${SOURCE:=en}" "${TARGET:=de}"
: "${ARCH:=transformer}" "${LAYERS:=2}" "${WIDTH:=128}" "${FFN:=256}" "${HEADS:=4}" "${DROPOUT:=0.1}"
: "${UPDATES:=2000}" "${TOKENS:=1000}" "${LR:=3e-3}" "${WARMUP:=200}" "${VALIDATE:=100}" "${VALID_TOKENS:=4000}"
# Lockstep and fp32 snapshots, so that a run can be repeated to the bit.
: "${INTERVAL:=50}" "${SYNC:=1}" "${WIRE:=fp32}" "${GPUS_PER_PEER:=1}"
: "${TEST_SETS=test_2016_flickr:test test_2017_flickr:test1 test_2017_mscoco:test2}"
: "${NLL_SETS=val:valid test_2016_flickr:test}" "${BEAM:=5}"
: "${EXPECT:=on the first 6,000 pairs, best valid NLL 3.72 (ce), 3.73 (mse), all_reduce 3.89: README.md, Results}"
set +a
