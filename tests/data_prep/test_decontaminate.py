"""Evaluation text in training text."""

from lightbulb.data_prep.decontaminate import Contamination

QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def test_share_of_runs_that_are_known() -> None:
    known = Contamination([QUESTION, "short one"], 8)
    inside = "Here it comes: " + QUESTION.upper().replace(",", "") + " And an answer follows."
    shares = known.share(
        [QUESTION, inside, "nothing of that kind stands in here at all, not a word", "Short, one.", ""]
    )
    assert shares[0] == 1 and 0.5 < shares[1] < 1
    assert shares[2:].tolist() == [0, 1, 0]


def test_fewer_shared_words_than_a_run_do_not_count() -> None:
    words = QUESTION.split()
    known = Contamination([QUESTION], 8)
    assert known.share([" ".join(words[:7]) + " or not, who knows that today"])[0] == 0
    assert known.share([" ".join(words[:8]) + " or not, who knows that today"])[0] > 0


def test_nothing_known() -> None:
    assert Contamination([], 13).share(["a b", ""]).tolist() == [0, 0]
