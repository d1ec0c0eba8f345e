"""What equal tensors do not tell: two models of other settings are told apart, and nothing else is."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_exchange import fetch, model, publish
from torch import nn

from fairseq_codistill.exchange.exchange import Exchange
from fairseq_codistill.exchange.manifest import BadSnapshot
from fairseq_codistill.exchange.snapshot import decode, describe, fingerprint, tensors_of
from fairseq_codistill.exchange.stores import MemoryStore
from fairseq_codistill.exchange.structure import difference, structure


class Layer(nn.Module):
    def __init__(self, heads=2, activation=torch.relu, before=True, dropout=0.1, stride=1, act=None):
        super().__init__()
        self.num_heads, self.activation_fn, self.normalize_before = heads, activation, before
        self.embed_scale = math.sqrt(2)
        self.dropout_module, self.num_updates, self._cache = nn.Dropout(dropout), 0, heads
        self.conv = nn.Conv1d(4, 4, 3, stride=stride)
        self.act = act or nn.GELU()


def net(**settings):
    stack = nn.Module()
    stack.layers = nn.ModuleList([Layer(), Layer(**settings)])
    stack.embed_positions = None
    return stack


@pytest.mark.parametrize("settings, words", [
    ({"heads": 4}, "its layers.*.num_heads is 2,4, but this peer's is 2"),
    ({"activation": F.gelu}, "its layers.*.activation_fn is relu,gelu, but this peer's is relu"),
    ({"before": False}, "its layers.*.normalize_before is True,False, but this peer's is True"),
    ({"stride": 2}, "its layers.*.conv.stride is 1,2, but this peer's is 1"),
    ({"act": nn.GELU(approximate="tanh")}, "its layers.*.act.approximate is none,tanh, but this peer's is none"),
    ({"act": nn.ReLU()}, "its layers.*.act.class is GELU,ReLU, but this peer's is GELU"),
])  # fmt: skip
def test_another_function_with_equal_tensors_is_told_by_the_setting(settings, words):
    mine, theirs = structure(net()), structure(net(**settings))
    assert fingerprint(net()) == fingerprint(net(**settings)), "the tensors do not tell"
    assert difference(mine, theirs) == words
    assert difference(mine, json.loads(json.dumps(mine))) is None, "as it comes from a manifest"


def test_what_may_differ_is_not_compared():
    other = net(dropout=0.3)
    other.eval()
    other.layers[0].num_updates, other.layers[0].embed_scale = 7, math.sqrt(2) * (1 + 1e-15)
    other.half()
    assert difference(structure(net()), structure(other)) is None
    assert difference(structure(net()), {}) is None and difference({}, structure(net())) is None, "an older version's"
    newer = {**structure(net()), "layers.*.xformers": "1"}
    assert difference(structure(net()), newer) is None, "an attribute of another version of fairseq"


def test_missing_positions_are_told():
    theirs = nn.Module()
    theirs.embed_positions = nn.Identity()
    assert difference(structure(net()), structure(theirs)) == "its embed_positions is Identity, but this peer's is NoneType"


def test_settings_of_fairseqs_own_models():
    from fairseq.models.transformer import TransformerConfig
    from fairseq.modules import MultiheadAttention, TransformerEncoderLayer

    cfg = TransformerConfig(activation_fn="gelu")
    cfg.encoder.attention_heads = 4
    told = structure(TransformerEncoderLayer(cfg))
    assert told["self_attn.num_heads"] == "4" and told["activation_fn"] == "gelu" and told["normalize_before"] == "False"
    assert structure(MultiheadAttention(8, 2))["num_heads"] == "2" and not any("drop" in name for name in told)


def test_a_peer_of_another_structure_is_refused_before_its_weights_are_read():
    store, opened = MemoryStore(), []
    one, other = Exchange(store, 0), Exchange(store, 1)
    one.begin(0, fingerprint(model()), {"num_heads": "2"})
    other.begin(0, fingerprint(model()), {"num_heads": "4"})
    publish(other, 10)
    read, store.read = store.read, lambda name, limit: opened.append(name) or read(name, limit)
    with pytest.raises(BadSnapshot, match="its num_heads is 4, but this peer's is 2; all peers must have the same model"):
        fetch(one, 1, one.newest(1))
    assert opened == ["peer1/latest.json"]
    other.begin(0, fingerprint(model()))  # an older version does not tell
    publish(other, 20)
    assert fetch(one, 1, one.newest(1)) is not None


def test_what_a_peer_says_is_shown_plain():
    words = difference({"heads": "2"}, {"heads": "\x1b[31m" * 100})
    assert words.isprintable() and len(words) < 200
    header = b'{"\x1b[31mx\\u001b[31m":{"dtype":"\\u001b[2J","shape":[1],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    manifest = describe(data, 1, dtype="float32", epoch=1, model={}, time=0.0, fingerprint="")
    with pytest.raises(BadSnapshot) as error:
        decode(data, manifest, tensors_of(nn.Linear(1, 1)))
    assert str(error.value).isprintable(), str(error.value)
