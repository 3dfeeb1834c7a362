"""Files of prompts: the three forms of a line, every refusal by file and line, and what the shipped files hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from solve import CHECKPOINT

from canvasrt.errors import CheckpointError, InputError
from canvasrt.inputs import input_folder
from canvasrt.serve.prompts import PromptLine, encode_prompts, read_prompts
from canvasrt.serve.tokenizer import TextCodec
from canvasrt.spec import ModelSpec

SPEC = ModelSpec.load(CHECKPOINT)  # vocabulary 112, context 1024
USER = {"role": "user", "content": "12"}
TALK = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "34"}, USER]
SHIPPED = {"default.jsonl": 64, "held-out.jsonl": 24}


def written(folder: Path, *lines: Any) -> Path:
    """A file with these lines: texts as they are, all else as JSON."""
    file = folder / "prompts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return file


def refusal(folder: Path, line: Any) -> str:
    """The message for a file whose third line is at fault."""
    file = written(folder, {"prompt": "a"}, "", line, {"prompt": "b"})
    with pytest.raises(InputError) as caught:
        read_prompts(file)
    message = str(caught.value)
    assert message.startswith(f"{file}, line 3: ")
    return message


def tokens(*ids: int) -> PromptLine:
    return PromptLine("FILE, line 7", (), ids)


def encoded(folder: Path, *lines: PromptLine, room: int = 10) -> list[list[int]]:
    arrays = encode_prompts(folder, SPEC, lines, room)
    assert all(array.dtype == np.int32 and array.ndim == 1 for array in arrays)
    return [array.tolist() for array in arrays]


def test_the_three_forms_of_a_line(tmp_path: Path) -> None:
    file = written(tmp_path, {"prompt": "12"}, {"messages": TALK}, {"tokens": [5, 0, 9]})
    assert read_prompts(file) == [
        PromptLine(f"{file}, line 1", (USER,)),
        PromptLine(f"{file}, line 2", tuple(TALK)),
        PromptLine(f"{file}, line 3", (), (5, 0, 9)),
    ]


@pytest.mark.parametrize("form", [{"prompt": "x"}, {"messages": [USER]}, {"tokens": [1]}])
@pytest.mark.parametrize("answer", ["", "yes", None])
def test_every_form_may_carry_an_answer(tmp_path: Path, form: dict[str, Any], answer: str | None) -> None:
    with_answer, without = read_prompts(written(tmp_path, form | {"answer": answer}, form))
    assert (with_answer.answer, without.answer) == (answer, None)
    assert (with_answer.messages, with_answer.tokens) == (without.messages, without.tokens)


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    file = written(tmp_path, "", {"prompt": "a"}, "  \t", "", {"prompt": "b"})
    assert [line.where for line in read_prompts(file)] == [f"{file}, line 2", f"{file}, line 5"]


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    text = " Grüße, 世界 🙂 \\n\nsecond line\ttab "
    assert read_prompts(written(tmp_path, {"prompt": text}))[0].messages[0]["content"] == text
    file = written(tmp_path, {"prompt": text}, {"prompt": text})
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))  # as Windows ends lines
    assert [line.messages[0]["content"] for line in read_prompts(file)] == [text, text]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_at_a_line_feed_only(tmp_path: Path, character: str) -> None:
    text = f"one{character}two"
    assert read_prompts(written(tmp_path, {"prompt": text}))[0].messages[0]["content"] == text


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not JSON"),
        ("hello", "not JSON"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (f'{{"tokens": [{"9" * 5000}]}}', "not JSON"),
        ('["prompt"]', 'an object with "prompt", "messages" or "tokens"'),
        ('"prompt"', "an object"),
        ("null", "an object"),
        ({"prompt": "a", "seed": 1}, "an object with"),
        ({"text": "a"}, "an object with"),
        ({}, 'one of "prompt", "messages" and "tokens"'),
        ({"answer": "a"}, "one of"),
        ({"prompt": "a", "tokens": [1]}, "one of"),
        ({"prompt": "a", "messages": [USER]}, "one of"),
        ({"prompt": "a", "answer": 3}, '"answer" must be a text'),
        ({"prompt": "a", "answer": ["a"]}, '"answer" must be a text'),
        ({"tokens": []}, '"tokens" must be a list of token ids'),
        ({"tokens": 5}, "list of token ids"),
        ({"tokens": "12"}, "list of token ids"),
        ({"tokens": [1, -1]}, "list of token ids"),
        ({"tokens": [1, 2.0]}, "list of token ids"),
        ({"tokens": [1, True]}, "list of token ids"),
        ({"tokens": [1, "2"]}, "list of token ids"),
        ({"prompt": None}, 'a message is {"role": system or user or assistant, "content": TEXT}'),
        ({"prompt": ["a"]}, "a message is"),
        ({"messages": []}, "a message is"),
        ({"messages": None}, "a message is"),
        ({"messages": USER}, "a message is"),
        ({"messages": ["a"]}, "a message is"),
        ({"messages": [USER, {"role": "user"}]}, "a message is"),
        ({"messages": [USER, USER | {"name": "x"}]}, "a message is"),
        ({"messages": [USER, USER | {"content": None}]}, "a message is"),
        ({"messages": [USER, USER | {"content": [{"type": "text", "text": "a"}]}]}, "a message is"),
        ({"messages": [USER, USER | {"role": "model"}]}, "a message is"),
        ({"messages": [USER, USER | {"role": ["user"]}]}, "a message is"),
    ],
)
def test_a_wrong_line_is_refused_by_file_and_line(tmp_path: Path, line: Any, part: str) -> None:
    assert part in refusal(tmp_path, line)


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_prompts_is_refused_with_an_example(tmp_path: Path, lines: list[str]) -> None:
    file = written(tmp_path, *lines)
    with pytest.raises(InputError, match=r'holds no prompts.*\{"prompt": "') as caught:
        read_prompts(file)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_can_not_be_read_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b'{"prompt": "\xff"}\n')
    for name, part in (("none", "No such file"), ("", "Is a directory"), ("bytes", "not UTF-8 text .* at byte 12")):
        with pytest.raises(InputError, match=part) as caught:
            read_prompts(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_text_goes_through_the_chat_template_and_ids_stay_as_they_are(tmp_path: Path) -> None:
    lines = read_prompts(written(tmp_path, {"prompt": "12"}, {"tokens": [5, 0, 111]}, {"messages": TALK}))
    codec = TextCodec.load(CHECKPOINT)
    expected = [codec.encode_chat([USER]).tolist(), [5, 0, 111], codec.encode_chat(TALK).tolist()]
    assert encoded(CHECKPOINT, *lines) == expected


def test_ids_need_no_tokenizer_and_text_does(tmp_path: Path) -> None:
    assert encoded(tmp_path, tokens(5, 6), tokens(7)) == [[5, 6], [7]]
    with pytest.raises(CheckpointError, match="no tokenizer"):
        encoded(tmp_path, tokens(5), PromptLine("FILE, line 8", (USER,)))


def test_ids_outside_the_vocabulary_are_refused_by_line_and_number(tmp_path: Path) -> None:
    assert encoded(tmp_path, tokens(1, 111)) == [[1, 111]]
    with pytest.raises(InputError, match=r"^FILE, line 7: token id 112 is outside the vocabulary of 112$"):
        encoded(tmp_path, tokens(1), tokens(112, 5))


@pytest.mark.parametrize("token", [2**31, 2**70])
def test_ids_beyond_32_bits_are_refused_too(tmp_path: Path, token: int) -> None:
    with pytest.raises(InputError, match="outside the vocabulary"):
        encoded(tmp_path, *read_prompts(written(tmp_path, {"tokens": [token]})))


def test_ids_of_a_tokenizer_that_is_not_the_models_are_refused_by_line() -> None:
    line = PromptLine("FILE, line 7", (USER,))
    assert max(encoded(CHECKPOINT, line)[0]) == 35
    with pytest.raises(InputError, match=r"^FILE, line 7: token id 35 is outside the vocabulary of 35$"):
        encode_prompts(CHECKPOINT, replace(SPEC, vocab_size=35), [line], 10)


@pytest.mark.parametrize(("length", "room"), [(1014, 10), (1, 1023), (1024, 0)])
def test_prompts_fill_the_context_and_longer_ones_are_refused_with_the_numbers(
    tmp_path: Path, length: int, room: int
) -> None:
    line = tokens(*[5] * length)
    assert encoded(tmp_path, line, room=room) == [[5] * length]
    expected = f"^FILE, line 7: {length} tokens and {room + 1} to generate exceed the context of 1024$"
    with pytest.raises(InputError, match=expected):
        encoded(tmp_path, line, room=room + 1)


def test_what_the_chat_template_refuses_is_refused_by_line() -> None:
    line = PromptLine("FILE, line 7", ({"role": "tool", "content": "x"},))
    with pytest.raises(InputError, match=r"^FILE, line 7: the chat template refuses .*roles of this model"):
        encoded(CHECKPOINT, line)


def test_half_a_surrogate_pair_is_refused_by_line(tmp_path: Path) -> None:
    file = written(tmp_path, r'{"prompt": "\ud83d"}')  # as a program writes that cuts an emoji in two
    with pytest.raises(InputError, match="line 1"):
        encoded(CHECKPOINT, *read_prompts(file))


@pytest.mark.parametrize(("name", "count"), SHIPPED.items())
def test_a_shipped_file_holds_conversations_that_the_model_is_to_answer(name: str, count: int) -> None:
    lines = read_prompts(input_folder("calibration") / name)
    assert len(lines) == count
    for line in lines:
        assert line.messages[-1]["role"] == "user", line.where
        assert all(message["content"].strip() for message in line.messages), line.where
        assert (line.tokens, line.answer) == ((), None), line.where


def test_the_shipped_files_share_no_prompt_and_repeat_none() -> None:
    """Compared by message, without case and spaces: a held-out question must not lie in a calibration talk either."""
    seen: dict[str, set[str]] = {}
    for name, count in SHIPPED.items():
        lines = read_prompts(input_folder("calibration") / name)
        asked = [" ".join(message["content"].lower().split()) for line in lines for message in line.messages[-1:]]
        assert len(set(asked)) == count
        seen[name] = {
            " ".join(message["content"].lower().split())
            for line in lines
            for message in line.messages
            if message["role"] != "system"
        }
    assert not seen["default.jsonl"] & seen["held-out.jsonl"]
