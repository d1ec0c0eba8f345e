"""--codistill-publish-ema: what goes out is what fairseq averages, and training itself is untouched."""

import pytest
import torch
from fairseq_runs import (
    CODISTILL,
    LOCKSTEP,
    PLUGIN,
    Job,
    checkpoint,
    peer_environment,
    same,
    taught,
    train,
    train_peers,
    train_words,
    weights,
)
from safetensors.torch import load_file

from fairseq_codistill.ema import publish_ema

EMA = "--store-ema --ema-decay 0.5"


def published(folder, update):
    return load_file(folder / f"peer0/u{update:09d}.safetensors")


def test_the_averaged_weights_go_out(data, tmp_path):
    """Also with the last update; and after a resume those that the checkpoint holds, to the bit."""
    options = (CODISTILL, EMA, "--codistill-publish-ema --codistill-wire-dtype fp32 --dropout 0.2")
    environment = peer_environment(0, 2, tmp_path / "exchange")
    for updates in (6, 10):
        Job(train_words(data, tmp_path / "out", *options, f"--max-update {updates}"), environment).finish()
        state = checkpoint(tmp_path / "out/checkpoint_last.pt")
        out = published(tmp_path / "exchange", updates)
        averaged, trained = state["extra_state"]["ema"], state["model"]
        assert all(torch.equal(value, averaged[name]) for name, value in out.items()) and len(out) > 20
        assert not any(torch.equal(value, trained[name]) for name, value in out.items() if name.endswith("fc1.weight"))
        train(data, tmp_path / "alone", f"--criterion cross_entropy --user-dir {PLUGIN} --dropout 0.2 --max-update {updates}")
        assert same(trained, weights(tmp_path / "alone/checkpoint_last.pt")), "a peer that nobody teaches trains as ever"


def test_peers_learn_from_them(data, tmp_path):
    logs = train_peers(data, tmp_path, LOCKSTEP, EMA, "--codistill-publish-ema --max-update 8")
    assert all(len(taught(log)) == 4 for log in logs)


class Task:
    uses_ema = False

    def train_step(self, sample, **kwargs):
        return sorted(kwargs)

    valid_step = train_step


class Owner:
    published = None


@pytest.mark.parametrize("uses", [False, True])
def test_only_a_task_that_asks_for_it_gets_the_averaged_model(uses):
    task, owner = Task(), Owner()
    task.uses_ema = uses
    publish_ema(task, owner)
    assert task.uses_ema
    assert task.train_step({}, update_num=1, ema_model="averaged") == (["ema_model"] if uses else []) + ["update_num"]
    assert task.valid_step({}, ema_model="averaged") == (["ema_model"] if uses else [])
    assert owner.published == "averaged"
    assert task.train_step({}, update_num=1) == ["update_num"] and owner.published == "averaged", "the re-run after a NaN"
    owner.published = None
    with pytest.raises(ValueError, match="codistill_publish_ema needs a fairseq whose trainer gives ema_model"):
        task.train_step({}, update_num=2)
