"""Peers in 8 bits: what is lost, what is saved, and that weights come and go by the names of the whole model."""

import copy

import pytest
import torch
from fairseq_runs import CODISTILL
from test_criterion import Setting
from torch import nn

from fairseq_codistill import hook
from fairseq_codistill.core.int8 import RowsIn8Bits, load, quantise
from fairseq_codistill.core.replica import freeze, replica
from fairseq_codistill.core.teaching import Teaching
from fairseq_codistill.exchange.snapshot import tensors_of


@pytest.fixture(scope="module")
def setting(data):
    return Setting(data, CODISTILL, model="--arch transformer --decoder-layers 2 --share-decoder-input-output-embed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_off_by_half_a_step_at_most(dtype):
    weight = (torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 6).view(-1, 1, 1)).to(
        dtype
    )
    weight[2] = 0
    whole, scale = RowsIn8Bits().right_inverse(weight)
    back = RowsIn8Bits()(whole, scale)
    assert whole.dtype == torch.int8 and back.dtype == dtype and (back[2] == 0).all()
    largest = weight.float().abs().amax((1, 2))
    error = (back.float() - weight.float()).abs().amax((1, 2))
    # Half of 1/127, and what `dtype` itself rounds off.
    assert (error <= largest * (0.5 / 127 + 2 * torch.finfo(dtype).eps) + 1e-6).all()


def test_it_speaks_nearly_as_the_whole_model_does(setting):
    eighth = replica(setting.peer, torch.int8)
    with torch.no_grad():
        whole, ours = (model(**setting.sample["net_input"])[0].softmax(-1) for model in (setting.peer, eighth))
    assert 0 < (whole - ours).abs().sum(-1).max() < 0.05
    assert not any(p.requires_grad for p in eighth.parameters()) and not eighth.training
    assert all(p.dtype == torch.float32 for p in setting.peer.parameters()), "the model itself is untouched"


def bytes_of(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(model).values())


def test_it_takes_a_quarter_of_the_memory(setting):
    """Tied embeddings once; biases, layer norms and the positions' table stay as they are."""
    eighth = replica(setting.model, torch.int8)
    assert bytes_of(eighth) < 0.3 * bytes_of(setting.model)
    decoder = eighth.decoder
    assert decoder.output_projection.parametrizations.weight.original0 is decoder.embed_tokens.parametrizations.weight.original0
    assert (
        decoder.embed_tokens.parametrizations.weight.original0
        is not eighth.encoder.embed_tokens.parametrizations.weight.original0
    )


def test_new_weights_are_taken_by_name(setting):
    """As the exchange does it: tied weights come once, by their first name."""
    eighth = replica(setting.model, torch.int8)
    load(eighth, tensors_of(setting.peer))
    expected = replica(setting.peer, torch.int8)
    mine, theirs = tensors_of(eighth), tensors_of(expected)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_whole_model_takes_them_as_ever(setting):
    copied = replica(setting.model, torch.bfloat16)
    load(copied, tensors_of(setting.peer))
    for name, tensor in tensors_of(setting.peer).items():
        assert torch.equal(tensors_of(copied)[name], tensor.to(tensors_of(copied)[name].dtype))


def test_it_teaches_by_both_paths(setting):
    criterion = setting.criterion(loss="ce")
    sample = {**setting.sample, hook.TEACHING: Teaching(1.0, [replica(setting.peer, torch.int8)])}
    loss, _, log = criterion(setting.model, sample)
    assert criterion._probe.layers[setting.model] is setting.model.decoder.output_projection
    criterion._probe.layers[setting.model] = None
    slow, _, slow_log = criterion(setting.model, sample)
    close = {"rtol": 1e-4, "atol": 0.0}  # the peer's logits are bf16, whose last bit depends on the size of the product
    torch.testing.assert_close(loss, slow, **close)
    whole = criterion(setting.model, setting.teach())[2]["codistill_loss"]
    torch.testing.assert_close(log["codistill_loss"], slow_log["codistill_loss"], **close)
    torch.testing.assert_close(log["codistill_loss"], whole, rtol=0.01, atol=0.0)


def test_freezing_again_changes_nothing(setting):
    """Offline teachers are made ready in every epoch."""
    teacher = copy.deepcopy(setting.peer)
    states = []
    for _ in range(2):
        freeze(teacher, torch.device("cpu"), torch.int8, torch.bfloat16)
        states.append({name: tensor.clone() for name, tensor in teacher.state_dict().items()})
    assert states[0].keys() == states[1].keys()
    kept = [name for name in states[0] if not name.endswith("_float_tensor")]  # which fairseq leaves uninitialised
    assert all(torch.equal(states[0][name], states[1][name]) for name in kept)
    assert teacher.decoder.output_projection.weight.dtype == torch.bfloat16
    assert len(teacher.decoder.layers[0]._forward_pre_hooks) == 1


def test_an_lstm_and_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LSTM(5, 6), nn.LSTMCell(2, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = model[0](x), model[1](torch.randn(2, 1, 5))[0]
        quantise(model)
        torch.testing.assert_close(model[0](x), before[0], atol=0.02, rtol=0.05)
        assert model[1](torch.randn(2, 1, 5))[0].shape == before[1].shape
        model[2](torch.randn(1, 2))
    assert model[0].parametrizations.weight.original0.dtype == torch.int8
    assert model[1].weight_ih_l0.dtype == torch.float32 and model[2].parametrizations.weight_hh.original0.dtype == torch.int8
