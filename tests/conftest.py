import os
import signal
import sys

import pytest
import torch
from fairseq_runs import ROOT, preprocess, write_corpus
from warm import commands

# The files that take longest, the longest first: `make test` gives a whole file to a worker (their fixtures train), in this
# order, so that none of these begins when all else is done.
LONGEST = [
    "test_training", "test_recipes", "test_image_classification", "test_ending", "test_slurm", "test_demo", "test_launch",
    "test_image_recipes", "test_registration", "test_readme", "test_fused", "test_codistiller", "test_data_prep",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "raw"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def data(raw, tmp_path_factory):
    """A binarised translation corpus, a → b."""
    return preprocess(raw, tmp_path_factory.mktemp("bin"), "-s", "a", "-t", "b")


@pytest.fixture(scope="session")
def warm():
    """A folder for PATH, with stand-ins of fairseq's commands that need not import fairseq first."""
    with commands() as folder:
        yield folder


@pytest.fixture(scope="module")
def warm_scripts(warm):
    """Whatever a test of this module starts finds `warm` first on its PATH, and texts are binarised by it."""
    sys.path.insert(0, str(ROOT / "data_prep"))
    import parallel_text

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(warm), prepend=os.pathsep)
        patch.setattr(parallel_text, "PREPROCESS", ("fairseq-preprocess",))
        yield


torch.set_num_threads(1)  # each worker has a core

# A shell that starts the tests in the background makes them, and all that they start, deaf to SIGINT; some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
