"""The fused loss against the slow reference, and in real models against the path that holds all logits."""

import contextlib
import copy
import math
import weakref
from weakref import WeakKeyDictionary

import fairseq
import pytest
import torch
import torch.nn.functional as F
from fairseq.distributed import ModuleProxyWrapper
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.utils import move_to_cuda
from fairseq_runs import CODISTILL, LOCKSTEP, Job, fork_server, free_port, peer_environment, preprocess, taught, train_words
from test_criterion import Setting
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_codistill import hook
from fairseq_codistill.core.fused import Objective, Peer, fused
from fairseq_codistill.core.losses import AGGREGATES, DISTANCES
from fairseq_codistill.core.output_layer import output_layer, replaced
from fairseq_codistill.core.replica import replica
from fairseq_codistill.core.teaching import Teaching

N, C, V = 7, 5, 11


def tensors(seed, dtype=torch.float64, bias=True):
    """Features, weight and bias of an output layer; target."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randn(size, generator=draw, dtype=torch.float64) for size in ((N, C), (V, C), (V,))]
    features, weight, offset = (row.to(dtype) for row in rows)
    return features, weight, offset if bias else None, torch.randint(V, (N,), generator=draw)


def teachers(count, dtype=torch.float64):
    """Peers of other widths than the model's, and their logits."""
    peers, logits = [], []
    for seed in range(1, count + 1):
        draw = torch.Generator().manual_seed(100 + seed)
        features = torch.randn(N, C + seed, generator=draw, dtype=torch.float64).to(dtype)
        weight = torch.randn(V, C + seed, generator=draw, dtype=torch.float64).to(dtype)
        peers.append(Peer(features, lambda x, weight=weight: F.linear(x, weight)))
        logits.append(F.linear(features, weight))
    return peers, logits


def reference(features, weight, bias, target, logits, objective):
    """All logits at once, by the equations of `losses`."""
    own = F.linear(features, weight, bias)
    nll = F.cross_entropy(own, target, reduction="sum")
    dropped = []
    distance = AGGREGATES[objective.aggregate](objective.distance, own, logits, objective.temperature, dropped).sum()
    agreement = sum((own.argmax(-1) == peer.argmax(-1)).sum() for peer in logits) / len(logits)
    return nll + objective.alpha * distance, nll, distance, agreement, torch.stack([rows.sum() for rows in dropped])


CASES = [(d, a, t, n) for d in DISTANCES for a in AGGREGATES for t, n in ((1.0, 1), (2.5, 1), (1.0, 3), (0.7, 2))]


@pytest.mark.parametrize("chunk", [1, 3, 100, None])
@pytest.mark.parametrize("distance,aggregate,temperature,count", CASES)
def test_it_is_the_reference(distance, aggregate, temperature, count, chunk):
    objective = Objective(distance, aggregate, temperature, alpha=0.6)
    results = []
    for function in (fused, reference):
        features, weight, bias, target = tensors(0)
        leaves = [x.requires_grad_() for x in (features, weight, bias)]
        peers, logits = teachers(count)
        if function is fused:
            sums = fused(features, weight, bias, target, peers, objective, chunk)
        else:
            sums = reference(features, weight, bias, target, logits, objective)
        (sums[0] * 3.0).backward()
        results.append((*(x.detach() for x in sums[:5]), *(x.grad for x in leaves)))
    for mine, slow in zip(*results):
        torch.testing.assert_close(mine, slow.to(mine.dtype))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance, aggregate):
    features, weight, bias, target = tensors(0)
    leaves = tuple(x.requires_grad_() for x in (features, weight, bias))

    def loss(*leaves):
        return fused(*leaves, target, teachers(2)[0], Objective(distance, aggregate, 1.7, 0.4), 3).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)])
def test_only_what_is_trained_gets_a_gradient(needed):
    features, weight, bias, target = tensors(0)
    leaves = [x.requires_grad_(need) for x, need in zip((features, weight, bias), needed)]
    loss = fused(*leaves, target, teachers(1)[0], Objective("ce")).loss
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward()
    assert [x.grad is not None for x in leaves] == list(needed)


def test_a_shared_embedding_gathers_both_gradients():
    """As with --share-all-embeddings: the weight is used below as well."""
    grads = []
    for function in (fused, reference):
        _, weight, _, target = tensors(0)
        weight.requires_grad_()
        features = weight[target.flip(0)].tanh()
        peers, logits = teachers(1)
        teacher = peers if function is fused else logits
        function(features, weight, None, target, teacher, Objective("ce"))[0].backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_backward_twice_adds_the_same_again():
    features, weight, bias, target = tensors(0)
    features.requires_grad_()
    loss = fused(features, weight, bias, target, teachers(1)[0], Objective("mse")).loss
    loss.backward(retain_graph=True)
    once = features.grad.clone()
    loss.backward()
    torch.testing.assert_close(features.grad, 2 * once)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_half_precision(distance, dtype, tolerance):
    """Against float64 from the same rounded numbers; sums and the loss come out wide, gradients in the model's dtype."""
    objective, results = Objective(distance, alpha=0.6), []
    for kind in (dtype, torch.float64):
        features, weight, bias, target = (x.to(kind) if x.is_floating_point() else x for x in tensors(0, dtype))
        leaves = [x.requires_grad_() for x in (features, weight, bias)]
        peers = [
            Peer(p.features_NC.to(kind), lambda x, p=p, kind=kind: p.project(x.to(dtype)).to(kind))
            for p in teachers(1, dtype)[0]
        ]
        sums = fused(features, weight, bias, target, peers, objective, chunk=3)
        assert sums.loss.dtype == (torch.float32 if kind == dtype else kind)
        sums.loss.backward()
        assert all(x.grad.dtype == kind for x in leaves)
        results.append([sums.loss.detach().double(), sums.distance.double(), *(x.grad.double() for x in leaves)])
    for mine, exact in zip(*results):
        assert (mine - exact).norm() <= tolerance * exact.norm()


def test_small_gradients_survive_fp16():
    """A class of probability 1e-8 is below what fp16 can hold; its weight's gradient must still be there when scaled."""
    features = torch.ones(1, 1, dtype=torch.float16)
    weight = torch.tensor([[0.0], [-17.0]], dtype=torch.float16, requires_grad=True)
    loss = fused(
        features, weight, None, torch.tensor([0]), [Peer(features, lambda x: x @ weight.detach().T)], Objective("ce")
    ).loss
    (loss * 2**12).backward()
    assert weight.grad[1].item() == pytest.approx(2**12 * math.exp(-17), rel=0.05)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_row_that_is_not_finite_teaches_nothing(distance, poison):
    features, weight, bias, target = tensors(0)
    features.requires_grad_()
    bad = teachers(1)[1][0]
    bad[2] = poison
    good = teachers(2)[1][1]
    peers = [Peer(bad, torch.clone), Peer(good, torch.clone)]
    sums = fused(features, weight, bias, target, peers, Objective(distance), chunk=4)
    slow = reference(features, weight, bias, target, [bad, good], Objective(distance))
    torch.testing.assert_close(sums.distance, slow[2])
    (gradient,) = torch.autograd.grad(sums.loss, features)
    assert gradient.isfinite().all()


def test_an_impossible_target_is_not_infinitely_bad():
    """Far below what a probability can hold; the loss is the difference of the logits all the same."""
    features, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    sums = fused(features, weight, None, torch.tensor([1]), [Peer(features, lambda x: x @ weight.T)], Objective("ce"))
    assert sums.nll.item() == pytest.approx(400.0)


def test_no_position_at_all():
    features, weight, bias, target = tensors(0)
    features = features[:0].requires_grad_()
    sums = fused(features, weight, bias, target[:0], [Peer(features.detach(), lambda x: x @ weight.T)], Objective("ce"))
    sums.loss.backward()
    assert sums.loss == 0 and features.grad.shape == (0, C)


def test_memory_does_not_grow_with_peers_or_positions():
    """Of logits, one chunk of one peer is alive at a time."""
    alive = []

    def project(x):
        assert sum(one() is not None for one in alive) <= 1, "another peer's logits are still held"
        assert len(x) <= 2, "more than a chunk"
        logits = x @ peer_weight.T
        alive.append(weakref.ref(logits))
        return logits

    features, weight, bias, target = tensors(0)
    peer_weight = tensors(1)[1]
    peers = [Peer(features, project) for _ in range(4)]
    for distance in DISTANCES:
        fused(features.requires_grad_(), weight, bias, target, peers, Objective(distance), chunk=2)
    assert len(alive) == len(DISTANCES) * 4 * 4


# In models.


@pytest.fixture(scope="module")
def setting(data):
    return Setting(data, CODISTILL)


def layers_of(setting):
    """What the loss would be fused with, for one peer; None for the whole path."""
    probe, teaching = setting.criterion()._probe, Teaching(1.0, [setting.peer])
    probe.try_out(setting.model, setting.sample, teaching)
    return probe.output_layers(setting.model, teaching)


def both_paths(setting, criterion, sample):
    """(loss, log, gradients) by the fused and by the whole path."""
    results = []
    for layers in (None, {setting.model: None}):
        if layers is not None:
            criterion._probe.layers.update(layers)
        setting.model.zero_grad()
        loss, _, log = criterion(setting.model, sample)
        loss.backward()
        results.append(
            (loss.detach(), log, {n: p.grad.clone() for n, p in setting.model.named_parameters() if p.grad is not None})
        )
    assert criterion._probe.layers[setting.model] is None
    return results


def check_equal(results):
    (loss, log, gradients), (slow_loss, slow_log, slow_gradients) = results
    torch.testing.assert_close(loss, slow_loss, rtol=1e-5, atol=1e-4)
    assert log.keys() == slow_log.keys() and gradients.keys() == slow_gradients.keys()
    for name in log:
        torch.testing.assert_close(
            torch.as_tensor(log[name]).float(), torch.as_tensor(slow_log[name]).float(), rtol=1e-5, atol=1e-4
        )
    for name in gradients:
        torch.testing.assert_close(gradients[name], slow_gradients[name], rtol=1e-4, atol=1e-4, msg=name)


TRANSFORMER = "--arch transformer --share-all-embeddings --encoder-layers 1 --decoder-layers 1"
LM = "--task language_modeling --sample-break-mode eos --tokens-per-sample 32"
FUSED_MODELS = {
    "transformer_lm": f"{LM} --arch transformer_lm --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-layers 1 "
    "--decoder-attention-heads 2",
    "lstm_lm": f"{LM} --arch lstm_lm --decoder-embed-dim 16 --decoder-hidden-size 16 --decoder-out-embed-dim 16",
    "lstm": "--arch lstm --encoder-embed-dim 16 --encoder-hidden-size 16 --decoder-embed-dim 16 --decoder-hidden-size 16 "
    "--decoder-out-embed-dim 16",
    "fconv": "--arch fconv_iwslt_de_en --encoder-embed-dim 16 --decoder-embed-dim 16 --decoder-out-embed-dim 16 "
    "--encoder-layers [(16,3)] --decoder-layers [(16,3)]",
}


@pytest.mark.parametrize(
    "choice", [dict(loss=d, aggregate=a) for d in DISTANCES for a in AGGREGATES] + [dict(loss="kl", temperature=2.0)]
)
def test_both_paths_are_one(setting, choice):
    sample = {**setting.sample, hook.TEACHING: Teaching(0.7, [setting.peer, copy.deepcopy(setting.model)], 2.0)}
    check_equal(both_paths(setting, setting.criterion(**choice), sample))


@pytest.mark.parametrize("name", FUSED_MODELS)
def test_both_paths_are_one_in(raw, data, tmp_path, name):
    if "language_modeling" in FUSED_MODELS[name]:
        data = preprocess(raw, tmp_path / "bin", "--only-source", suffix=".b")
    other = Setting(data, CODISTILL, model=FUSED_MODELS[name])
    criterion = other.criterion(loss="ce")
    results = both_paths(other, criterion, other.teach())
    check_equal(results)
    assert isinstance(layers_of(other)[0], nn.Linear)


def test_bf16_peers(setting):
    """The fused path casts what the peers' output layers give."""
    peer = copy.deepcopy(setting.peer).bfloat16()
    sample = {**setting.sample, hook.TEACHING: Teaching(1.0, [peer])}
    (loss, *_), (slow, *_) = both_paths(setting, setting.criterion(loss="ce"), sample)
    torch.testing.assert_close(loss, slow, rtol=1e-3, atol=1e-3)


def rank_gradients(rank, ranks, port, find_unused, data, pipe):
    """One rank under torch's DDP, fairseq's default: its gradients after each of STEPS, each from zero."""
    address = f"tcp://127.0.0.1:{port}"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    setting = Setting(data, CODISTILL)
    criterion = setting.criterion(loss="ce")
    wrapped = ModuleProxyWrapper(DistributedDataParallel(setting.model, find_unused_parameters=find_unused))
    steps = []
    for teaches, micro_batches in STEPS:
        setting.model.zero_grad()
        for number in range(micro_batches):
            last = number == micro_batches - 1
            with contextlib.nullcontext() if last else wrapped.no_sync():  # as fairseq does for --update-freq
                criterion(wrapped, rank_sample(setting, rank, ranks, teaches, number))[0].backward()
        steps.append({name: p.grad.numpy().copy() for name, p in setting.model.named_parameters() if p.grad is not None})
    assert criterion._probe.layers[wrapped] is setting.model.decoder.output_projection
    pipe.send(steps)
    torch.distributed.destroy_process_group()


# (taught or plain, micro-batches): as with --codistill-every, a late peer and --update-freq.
STEPS = [(False, 1), (True, 1), (True, 2), (False, 2), (True, 1)]


def rank_sample(setting, rank, ranks, teaches, number):
    sample = setting.dataset.collater(setting.items[rank::ranks][number:] or setting.items[rank::ranks])
    return setting.teach(sample) if teaches else sample


@pytest.mark.parametrize("ranks,find_unused", [(2, False), (2, True), (3, False)])
def test_torch_ddp_averages_the_gradients(data, setting, ranks, find_unused):
    """The loss is made inside the wrapped forward, so no parameter is taken for unused. (legacy_ddp: test_training.)"""
    if fairseq.__version__ == "0.12.2" and not find_unused:
        pytest.skip("stock fairseq has parameters that it does not use")
    port, jobs = free_port(), []
    for rank in range(ranks):
        fork = fork_server()
        reading, writing = fork.Pipe(duplex=False)
        jobs.append((fork.Process(target=rank_gradients, args=(rank, ranks, port, find_unused, data, writing)), reading))
        jobs[-1][0].start()
        writing.close()
    averaged = [reading.recv() for _, reading in jobs]  # EOFError if a rank has died
    for process, _ in jobs:
        process.join()
    for number, (teaches, micro_batches) in enumerate(STEPS):
        expected = []
        for rank in range(ranks):
            criterion = setting.criterion(loss="ce")
            criterion._probe.layers[setting.model] = None  # the general path
            setting.model.zero_grad()
            for part in range(micro_batches):
                criterion(setting.model, rank_sample(setting, rank, ranks, teaches, part))[0].backward()
            expected.append({name: p.grad.clone() for name, p in setting.model.named_parameters() if p.grad is not None})
        for name in expected[0]:
            mean = sum(gradients[name] for gradients in expected) / ranks
            for steps in averaged:
                mine = torch.from_numpy(steps[number][name])
                torch.testing.assert_close(mine, mean, rtol=1e-4, atol=1e-4, msg=f"{name}, step {number}")


# Where the output layer is.


class Model(nn.Module):
    """Some ways to make logits."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.body, self.out, self.drop = kind, nn.Linear(4, 6), nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x):
        hidden = self.drop(self.body(x)) + torch.rand(())  # whatever the mode
        logits = self.out(hidden)
        if self.kind == "twice":
            logits = self.out(logits)
        if self.kind == "changed":
            logits = logits * 2
        return (logits, {"attn": None}) if self.kind == "tuple" else logits


@pytest.mark.parametrize("kind,found", [("plain", True), ("tuple", True), ("twice", False), ("changed", False)])
def test_the_output_layer_is_what_makes_the_output(kind, found):
    model = Model(kind)
    model.drop.eval()  # a part of a model that somebody has frozen
    x, state = torch.randn(3, 4), torch.get_rng_state()
    layer = output_layer(model, {"x": x}, lambda *_: True)
    assert (layer is model.out) if found else (layer is None)
    assert output_layer(model, {"x": x}, lambda *_: False) is None
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    assert model.training and not model.drop.training
    assert not model.out._forward_hooks and "forward" not in vars(model.out)


def test_a_layer_is_replaced_only_meanwhile():
    layer = nn.Linear(2, 3)
    x = torch.randn(1, 2)
    with pytest.raises(KeyError), replaced(layer, lambda features: features):
        assert layer(x) is x
        raise KeyError
    assert layer(x).shape == (1, 3)


def test_tied_lstm_and_adaptive_softmax_take_the_general_path(raw, tmp_path):
    data = preprocess(raw, tmp_path / "bin", "--only-source", suffix=".b")
    for words in ("--arch lstm_lm --share-decoder-input-output-embed --decoder-embed-dim 16 --decoder-out-embed-dim 16",
                  "--arch transformer_lm --decoder-embed-dim 16 --adaptive-softmax-cutoff 10,20"):  # fmt: skip
        other = Setting(data, CODISTILL, model=f"{LM} {words}")
        assert layers_of(other) is None
        loss, _, log = other.criterion()(other.model, other.teach())
        assert loss.isfinite() and log["codistill_loss"] > 0


# Under autocast (--amp).


@pytest.fixture
def autocast(monkeypatch):
    """Autocast as CUDA's, on a CPU: linear layers in 16 bits, layer norms in float32 (which CPU's leaves as they are)."""
    layer_norm = F.layer_norm

    def in_float32(x, shape, weight=None, bias=None, eps=1e-5):
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(x, shape, weight, bias, eps)
        wide = [None if part is None else part.float() for part in (x, weight, bias)]
        return layer_norm(wide[0], shape, *wide[1:], eps)

    monkeypatch.setattr(F, "layer_norm", in_float32)
    return lambda enabled=True: torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


AUTOCAST = [(None, None), (torch.bfloat16, None), (torch.int8, None)]  # a CPU's autocast knows no fp16
AUTOCAST += [(None, FUSED_MODELS["lstm"]), (None, FUSED_MODELS["fconv"])]


@pytest.mark.parametrize("peer_dtype,model", AUTOCAST, ids=["fp32", "bf16 peer", "int8 peer", "lstm", "fconv"])
def test_both_paths_are_one_under_autocast(setting, data, autocast, peer_dtype, model):
    """Features come in another dtype than the layer's weight: 16 bits from a linear layer, float32 from a layer norm."""
    setting = Setting(data, CODISTILL, model=model) if model else setting
    dtypes, peer = [], replica(setting.peer, peer_dtype)
    sample = {**setting.sample, hook.TEACHING: Teaching(0.7, [peer], 2.0)}
    results = []
    for layers in ({}, {setting.model: None}):
        criterion = setting.criterion(loss="ce")
        criterion._probe.layers.update(layers)
        setting.model.zero_grad()
        with autocast():
            loss, _, log = criterion(setting.model, sample)
        loss.backward()
        dtypes.append({p.grad.dtype for p in setting.model.parameters() if p.grad is not None})
        gradients = {n: p.grad.clone() for n, p in setting.model.named_parameters() if p.grad is not None}
        results.append((float(loss.detach()), float(log["codistill_loss"]), gradients))
        assert (criterion._probe.layers[setting.model] is None) == bool(layers)
    assert dtypes == [{torch.float32}] * 2
    (loss, distance, gradients), (slow_loss, slow_distance, slow_gradients) = results
    assert loss == pytest.approx(slow_loss, rel=5e-3) and distance == pytest.approx(slow_distance, rel=5e-3)
    assert gradients.keys() == slow_gradients.keys()
    for name, slow in slow_gradients.items():
        assert (gradients[name] - slow).norm() <= 5e-2 * slow.norm() + 1e-2, name


def test_the_first_update_under_autocast_has_all_gradients(setting, autocast):
    """The search for the output layer runs the model without gradients: what autocast casts there must not be kept."""
    model, criterion = copy.deepcopy(setting.model), setting.criterion(loss="ce")
    with autocast():
        loss, _, _ = criterion(model, setting.teach())
    loss.backward()
    first = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    plain = copy.deepcopy(setting.model)
    with autocast():
        setting.criterion()(plain, setting.sample)[0].backward()
    assert first.keys() == {name for name, p in plain.named_parameters() if p.grad is not None}
    assert all(gradient.abs().sum() > 0 for name, gradient in first.items() if "k_proj.bias" not in name)


def test_autocast_is_off_while_the_output_layer_is_looked_for(autocast):
    """Or torch before 2.13 loses gradients: it keeps what it casts here, without a gradient, for the training forward."""
    seen = []

    class Watched(Model):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    with autocast():
        assert output_layer(Watched("plain"), {"x": torch.randn(2, 4)}, lambda *_: True) is not None
        assert torch.is_autocast_enabled("cpu") and seen == [False]


class AmpOptimizer(AMPOptimizer):
    """What fairseq's task asks of the optimizer of --amp."""

    def __init__(self):
        pass

    def backward(self, loss):
        loss.backward()


def test_fairseqs_step_under_amp(setting, autocast, monkeypatch):
    """Its autocast is CUDA's, so `--amp` on a CPU is idle: here it is this one."""
    monkeypatch.setattr(torch.cuda.amp, "autocast", autocast)
    model, criterion = copy.deepcopy(setting.model), setting.criterion(loss="ce")
    step = type(setting.task).train_step
    sample = {**setting.sample, hook.TEACHING: Teaching(1.0, [replica(setting.peer, torch.bfloat16)])}
    loss, _, log = step(setting.task, sample, model, criterion, AmpOptimizer(), 0)
    assert criterion._probe.layers[model] is model.decoder.output_projection and log["codistill_loss"] > 0
    plain, _, _ = criterion(setting.model, sample)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-2) and loss != plain
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("peer_dtype", [None, torch.bfloat16, torch.int8])
def test_autocast_on_a_gpu(setting, dtype, peer_dtype):
    criterion, model = setting.criterion(loss="ce"), copy.deepcopy(setting.model).cuda()
    peer = replica(copy.deepcopy(setting.peer).cuda(), peer_dtype)
    sample = move_to_cuda({**setting.sample})
    losses = []
    for layers in ({}, {model: None}):
        criterion._probe.layers = WeakKeyDictionary(layers)
        model.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss, _, _ = criterion(model, {**sample, hook.TEACHING: Teaching(0.7, [peer], 2.0)})
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_amp_trains_on_a_gpu(data, tmp_path):
    words = [train_words(data, tmp_path / f"{i}", LOCKSTEP, f"--max-update 6 --amp --seed {i + 1}") for i in range(2)]
    environments = [peer_environment(i, 2, tmp_path / "exchange") for i in range(2)]
    jobs = [Job([word for word in one if word != "--cpu"], env) for one, env in zip(words, environments)]
    assert all(len(taught(job.finish())) == 2 for job in jobs)
