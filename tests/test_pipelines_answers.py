"""Answers of a first pass: kept for the same question, gone when done, refused in one sentence."""

import pytest

from pipelines.answers import Answer, Answers
from schemas.errors import StorageError


class Sum(Answer):
    total: int


@pytest.fixture
def answers(tmp_path) -> Answers[Sum]:
    return Answers(str(tmp_path / "store"), "sums/", Sum)


def test_answers_to_the_same_question_are_kept(answers, tmp_path):
    assert answers.get({0: "a", 1: "b"}) == {}
    for index, run in enumerate("abc"):
        answers.put(index, Sum(run=run, total=index))
    again = Answers(str(tmp_path / "store"), "sums/", Sum)
    assert again.count() == 3
    # Of piece 1 another question is asked now, and piece 3 was never answered.
    found = again.get({0: "a", 1: "z", 3: "d"})
    assert found == {0: Sum(run="a", total=0)}
    answers.put(1, Sum(run="z", total=9))
    assert again.get({1: "z"}) == {1: Sum(run="z", total=9)}


def test_answers_are_taken_away_and_others_are_not(answers, tmp_path):
    others = Answers(str(tmp_path / "store"), "others/", Sum)
    for kept in (answers, others):
        kept.put(7, Sum(run="a", total=1))
    answers.forget()
    assert (answers.count(), others.count()) == (0, 1)


def test_what_cannot_be_written_is_one_sentence(answers, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/sums").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="must be readable and writable") as error:
        answers.put(0, Sum(run="a", total=0))
    assert "\n" not in str(error.value)
