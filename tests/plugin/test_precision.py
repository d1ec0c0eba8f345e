"""`--codistill-peer-dtype auto`: the hardware's answers are faked, as no machine has all of them."""

import logging

import pytest
import torch
from test_codistiller import Model, codistiller, train
from test_config import config
from test_fused import setting  # noqa: F401
from torch import nn

from fairseq_codistill import build
from fairseq_codistill.config import fill_defaults, read_environment
from fairseq_codistill.core import group, precision
from fairseq_codistill.core.precision import AUTO
from fairseq_codistill.core.teaching import Teaching
from fairseq_codistill.exchange.stores import MemoryStore

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    """Says what the processor has; at first nothing."""

    def has(amx=False, avx512_bf16=False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)

    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    has()
    return has


@pytest.mark.parametrize("has, limit, answer", [
    (dict(), "", None),
    (dict(amx=True, avx512_bf16=True), "", "AMX"),
    (dict(avx512_bf16=True), "", "AVX512_BF16"),
    (dict(amx=True), "avx512_core_amx", "AMX"),
    (dict(amx=True), "ALL", "AMX"),
    (dict(amx=True, avx512_bf16=True), "AVX2", None),
    (dict(amx=True, avx512_bf16=True), "AVX512_CORE_VNNI", None),
])  # fmt: skip
def test_the_processor_is_asked_and_limits_of_onednn_count(processor, monkeypatch, has, limit, answer):
    processor(**has)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert precision.fast_bf16(CPU) == answer


def test_a_torch_without_the_question_or_without_onednn_has_no_fast_bf16(processor, monkeypatch):
    processor(amx=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision.fast_bf16(CPU) is None
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert precision.fast_bf16(CPU) is None


@pytest.mark.parametrize("capability, hip, answer", [
    ((9, 0), None, "compute capability 9.0"), ((8, 0), None, "compute capability 8.0"), ((7, 5), None, None),
    ((9, 0), "6.1", None),
])  # fmt: skip
def test_a_gpu_that_only_emulates_bf16_has_no_fast_one(monkeypatch, capability, hip, answer):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert precision.fast_bf16(GPU) == answer


def test_no_other_device_is_known_to_have_it():
    assert precision.fast_bf16(torch.device("mps")) is None and precision.fast_bf16(torch.device("meta")) is None


@pytest.mark.parametrize("dtype, chosen", [
    (torch.float32, torch.bfloat16), (torch.float16, None), (torch.bfloat16, None), (torch.float64, None),
])  # fmt: skip
def test_only_a_float32_model_has_something_to_gain(processor, dtype, chosen):
    processor(amx=True)
    assert precision.choice(nn.Linear(2, 2).to(dtype))[0] == chosen


@pytest.mark.parametrize("amx, dtype, line", [
    (True, torch.bfloat16, "the peers run in bf16, which this processor multiplies fast (AMX) (--codistill-peer-dtype auto)"),
    (False, torch.float32, "the peers run in fp32, as the model: no fast bf16 on this processor (--codistill-peer-dtype auto)"),
])  # fmt: skip
def test_auto_is_what_the_hardware_multiplies_fast_and_is_told_once(processor, caplog, amx, dtype, line):
    caplog.set_level(logging.INFO)
    processor(amx=amx)
    store = MemoryStore()
    me, other = codistiller(store, 0, peer_dtype=AUTO), codistiller(store, 1)
    train(other, 5)
    assert {p.dtype for p in me.teaching(0).peers[0].parameters()} == {dtype}
    me.begin_epoch(2, me._model)
    assert caplog.text.count(line) == caplog.text.count("the peers run in") == 1


def test_a_group_takes_bf16_only_if_all_its_ranks_do(processor, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    processor(amx=True)
    monkeypatch.setattr(group, "all_well", lambda well, device=None: False)
    one = codistiller(MemoryStore(), 0, peer_dtype=AUTO)
    assert one.peer_dtype is None and "not all of this peer's group" in caplog.text


class NeedsFloat32(Model):
    """An operation that knows no bf16, as some of fairseq's own kernels do not."""

    def forward(self, x):
        if self.bias.dtype == torch.bfloat16:
            raise NotImplementedError('"lightconv" not implemented for \'BFloat16\'\nand more')
        return super().forward(x)


def test_a_model_that_cannot_run_in_bf16_falls_back_to_its_own_precision(processor, caplog):
    processor(amx=True)
    store = MemoryStore()
    me = codistiller(store, 0, model=NeedsFloat32(), peer_dtype=AUTO)
    other = codistiller(store, 1, model=NeedsFloat32(3.0))
    train(other, 5)
    teaching = me.teaching(0)
    teaching.settle_precision(teaching.peers[0], {"x": torch.ones(3, 2)})
    ((_, output),) = teaching.outputs({"x": torch.ones(3, 2)})
    assert output.dtype == torch.float32 and caplog.text.count("this model cannot run in bf16 (\"lightconv\" not implem") == 1
    assert "and more" not in caplog.text
    train(other, 9, start=5)
    me.teachers.held.clear()  # as after a peer that did not fit into memory
    me.teaching(4)
    assert me.teaching(5).peers[0].bias.dtype == torch.float32 and me.teaching(5).widen is None


def test_a_precision_that_was_asked_for_is_not_given_up():
    store = MemoryStore()
    me, other = codistiller(store, 0, peer_dtype=torch.bfloat16), codistiller(store, 1)
    train(other, 5)
    assert me.teaching(0).widen is None


def test_what_is_out_of_memory_is_left_to_the_training():
    def peer(**net_input):
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    with pytest.raises(RuntimeError, match="out of memory"):
        precision.failure(peer, {"x": torch.ones(1)})


def test_the_criterion_tries_each_peer_once_before_it_teaches(setting):  # noqa: F811
    told = []
    broken = lambda module, inputs: (_ for _ in ()).throw(NotImplementedError("no bf16"))  # noqa: E731

    def widen(reason):
        told.append(reason)
        hook.remove()

    hook = setting.peer.register_forward_pre_hook(broken)
    teaching = Teaching(1.0, [setting.peer], 1.0, widen=widen)
    criterion = setting.criterion(loss="ce")
    for _ in range(2):
        criterion(setting.model, {**setting.sample, "codistill": teaching})
    assert told == ["no bf16"]


AUTO_OR_NOT = [
    (dict(), AUTO),
    (dict(amp=True), None),
    (dict(peer_dtype="bf16", amp=True), torch.bfloat16),
    (dict(peer_dtype="fp32"), torch.float32),
]


@pytest.mark.parametrize("options, expected", AUTO_OR_NOT)
def test_auto_is_the_default_but_not_under_autocast(options, expected):
    cfg = fill_defaults(read_environment(config(**options)))
    assert build.codistiller_of(cfg).peer_dtype == expected
