"""What a training job writes to, listens on or names its run by, and how each peer gets its own.

`OPTIONS` and `ENVIRON` list what fairseq has of this kind. What is not here: `--aim-repo` and `--wandb-project` hold many
runs by design, and an AzureML run cannot be told apart by fairseq (see `notes`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Callable, Optional

from .command import FairseqCommand, absolute

PLASMA = "/tmp/plasma"  # fairseq's default socket
RUN_DIR = "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"  # hydra's default


def own_folder(path: str, index: int) -> str:
    return f"{path.rstrip('/') or '/'}/peer{index}"


def own_file(path: str, index: int) -> str:
    """`a/train.log` → `a/train.peer0.log`: in the same folder, since fairseq makes none."""
    root, end = os.path.splitext(path)
    return f"{root}.peer{index}{end}"


def own_port(text: str, index: int) -> str:
    """Neighbouring ports. Raises ValueError where there are not so many."""
    if not re.fullmatch(r"\d+", text) or not int(text):
        return text  # fairseq's -1: none
    if int(text) + index > 65535:
        raise ValueError(
            f"must leave a port below 65536 for each peer, but is {text}, and peer {index} needs {int(text) + index}."
        )
    return str(int(text) + index)


def own_address(url: str, index: int) -> str:
    """`tcp://host:port` with a port, `file:///path` with a file of one's own; `env://` is answered by `ENVIRON`."""
    if url.startswith("file://"):
        return own_file(url, index)
    head, colon, port = url.rpartition(":")
    return f"{head}:{own_port(port, index)}" if colon and port.isdigit() else url


def own_name(name: str, index: int) -> str:
    return f"{name}-peer{index}"


# option → how a peer gets its own of the value that is given. None: it is left out, and fairseq makes one of its own.
OPTIONS: Mapping[str, Optional[Callable[[str, int], str]]] = {
    "log-file": own_file,
    "tensorboard-logdir": own_folder,
    "results-path": own_folder,
    "plasma-path": own_file,
    "distributed-port": own_port,
    "distributed-init-method": own_address,
    "aim-run-hash": None,  # an existing run; without it fairseq looks for the run of this save directory, or begins one
}
# Environment variable → the same. Weights & Biases names a run by them, or continues it; torch listens at MASTER_PORT.
ENVIRON: Mapping[str, Callable[[str, int], str]] = {
    "WANDB_NAME": own_name,
    "WANDB_RUN_ID": own_name,
    "MASTER_PORT": own_port,
}
PATHS = ("log-file", "tensorboard-logdir", "results-path", "plasma-path")


def make_own(command: FairseqCommand, index: int) -> None:
    """Give peer `index` its own of everything in `OPTIONS`. Raises ValueError, which names the option."""
    for option, own in OPTIONS.items():
        value = _value(command, option)
        if value is None:
            continue
        if own is None:
            command.drop(option, "null")
            continue
        try:
            of_peer = own(value, index)
        except ValueError as error:
            raise ValueError(f"{command.spelling(option)} {error}") from error
        if of_peer != value:
            command.put(option, absolute(of_peer) if command.is_hydra and option in PATHS else of_peer)


def _value(command: FairseqCommand, option: str) -> Optional[str]:
    if option == "plasma-path":
        return (command.get(option) or PLASMA) if command.flag("use-plasma-view") else None
    return command.get(option)


def own_environ(command: FairseqCommand, index: int, save_dir: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What of the environment must differ between peers. Raises ValueError, which names the variable."""
    given = {name: environ[name] for name in ENVIRON if environ.get(name)}
    if command.get("wandb-project") is not None:
        # fairseq would take the last part of the save directory, and that is peer0 in every run.
        given.setdefault("WANDB_NAME", os.path.basename(os.path.abspath(save_dir)))
    try:
        return {name: ENVIRON[name](value, index) for name, value in given.items()}
    except ValueError as error:
        raise ValueError(f"MASTER_PORT {error}") from error


def make_own_hydra_folder(command: FairseqCommand, index: int) -> None:
    """Hydra's folder of a job, named by the second in which it starts: its working directory, its log and its YAML."""
    folder = command.copy().pop("run.dir") or command.config.raw("hydra.run.dir") or RUN_DIR
    if os.path.normpath(folder) != ".":
        command.put("run.dir", own_folder(folder, index))
        return
    # The command stays in the folder where it was started, as it wants, so that what it names by relative paths is found.
    subdir = command.get("output-subdir")
    if subdir:
        command.put("output-subdir", own_folder(subdir, index))
    command.put("job.name", f"{command.get('job.name') or 'hydra_train'}.peer{index}")


def notes(command: FairseqCommand, environ: Mapping[str, str], peers: int) -> list[str]:
    """What is not as the command says, in sentences for the user."""
    if peers == 1:
        return []
    said = []
    for option, own in OPTIONS.items():
        value = _value(command, option)
        if value is not None and own is None:
            said.append(f"{command.spelling(option)} would be shared, so it is left out: each peer gets one of its own.")
        elif value is not None and own is not None:
            said += _shared(command.spelling(option), value, own)
    for name, own_value in ENVIRON.items():
        said += _shared(name, environ.get(name, ""), own_value)
    if command.flag("azureml-logging"):
        said.append(f"{command.spelling('azureml-logging')}: all peers of one AzureML job log to one run, so curves mix.")
    return said


def _shared(name: str, value: str, own: Callable[[str, int], str]) -> list[str]:
    first, second = own(value, 0), own(value, 1)
    return [f"{name} {value} would be shared: peers get {first}, {second} …"] if value and first != second else []
