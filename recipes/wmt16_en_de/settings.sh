# WMT'16 English–German as Ott et al. 2018 trained it, on whom Sodhani et al. build. Each may be given in the environment instead.
set -a
: "${RECIPE:=wmt16_en_de}" "${PREPARED_BY:=data_prep/prepare.py wmt16_en_de}" "${SOURCE:=en}" "${TARGET:=de}"
: "${ARCH:=transformer_wmt_en_de_big}" "${DROPOUT:=0.3}" "${WEIGHT_DECAY:=0.0}" "${CLIP_NORM:=0.0}" "${VOCAB:=32768}"
# 128 workers of 3,584 tokens: the large batch of Ott et al., with its learning rate; two peers have 64 each.
: "${WORKERS:=128}" "${TOKENS:=3584}" "${LR:=0.001}" "${WARMUP:=4000}" "${WARMUP_INIT_LR:=1e-07}" "${PRECISION:=fp16}"
# As long as the axes of Sodhani et al., figures 5, 16 and 17; 2,500 is the only interval that they state.
: "${UPDATES:=17500}" "${INTERVAL:=2500}" "${SYNC:=0}"
: "${VALIDATE:=500}" "${LOG_EVERY:=100}" "${KEEP:=10}" "${AVERAGE:=10}" "${LOADERS:=1}"
: "${BEAM:=4}" "${LENPEN:=0.6}" "${RDROP_ALPHA:=5}"
: "${EXPECT:=valid NLL 2.12 with codistillation (Sodhani et al., A.1 and figure 17), similar with all_reduce (figure 5)}"
set +a
