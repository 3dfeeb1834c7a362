"""The text of a growing answer: no character is split, nothing is taken back, stop texts are found across canvases."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canvasrt.serve.answer import AnswerText
from canvasrt.serve.tokenizer import TextCodec, cut_at_stop
from planning import DEMO

SAMPLES = [
    "plain words",
    "na\u00efve caf\u00e9",
    "\u4f60\u597d, \u4e16\u754c",
    "\U0001f469\u200d\U0001f680 up",
    "\ufffd",
    "a\ufffdb",
]


def by_byte(tokens: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes: the worst for characters."""
    return bytes(tokens).decode(errors="replace")


def with_context(tokens: Sequence[int]) -> str:
    """One that leaves out the space before its first word, as SentencePiece does."""
    return "".join(f" {token}" for token in tokens).removeprefix(" ")


def pushed(text: AnswerText, tokens: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """What every piece adds; the last one is the final one."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text.push(tokens[start : start + size]))
        start += size
    return [*pieces, text.push(tokens[start:], final=True)]


@given(st.text(max_size=60), st.lists(st.integers(0, 20), max_size=12))
def test_the_pieces_add_up_to_the_whole_and_split_no_character(whole: str, sizes: list[int]) -> None:
    tokens = list(whole.encode(errors="replace"))
    pieces = pushed(AnswerText(by_byte), tokens, sizes)
    assert "".join(pieces) == by_byte(tokens)
    if "\ufffd" not in by_byte(tokens):
        assert not [piece for piece in pieces if "\ufffd" in piece]


@pytest.mark.parametrize("whole", SAMPLES)
def test_one_token_at_a_time_gives_the_same_text(whole: str) -> None:
    tokens = list(whole.encode())
    assert "".join(pushed(AnswerText(by_byte), tokens, [1] * len(tokens))) == whole


def test_half_a_character_waits_for_the_other_half_and_at_the_end_shows_as_such() -> None:
    euro = "\u20ac".encode()
    text = AnswerText(by_byte)
    assert (text.push(b"1" + euro[:2]), text.push(euro[2:])) == ("1", "\u20ac")
    assert text.push(euro[:1], final=True) == "\ufffd"


def test_a_model_that_writes_replacement_characters_is_shown_them_at_last() -> None:
    tokens = list("\ufffd".encode() * 40)
    text = AnswerText(by_byte)
    assert text.push(tokens).count("\ufffd") >= 30


@given(st.lists(st.integers(0, 99), max_size=30), st.lists(st.integers(0, 5), max_size=10))
def test_a_tokenizer_that_writes_its_first_token_differently_is_understood(tokens: list[int], sizes: list[int]) -> None:
    assert "".join(pushed(AnswerText(with_context), tokens, sizes)) == with_context(tokens)


@given(
    st.text(alphabet="ab\u20ac", max_size=30),
    st.lists(st.text(alphabet="ab\u20ac", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 9), max_size=8),
)
def test_the_answer_ends_before_the_first_stop_text_however_it_comes_in(
    whole: str, stops: list[str], sizes: list[int]
) -> None:
    tokens = list(whole.encode())
    text = AnswerText(by_byte, stops)
    shown = "".join(pushed(text, tokens, sizes))
    if any(stop in whole for stop in stops):
        assert text.stopped
        assert not any(stop in shown for stop in stops)
        assert whole.startswith(shown)
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert (shown, text.stopped) == (whole, False)
    if sum(sizes) == 0:  # all at once: the very cut of the command line
        assert shown == (whole if cut_at_stop(whole, stops) is None else cut_at_stop(whole, stops))


def test_a_beginning_of_a_stop_text_is_not_shown_before_it_is_known_to_be_none() -> None:
    text = AnswerText(by_byte, ["END"])
    assert [text.push(piece) for piece in (b"one E", b"N", b"try E", b"N", b"D two")] == ["one ", "", "ENtry ", "", ""]
    assert text.stopped
    assert text.push(b"three", final=True) == ""


def test_the_demo_tokenizer_in_random_pieces() -> None:
    codec = TextCodec.load(DEMO)
    draw = random.Random(0)
    for _ in range(50):
        tokens = [draw.randrange(112) for _ in range(60)]
        text = "".join(pushed(AnswerText(codec.decode), tokens, [draw.randrange(9) for _ in range(8)]))
        assert text == codec.decode(tokens)


def test_a_long_answer_is_not_decoded_again_and_again() -> None:
    """Every canvas costs what it adds: a whole book in canvases would otherwise take quadratic time."""
    decoded = 0

    def counting(tokens: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return by_byte(tokens)

    text = AnswerText(counting)
    for _ in range(200):
        text.push(b"x" * 256)
    assert decoded < 4 * 200 * 256
