import os
import signal
import sys

import pytest
from fairseq_runs import ROOT, preprocess, write_corpus
from warm import commands


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


# A shell that starts the tests in the background makes them, and all that they start, deaf to SIGINT; some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
