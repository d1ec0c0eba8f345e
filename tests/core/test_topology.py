import pytest

from fairseq_codistill.core.topology import edges_of, learners_of, teachers_of


def test_all_and_ring():
    assert edges_of("all", 3) == {(1, 0), (2, 0), (0, 1), (2, 1), (0, 2), (1, 2)}
    assert edges_of("ring", 4) == {(3, 0), (0, 1), (1, 2), (2, 3)}
    assert edges_of("ring", 2) == edges_of("all", 2)
    assert edges_of("all", 1) == edges_of("ring", 1) == set()


def test_who_teaches_and_who_learns():
    edges = {(0, 1), (2, 1), (1, 0), (1, 2)}
    assert teachers_of(1, edges) == [0, 2] and learners_of(1, edges) == [0, 2]
    assert teachers_of(0, edges) == [1]


def test_a_file_of_edges(tmp_path):
    path = tmp_path / "edges"
    path.write_text("# a star: TEACHER LEARNER\n0 1\n0 2   # the hub teaches both\n\n1 0\n")
    assert edges_of(str(path), 3) == {(0, 1), (0, 2), (1, 0)}


BAD = {
    "0 1\n1 1\n": "line 2 is a self edge",
    "0 1\n": "no edge to peer 0",
    "0 1\n1 0\n0 5\n": "line 3 names peer 5, but with 2 peers the indices are 0 … 1",
    "0 1 2\n": "must be 'TEACHER LEARNER'",
    "0 -1\n": "must be 'TEACHER LEARNER'",
    "zero one\n": "'zero one'",
}


@pytest.mark.parametrize("text, sentence", BAD.items())
def test_a_bad_file_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "edges"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as error:
        edges_of(str(path), 2)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="'rign' is none of these"):
        edges_of("rign", 2)
