"""Image classifiers: every --arch, the small forms, and how they start."""

import sys
from argparse import Namespace

import pytest
import torch
from fairseq import options
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from torch import nn

from fairseq_codistill import compat
from fairseq_codistill.image import models as image_models
from fairseq_codistill.image.models import (
    SMALL_DEPTHS,
    TORCHVISION_ARCHS,
    ImageClassifier,
    ImageClassifierConfig,
    build_network,
)


def network(name, channels=3, classes=10, **choices):
    return build_network(ImageClassifierConfig(image_model=name, **choices), channels, classes)


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),  # He et al. 2016, Table 6, for 10 classes: 0.27 M, 0.46 M, 0.85 M; their shortcuts have no weights
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85), ("resnet110", 1.7)],
)
def test_the_small_networks_have_the_papers_size(name, millions):
    assert parameters(network(name)) / 1e6 == pytest.approx(millions, abs=0.035)


@pytest.mark.parametrize("name", SMALL_DEPTHS)
def test_the_small_networks_have_their_depth(name):
    convolutions = [m for m in network(name).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == SMALL_DEPTHS[name], "and a linear layer"


@pytest.mark.parametrize(("name", "size"), [("resnet8", 8), ("resnet20", 32), ("resnet18", 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits(name, size, channels):
    model = ImageClassifier(ImageClassifierConfig(image_model=name), network(name, channels, 7))
    logits = model(image=torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    torch.testing.assert_close(model.get_normalized_probs(logits, log_probs=True), logits.log_softmax(-1))


def test_resnet50_is_torchvisions():
    torchvision = compat.load_torchvision()
    torch.manual_seed(1)
    own = network("resnet50", classes=1000, image_plain_init=True)
    torch.manual_seed(1)
    theirs = torchvision.models.resnet50(weights=None)
    assert own.state_dict().keys() == theirs.state_dict().keys() and parameters(own) == 25_557_032
    assert all(map(torch.equal, own.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize(("name", "last"), [("resnet8", "bn2"), ("resnet18", "bn2"), ("resnet50", "bn3")])
@pytest.mark.parametrize("plain", [False, True])
def test_goyals_start(name, last, plain):
    net = network(name, image_plain_init=plain)
    blocks = [m for m in net.modules() if hasattr(m, "conv2")]
    assert len(blocks) == {"resnet8": 3, "resnet18": 8, "resnet50": 16}[name]
    assert all((getattr(block, last).weight == (1 if plain else 0)).all() for block in blocks)
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)][0]
    if not plain:
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.15) and not linear.bias.any()
        block = blocks[0]
        block.eval()
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        shortcut = block.downsample(x) if block.downsample else x
        torch.testing.assert_close(block(x), shortcut.relu())


def test_the_small_stem_keeps_the_resolution():
    net = network("resnet18", image_stem="small")
    assert net.conv1(torch.zeros(1, 3, 32, 32)).shape[-2:] == (32, 32) and net.conv1.bias is None
    assert net.layer1(net.maxpool(torch.zeros(1, 64, 32, 32))).shape[-1] == 32
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_any_classifier_of_torchvision_by_name():
    model = ImageClassifier(ImageClassifierConfig(image_model="squeezenet1_1"), network("squeezenet1_1", 1, 5))
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 5)
    wide = network("wide_resnet50_2", classes=3)
    assert wide.fc.out_features == 3 and (wide.layer1[0].bn3.weight == 0).all()


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("resnet19", {}, "image_model must be one of resnet8, .*vgg16.*but is resnet19 instead"),
        ("fasterrcnn_resnet50_fpn", {}, "image_model must be one of"),
        (None, {}, "did you forget --image-model"),
        ("squeezenet1_1", dict(image_stem="small"), "image_stem small must go with a residual network"),
        ("resnet8", dict(image_width=0), "image_width must be at least 1, but is 0"),
    ],
)
def test_one_sentence_for_each_mistake(name, choices, words):
    with pytest.raises(ValueError, match=words):
        network(name, **choices)


@pytest.mark.parametrize("arch", [*TORCHVISION_ARCHS, *SMALL_DEPTHS])
def test_each_arch_is_registered_and_chooses_its_network(arch):
    assert ARCH_MODEL_REGISTRY[arch] is ImageClassifier
    args = Namespace()
    ARCH_CONFIG_REGISTRY[arch](args)
    assert args.image_model == arch
    with pytest.raises(ValueError, match=f"must be left out with --arch {arch}, but is vgg11"):
        ARCH_CONFIG_REGISTRY[arch](Namespace(image_model="vgg11"))


def test_a_text_task_has_no_classes():
    with pytest.raises(ValueError, match="need --task image_classification; did you forget it"):
        ImageClassifier.build_model(Namespace(image_model="resnet8"), Namespace())


def test_options_collide_with_none_of_fairseqs():
    """fairseq has one flat namespace and swallows collisions: a second option of a name is a conflict here."""
    words = [
        "--task",
        "image_classification",
        "--arch",
        "resnet8",
        "--criterion",
        "codistill_ce",
        "--optimizer",
        "sgd_nesterov",
    ]
    for scheduler in ("multistep", "cosine_he"):
        parser = options.get_training_parser()
        common = {name for action in parser._actions for name in action.option_strings}
        args = options.parse_args_and_arch(parser, ["data", *words, "--lr-scheduler", scheduler])
        assert args.image_model == "resnet8" and args.momentum == 0.9
        ours = [name for action in parser._actions for name in action.option_strings if name not in common]
        assert "--augmentation" in ours and len(ours) == len(set(ours))


# --- torchvision beside this torch --------------------------------------------------------------------------------------


def test_torchvision_loads_and_is_itself():
    torchvision = compat.load_torchvision()
    assert torchvision is sys.modules["torchvision"] is compat.load_torchvision()
    from torchvision.transforms import RandomResizedCrop

    assert RandomResizedCrop(4)(torch.zeros(3, 9, 9)).shape == (3, 4, 4)


def test_torchvision_missing_is_one_sentence(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ValueError, match=r"need torchvision.*did you forget pip install 'fairseq-codistill\[image\]'"):
        network("resnet18")


def test_a_torchvision_of_another_torch_is_one_sentence(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::roi_align does not exist")

    monkeypatch.setattr(compat.importlib, "import_module", broken)
    with pytest.raises(ValueError, match="roi_align does not exist; did you forget to install the version of torchvision"):
        compat.load_torchvision()


def test_archs_do_not_name_what_fairseq_has():
    """A second registration of a name raises, and would take all of the plugin with it."""
    owners = {ARCH_MODEL_REGISTRY[arch] for arch in (*TORCHVISION_ARCHS, *SMALL_DEPTHS)}
    assert owners == {image_models.ImageClassifier}
