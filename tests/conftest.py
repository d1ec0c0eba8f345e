import signal

import pytest
from fairseq_runs import preprocess, write_corpus


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "raw"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def data(raw, tmp_path_factory):
    """A binarised translation corpus, a → b."""
    return preprocess(raw, tmp_path_factory.mktemp("bin"), "-s", "a", "-t", "b")


# A shell that starts the tests in the background makes them, and all that they start, deaf to SIGINT; some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
