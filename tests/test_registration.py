"""We register with fairseq whoever imports whom, in whichever order; and the package alone imports nothing heavy.

Most of it is tried on a small package that has our `registration`, and on a fairseq of a few lines, since the real one costs
four seconds in each process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq_runs import MODEL, PLUGIN, ROOT, TRAINING, Job, column, fork_server

REGISTERED = """
from fairseq import criterions, models, optim, tasks
from fairseq.optim import lr_scheduler

assert "codistill_ce" in criterions.CRITERION_REGISTRY, "criterion"
assert "image_classification" in tasks.TASK_REGISTRY, "task"
assert "image_classifier" in models.MODEL_REGISTRY and "resnet18" in models.ARCH_MODEL_REGISTRY, "models"
assert {"multistep", "cosine_he"} <= set(lr_scheduler.LR_SCHEDULER_REGISTRY), "schedules"
assert "sgd_nesterov" in optim.OPTIMIZER_REGISTRY, "optimizer"
"""


def python(*words: object, path=(), cwd=None, status: int = 0) -> str:
    """What this interpreter prints when started with `words`; `path` is where it looks for packages first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=cwd, timeout=120,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def write(folder: Path, **files: str) -> None:
    """Modules of a package; `__` in a name stands for a folder."""
    for name, text in files.items():
        target = folder / (name.replace("__", "/") + ".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


# ------------------------------------------------------------------------------------- the mechanism, on small packages


@pytest.fixture
def small(tmp_path):
    """A folder with `ours`, which has our registration, and a `fairseq` whose tasks are the last of what we need."""
    (tmp_path / "ours").mkdir()
    shutil.copy(PLUGIN / "registration.py", tmp_path / "ours")
    write(
        tmp_path / "ours",
        init="from .registration import register_with_fairseq\nregister_with_fairseq()\n",
        plugin="from . import criterion, options\nimport fairseq\nfairseq.known.append(options.NAME)\n",
        criterion="from fairseq.criterions import register\nfrom . import options\nregister(options.NAME)\n",
        options="from fairseq import tasks\nNAME = 'ours' + tasks.END\n",
        equations="",
    )
    write(
        tmp_path / "fairseq",
        init="known = []\nfrom . import criterions\nfrom . import models, optim, tasks\nfrom . import benchmark\n",
        criterions="registered = []\nregister = registered.append\n",
        models="",
        optim__init="from . import lr_scheduler\n",
        optim__lr_scheduler="",
        tasks="END = '!'\n",
        benchmark="",
    )
    for package in ("ours", "fairseq", "fairseq/optim"):
        (tmp_path / package / "init.py").rename(tmp_path / package / "__init__.py")
    return tmp_path


ONCE = """
import sys, fairseq
assert fairseq.known == fairseq.criterions.registered == ["ours!"], (fairseq.known, fairseq.criterions.registered)
assert not any(type(finder).__module__ == "ours.registration" for finder in sys.meta_path), "the finder has not gone"
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import ours, ours.equations\nassert 'fairseq' not in sys.modules\nimport fairseq",
        "import fairseq, ours",
        "import ours.equations, fairseq.tasks",
        "from ours import options",  # brings fairseq while `options`, which the plugin needs, is half there
        "from ours import criterion",
        "from ours import plugin",
        "import ours, importlib; importlib.reload(ours); import fairseq; importlib.reload(ours)",
    ],
)  # fmt: skip
def test_registered_once_in_every_order(small, imports):
    python("-c", f"import sys\n{imports}\n{ONCE}", path=[small])


@pytest.mark.parametrize("module", ["criterions", "models", "optim/lr_scheduler", "tasks", "benchmark", "__init__"])
def test_a_fork_that_imports_us_itself(small, module):
    file = small / "fairseq" / f"{module}.py"
    file.write_text(f"known = []\nimport ours\n{file.read_text().replace('known = []', '')}")
    python("-c", ONCE, path=[small])


def test_many_threads_import_both(small):
    code = f"""
import importlib, sys, threading
sys.setswitchinterval(1e-6)
errors, start = [], threading.Barrier(6)
def load(name):
    start.wait()
    try:
        importlib.import_module(name)
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=load, args=(name,)) for name in ["ours", "fairseq"] * 3]
[thread.start() for thread in threads]; [thread.join(20) for thread in threads]
assert not errors and not any(thread.is_alive() for thread in threads), errors
{ONCE}"""
    for _ in range(4):
        python("-c", code, path=[small])


@pytest.mark.parametrize("order", ["ours, fairseq", "fairseq, ours"])
def test_what_is_wrong_with_us_is_said_plainly_and_again(small, order):
    write(small / "ours", criterion="import a_library_that_is_missing\n")
    code = f"""
for attempt in range(2):
    try:
        import {order}
    except ModuleNotFoundError as error:
        assert error.name == "a_library_that_is_missing"
    else:
        raise SystemExit("swallowed")
"""
    python("-c", code, path=[small])


def test_modules_keep_their_own_loaders_and_another_hook_may_ask_us(small):
    code = """
import importlib.util, sys, ours
class Asks:  # as wrapt and its like do it
    asking = False
    def find_spec(self, name, path=None, target=None):
        if self.asking:
            return None
        self.asking = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.asking = False
sys.meta_path.insert(0, Asks()), sys.meta_path.append(Asks())
assert b"known" in importlib.util.find_spec("fairseq").loader.get_data(importlib.util.find_spec("fairseq").origin)
import fairseq.tasks, ours.criterion
for module in (fairseq, fairseq.tasks, ours.criterion):
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
"""
    python("-c", code + ONCE, path=[small])


def test_dash_m_and_its_spawned_and_forkserver_children(small):
    """As fairseq starts its ranks: a child imports the main module again, and finds the criterion."""
    write(small / "own", train=f"""
import multiprocessing
def check():
    {"; ".join(ONCE.strip().splitlines())}
if __name__ == "__main__":
    check()
    for method in ("spawn", "forkserver"):
        child = multiprocessing.get_context(method).Process(target=check)
        child.start(); child.join(60)
        assert child.exitcode == 0, method
    print("all three")
""")  # fmt: skip
    (small / "own/__init__.py").write_text("import ours\n")
    assert python("-m", "own.train", path=[small]) == "all three\n"


# ------------------------------------------------------------------------------------------------------- the real fairseq


def test_the_package_alone_is_light_and_registers_when_fairseq_comes():
    heavy = "assert not {'torch', 'fairseq', 'numpy'} & set(sys.modules)"
    code = f"import sys, fairseq_codistill\nimport fairseq_codistill.launch.main, fairseq_codistill.report.main\n{heavy}\n"
    # `compat` brings fairseq with it, before it is whole itself.
    code += f"from fairseq_codistill import compat\n{REGISTERED}\nimport numpy, torch\nassert numpy.compat.long is int\n"
    code += "if hasattr(torch.serialization, 'get_safe_globals'):\n"
    code += "    assert fairseq.data.Dictionary in torch.serialization.get_safe_globals()\n"
    python("-c", code.replace("import numpy, torch", "import fairseq, numpy, torch"), path=[ROOT])
    shown = python("-X", "importtime", "-m", "fairseq_codistill.launch", "--help", path=[ROOT])
    assert "--max-restarts" in shown and "fairseq_codistill.launch.plan" in shown
    assert not [line for line in shown.splitlines() if line.split("|")[-1].strip() in ("torch", "fairseq", "numpy")]


def _fairseq_first(path: Path, code: str) -> None:
    """In a process that has imported fairseq, and not us."""
    assert "fairseq" in sys.modules and "fairseq_codistill" not in sys.modules
    import fairseq_codistill  # noqa: F401

    exec(code, {})
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu

    assert load_checkpoint_to_cpu(str(path))["model"]


def test_fairseq_first_then_its_checkpoints_load(data, tmp_path):
    """And a package of one's own, which imports us, is a --user-dir."""
    write(tmp_path / "own_plugin", x="")
    (tmp_path / "own_plugin/__init__.py").write_text("import fairseq_codistill\n")
    words = ["fairseq-train", data, "--save-dir", tmp_path / "run", *MODEL.split(), *TRAINING.split()]
    words += f"--criterion codistill_ce --max-update 2 --user-dir {tmp_path}/own_plugin".split()
    log = Job([str(word) for word in words], {"PYTHONPATH": str(ROOT)}).finish()
    assert column(log, "train_inner", "num_updates") == [1, 2]
    process = fork_server().Process(target=_fairseq_first, args=(tmp_path / "run/checkpoint_last.pt", REGISTERED))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_the_commands_user_dir_stands_alone(capsys):
    from fairseq_codistill.launch.main import main

    assert main(["--user-dir"]) == 0 and capsys.readouterr().out == f"{PLUGIN}\n"
    assert main(["--user-dir", "--peers", "2", "--", "true"]) == 2
    assert "--user-dir stands alone" in capsys.readouterr().err
