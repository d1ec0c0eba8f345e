"""--codistill-when-stalled, in real fairseq processes, and what it keeps for a resume."""

import json
import pickle

import pytest
from fairseq_runs import LOCKSTEP, rows, same, start_group, train, train_peers, weights

from fairseq_codistill.stalled import FILE, History
from fairseq_codistill.wrapping import wrap

VALIDATE = "--dropout 0.2 --validate-interval-updates 2 --save-interval-updates 2 --validate-interval 99 --save-interval 99"


def taught_updates(log):
    return [int(row["num_updates"]) for row in rows(log, "train_inner") if "codistill_loss" in row]


def test_a_run_that_never_stalls_is_alone_to_the_bit(data, tmp_path):
    options = f"--max-update 8 {VALIDATE}"
    alone = train(data, tmp_path / "alone", "--criterion cross_entropy", options)
    logs = train_peers(data, tmp_path, LOCKSTEP, options, "--codistill-when-stalled 4")
    assert "learning from peer 1" in logs[0], "snapshots are exchanged; they only do not teach"
    assert taught_updates(logs[0]) == []
    assert [row["valid_loss"] for row in rows(logs[0], "valid")] == [row["valid_loss"] for row in rows(alone, "valid")]
    last = "checkpoint_last.pt"
    assert same(weights(tmp_path / "peer0" / last), weights(tmp_path / "alone" / last))
    kept = [json.loads(line) for line in (tmp_path / "peer0" / FILE).read_text().splitlines()]
    assert [row["update"] for row in kept] == [2, 4, 6, 8]
    assert [row["valid_loss"] for row in kept] == [row["valid_loss"] for row in rows(alone, "valid")]


def test_it_teaches_from_the_stall_on_and_counts_on_after_a_resume(data, tmp_path):
    """In a group of two ranks. With a step of length 0 no validation after the first improves: with patience 3 the fourth,
    after update 8, is the last before the teaching."""
    options = f"--criterion codistill_ce --codistill-loss uniform --codistill-when-stalled 3 --lr 0 {VALIDATE}"
    logs = [job.finish() for job in start_group(data, tmp_path, options, "--max-update 4")]
    assert taught_updates(logs[0]) == []
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text() + json.dumps({"update": 6, "valid_loss": 0.1}) + "\n")
    logs = [job.finish() for job in start_group(data, tmp_path, options, "--max-update 10")]
    assert taught_updates(logs[0]) == [9, 10], "and the loss of an update that was lost does not count"
    assert "at update 8 the validation loss had not improved" in logs[0]
    logs = [job.finish() for job in start_group(data, tmp_path, options, "--max-update 12")]
    assert taught_updates(logs[0]) == [11, 12] and "at update 8 the" in logs[0]


def test_what_is_kept_is_that_of_this_life(tmp_path, caplog):
    history = History(tmp_path / FILE)
    history.read(0)
    assert [history.add(*row) for row in [(2, 5.0), (2, 9.0), (4, 4.0), (4, 9.0), (6, 4.5)]] == [True, False, True, False, True]
    for update, expected in ((6, [(2, 5.0), (4, 4.0), (6, 4.5)]), (5, [(2, 5.0), (4, 4.0)]), (6, [(2, 5.0), (4, 4.0)])):
        again = History(tmp_path / FILE)
        again.read(update)
        assert again.losses == expected
    assert not caplog.messages
    (tmp_path / FILE).write_text("{no JSON")
    again.read(7)
    assert again.losses == [] and "cannot be read" in caplog.text and "has no validation before update 7" in caplog.text
    nowhere = History(tmp_path / "none" / FILE)
    nowhere.read(0)
    assert nowhere.add(2, 5.0) and "cannot be written" in caplog.text


class Task:
    pass


def test_a_method_that_the_task_does_not_have_can_be_wrapped_and_pickled():
    task, calls = Task(), []
    wrap(task, "post_validate", lambda inner, *args: calls.append((inner(*args), args)))
    task.post_validate(1, 2)
    assert calls == [(None, (1, 2))]
    assert pickle.loads(pickle.dumps(task)).post_validate(1, 2) is None and len(calls) == 1


def test_an_older_fairseq_is_refused(monkeypatch):
    from fairseq_cli import train as fairseq_train

    from fairseq_codistill.stalled import teach_when_stalled

    monkeypatch.setattr(fairseq_train, "validate", lambda cfg: None)
    with pytest.raises(ValueError, match="codistill_when_stalled needs a fairseq that tells its task of validations"):
        teach_when_stalled(Task(), None, 1, "x")
