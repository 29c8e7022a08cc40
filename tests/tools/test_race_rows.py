"""Rows of a diagram: their order depends on causes, there are never too many, and they are drawn at their places."""

from __future__ import annotations

import random
from xml.etree import ElementTree

from tools.race_picture import picture_of
from tools.race_rows import Diagram, Kind, Row, cut, equal_threads, folded, told_order
from tools.race_text import draw


def step(t_ns: int, text: str = "1. offer") -> Row:
    """A step of the director's."""
    return Row(Kind.STEP, text, t_ns)


def does(t_ns: int, actor: str, text: str, weight: int = 1) -> Row:
    """Something that an actor did."""
    return Row(Kind.DOES, text, t_ns, actor, weight=weight)


def sends(t_ns: int, actor: str, to: str, to_ns: int, text: str = "message") -> Row:
    """Something that went from one to another."""
    return Row(Kind.SENDS, text, t_ns, actor, to, to_ns, 1)


def test_what_is_concurrent_has_one_order() -> None:
    """Whoever was first by chance: the same words come in the same order, and a message is followed where it goes."""
    first = [sends(1, "host", "vcpu0", 2), does(3, "host", "looks"), does(4, "vcpu0", "reads")]
    second = [sends(1, "host", "vcpu0", 2), does(3, "vcpu0", "reads"), does(4, "host", "looks")]

    told = [[row.words for row in told_order(rows)] for rows in (first, second)]
    assert told == [["message", "reads", "looks"]] * 2


def test_a_lifeline_keeps_its_own_order() -> None:
    """Whatever the order in which rows are given: what one actor did is told as it did it, between the same steps."""
    rows = [step(0), does(1, "b", "one"), does(2, "a", "x"), does(3, "b", "two"), step(4, "2."), does(5, "a", "y")]
    for seed in range(20):
        shuffled = random.Random(seed).sample(rows, len(rows))
        told = [row.text for row in told_order(shuffled)]

        assert told == ["1. offer", "x", "one", "two", "2.", "y"], f"seed {seed}"


def test_messages_that_cross_are_told_all_the_same() -> None:
    """Each is the second thing in the life of who takes it; nobody waits for an order that there is not."""
    rows = [sends(1, "host", "vcpu0", 4, "down"), sends(2, "vcpu0", "host", 3, "up")]

    assert sorted(row.text for row in told_order(rows)) == ["down", "up"]


def test_repetitions_are_counted() -> None:
    """Rows like the one before them are one row; steps never are."""
    rows = folded([does(1, "a", "tries"), does(2, "a", "tries"), does(3, "b", "tries"), step(4), step(5)])

    assert [(row.actor, row.count) for row in rows] == [("a", 2), ("b", 1), ("", 1), ("", 1)]
    assert rows[0].words == "tries (2 times)"


def test_too_many_rows_lose_the_least_telling_and_then_the_earliest() -> None:
    """Weight 3, then 2, then what came first; steps and the end stay, and it is said how many went."""
    rows = [step(0), *(does(n, "a", f"thing {n}", 1 + n % 3) for n in range(1, 40)), step(50), does(51, "a", "end")]

    assert {row.weight for row in cut(rows, 30)} == {0, 1, 2}
    assert len(cut(rows, 30)) == 29
    short = cut(rows, 8)
    assert len(short) == 8
    assert [row.kind for row in short[:2]] == [Kind.STEP, Kind.LEFT_OUT]
    assert short[1].text == "… 9 things more …"
    assert [row.text for row in short[-2:]] == ["1. offer", "end"]
    assert cut(rows, 100) == rows


def test_equal_threads_are_numbered_as_they_come() -> None:
    """Which of the threads of user space takes a letter is chance; others keep their names."""
    rows = [does(1, "user/3", "x"), sends(2, "vcpu0", "user/1", 3), does(4, "system/1", "y")]

    assert equal_threads(rows) == {"user/3": "user/1", "user/1": "user/2", "system/1": "system/0"}


DIAGRAM = Diagram(
    ("host", "vcpu0", "work"),
    (
        step(1_000_000),
        sends(1_500_000, "host", "work", 2_000_000, "work"),
        Row(Kind.HELD, "held at g.x", 3_000_000, "work"),
        Row(Kind.IN_VAIN, "answer", 4_000_000, "work", "host"),
        Row(Kind.GOES_ON, "goes on", 5_000_000, "work"),
    ),
    1_000_000,
)


def test_a_diagram_in_ascii() -> None:
    """A column for each lifeline, dotted while its actor is held; a time and words for each row."""
    assert list(draw(DIAGRAM, 80, ascii_only=True)) == [
        "      ms     host  vcpu0   work",
        "    0.00      |      |      |    > 1. offer",
        "    1.00      *------+----->|    work",
        "    2.00      |      |      #    held at g.x",
        "    3.00      | x----+------*    answer",
        "    4.00      |      |      o    goes on",
    ]


def test_no_line_is_too_wide() -> None:
    """Words that need more than a line go on in the next, beside lifelines that run on; box drawing, no times."""
    rows = (does(1, "a", "word " * 40), step(2, "2. " + "x" * 30))
    lines = list(draw(Diagram(("a", "b"), rows, 0), 72, times=False))

    assert max(map(len, lines)) <= 72
    assert "".join(lines).count("word") == 40
    assert all(line.count("│") >= 1 for line in lines[1:])


def test_a_picture_is_an_svg_with_everything_in_it() -> None:
    """Well-formed, whatever the words; each row's words, each lifeline's name, and what came of it."""
    picture = picture_of(DIAGRAM, "A <title> & more", ["INV-03 is broken: a < b"])

    words = "".join(ElementTree.fromstring(picture).itertext())
    for text in ("A <title> & more", "vcpu0", "held at g.x", "goes on", "INV-03 is broken: a < b"):
        assert text in words
