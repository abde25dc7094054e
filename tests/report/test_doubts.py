"""Lines that say which numbers not to believe."""

from __future__ import annotations

from nas.report.doubts import collapsed, guessing, listed, masking


def test_who_only_guesses_is_named_and_who_knows_something_is_not() -> None:
    # 10 classes, 300 images: 36 right are within chance of guessing, 60 are not.
    (line,) = guessing({"constant": 0.103, "poor": 0.12, "learns": 0.2, "good": 0.9}, 300, 10)
    assert line.startswith("No better than guessing among 10 classes: constant and poor.")
    assert "learning rate" in line
    # With fewer images 20 % are no evidence any more.
    assert "learns" in guessing({"learns": 0.2}, 20, 10)[0]
    assert guessing({"good": 0.9}, 300, 10) == [] == guessing({}, 300, 10)
    # Below chance is no knowledge either.
    assert "worse" in guessing({"worse": 0.0}, 300, 10)[0]


def test_networks_that_failed_the_same_checks_stand_together() -> None:
    (line,) = masking({"a": ["steps"], "b": ["steps", "noise"], "c": ["steps"]})
    assert line.endswith("overstated: a and c (steps); b (steps, noise).")
    assert masking({}) == []


def test_a_search_is_judged_by_its_last_epoch() -> None:
    begun = {"parameter_free_edges": {"accurate": [8, 8], "robust": [0, 8]}}
    ended = {"parameter_free_edges": {"accurate": [5, 8], "reduction": [6, 8], "robust": [8, 8]}}
    (line,) = collapsed([begun, ended])
    assert (
        "collapsed: 6 of 8 edges of the reduction cell and 8 of 8 edges of the robust cell are skips or pools" in line
    )
    assert "learning rate" in line
    assert collapsed([ended, {"parameter_free_edges": {"accurate": [5, 8]}}]) == collapsed([]) == collapsed([{}]) == []


def test_lists_in_words() -> None:
    assert [listed("a"), listed("ab"), listed("abc")] == ["a", "a and b", "a, b and c"]
    assert listed("abcdef") == "a, b, c, d, e and f" and listed("abcdefg") == "a, b, c and 4 others"
