# IWSLT'14 German–English with a transformer that is too large for it: Sodhani et al., section 4. Each may be given in the environment instead.
set -a
: "${RECIPE:=iwslt14_de_en}" "${PREPARED_BY:=data_prep/prepare.py iwslt14_de_en}" "${SOURCE:=de}" "${TARGET:=en}"
: "${ARCH:=transformer_wmt_en_de_big}" "${DROPOUT:=0.3}" "${WEIGHT_DECAY:=0.0}" "${CLIP_NORM:=0.0}" "${VOCAB:=10000}"
# The paper gives no batch for IWSLT'14: two workers of 4,096 tokens, the usual batch for this corpus for each peer.
: "${WORKERS:=2}" "${TOKENS:=4096}" "${LR:=5e-4}" "${WARMUP:=4000}" "${WARMUP_INIT_LR:=1e-07}" "${PRECISION:=fp16}"
# 500 updates are half an epoch of a peer, as 2,500 are on ImageNet in the paper.
: "${UPDATES:=17500}" "${INTERVAL:=500}" "${SYNC:=0}"
: "${VALIDATE:=500}" "${LOG_EVERY:=100}" "${KEEP:=10}" "${AVERAGE:=10}" "${LOADERS:=1}"
: "${BEAM:=5}" "${RDROP_ALPHA:=5}"
: "${EXPECT:=valid NLL 2.31 with codistillation, 2.37 with all_reduce (Sodhani et al., section 4)}"
set +a
