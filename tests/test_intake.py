"""What a request may say, and what is answered to one that can't be run."""

import json
import random
from typing import Any

import numpy as np
import pytest

from canvasrt import wire
from canvasrt.errors import CanvasRTError, InputError
from canvasrt.serve.intake import read_request
from service import fake, served, tensors

SERVED = served(fake())
PUZZLE = "12.|..5\n...|...\n...|6.1\n4..|..2\n.4.|2.3\n53.|4.6"
CHAT = json.dumps([{"role": "user", "content": PUZZLE}])


def read(parameters: dict[str, object] | None = None, **values: Any) -> Any:
    return read_request(tensors(**values), parameters or {}, SERVED)


def test_a_conversation_is_encoded_by_the_chat_template_and_a_text_as_it_is() -> None:
    assert SERVED.codec is not None
    chat = read(messages=CHAT)
    assert chat.prompt.tolist() == SERVED.codec.encode_chat(json.loads(CHAT)).tolist()
    assert read(text_input="12.").prompt.tolist() == SERVED.codec.encode("12.").tolist()
    assert read(input_ids=[5, 6, 7]).prompt.tolist() == [5, 6, 7]


def test_what_is_left_out_has_the_checkpoints_value() -> None:
    asked = read(input_ids=[5])
    config = SERVED.config
    assert (asked.stream, asked.draft_every, asked.priority, asked.timeout, asked.echo) == (False, 0, 3, None, "")
    assert (asked.params.t_min, asked.params.t_max) == (config.t_min, config.t_max)
    assert asked.params.stop_token_ids == {1}


def test_every_option_arrives() -> None:
    asked = read(
        input_ids=[5], stream=True, max_tokens=7, seed=2**64 - 1, stop_words=["a", "bc"], stop_token_ids=[9, 11],
        top_p=0.3, top_k=5, max_denoising_steps=9, t_min=0.1, t_max=0.9, entropy_bound=0.2, stability_threshold=2,
        confidence_threshold=0.01, stream_drafts=2, priority_level=1, timeout_ms=1500, ignore_eos=True,
    )  # fmt: skip
    params = asked.params
    assert (params.max_tokens, params.seed, params.stop, params.stop_token_ids) == (7, 2**64 - 1, ("a", "bc"), {9, 11})
    assert (params.top_p, params.top_k, params.max_denoising_steps) == (0.3, 5, 9)
    assert (params.t_min, params.t_max, params.entropy_bound) == (0.1, 0.9, 0.2)
    assert (params.stability_threshold, params.confidence_threshold) == (2, 0.01)
    assert (asked.stream, asked.draft_every, asked.priority, asked.timeout) == (True, 2, 1, 1.5)


def test_a_number_in_fp32_is_the_number_that_was_meant() -> None:
    """0.3 as FP32 is 0.30000001192..., which would be another request than the same one in process."""
    assert read(input_ids=[5], entropy_bound=0.3).params.entropy_bound == 0.3


def test_temperature_moves_the_whole_schedule_and_0_asks_for_a_repeatable_answer() -> None:
    config = SERVED.config
    warm = read(input_ids=[5], temperature=0.4).params
    assert (warm.t_max, warm.t_min) == (0.4, pytest.approx(0.4 * config.t_min / config.t_max))
    zero = read(input_ids=[5], temperature=0.0).params
    assert (zero.t_max, zero.t_min, zero.seed) == (config.t_max, config.t_min, 0)
    assert read(input_ids=[5], temperature=0.0, seed=4).params.seed == 4


def test_the_request_of_tritons_openai_frontend_is_understood() -> None:
    """The TensorRT-LLM shape: everything [1, 1], with the options that it always sends."""
    asked = read(
        text_input="<bos>12.", stream=False, max_tokens=16, top_p=1.0, frequency_penalty=0.0, presence_penalty=0.0,
        temperature=0.7, seed=1, stop_words=["\n"], return_num_input_tokens=True, return_num_output_tokens=True,
    )  # fmt: skip
    assert (asked.params.max_tokens, asked.params.stop) == (16, ("\n",))


def test_echo_only_where_it_is_asked_for() -> None:
    assert read(text_input="12.", exclude_input_in_output=False).echo == "12."
    assert read(text_input="12.", exclude_input_in_output=True).echo == ""


REFUSED = [
    ({}, "send one of text_input, messages and input_ids, not none of them"),
    ({"text_input": "1", "input_ids": [5]}, "not text_input and input_ids"),
    ({"messages": "{"}, "messages: not JSON"),
    ({"messages": "[" * 100_000}, "messages: not JSON"),
    ({"messages": '{"role": "user"}'}, 'messages: a message is {"role"'),
    ({"messages": '[{"role": "user", "content": 3}]'}, "a message is"),
    ({"messages": '[{"role": "assistant", "content": "a"}]'}, "the last message must be the user's"),
    ({"text_input": ""}, "the prompt is empty"),
    ({"text_input": [b"\xff\xfe"]}, "text_input: not UTF-8 text"),
    ({"text_input": ["a", "b"]}, "text_input: one value expected, found 2"),
    ({"text_input": "1" * 1_000_000}, "can't fit the context of 512"),
    ({"text_input": "1" * 5_000}, "leaves no room for a canvas"),
    ({"input_ids": [112]}, "outside the vocabulary of 112"),
    ({"input_ids": [2**31 - 1]}, "outside the vocabulary"),
    ({"input_ids": [-1]}, "-1 is no token id"),
    ({"input_ids": []}, "the prompt is empty"),
    ({"input_ids": [5], "max_tokens": 0}, "max_tokens"),
    ({"input_ids": [5], "max_tokens": 2**31 - 1}, "max_tokens 2147483647 does not fit"),
    ({"input_ids": [5], "max_tokens": [1, 2]}, "max_tokens: one value expected"),
    ({"input_ids": [5], "temperature": -1.0}, "t_max"),
    ({"input_ids": [5], "temperature": float("nan")}, "t_max"),
    ({"input_ids": [5], "temperature": 0.5, "t_max": 0.5}, "two ways to say the same"),
    ({"input_ids": [5], "t_min": 0.9, "t_max": 0.1}, "t_max must be at least t_min"),
    ({"input_ids": [5], "top_p": 0.0}, "top_p"),
    ({"input_ids": [5], "top_p": 1.5}, "top_p"),
    ({"input_ids": [5], "top_k": -1}, "top_k"),
    ({"input_ids": [5], "max_denoising_steps": 10_000}, "max_denoising_steps"),
    ({"input_ids": [5], "entropy_bound": 0.0}, "entropy_bound"),
    ({"input_ids": [5], "frequency_penalty": 0.5}, "frequency_penalty 0.5: 0 only"),
    ({"input_ids": [5], "presence_penalty": -1.0}, "presence_penalty -1: 0 only"),
    ({"input_ids": [5], "repetition_penalty": 1.1}, "repetition_penalty 1.1: 1 only"),
    ({"input_ids": [5], "beam_width": 2}, "beam_width 2: 1 only"),
    ({"input_ids": [5], "stream_drafts": 2}, "stream_drafts needs stream"),
    ({"input_ids": [5], "stream": True, "stream_drafts": -2}, "stream_drafts -2: 0 to 1024"),
    ({"input_ids": [5], "priority_level": 9}, "priority_level 9: 0 to 5"),
    ({"input_ids": [5], "stop_words": ["x"] * 17}, "stop"),
    ({"input_ids": [5], "stop_words": ["x" * 300]}, "stop"),
    ({"input_ids": [5], "stop_token_ids": [5000]}, "stop_token_ids"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_can_not_be_run_is_refused_in_a_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(**values)
    assert said in str(caught.value)


def test_an_unknown_key_over_http_is_refused_by_its_name() -> None:
    """Triton hands those over as parameters, and a misspelled option must not be dropped."""
    with pytest.raises(InputError, match=r"max_token is no input of this model\. It knows text_input"):
        read({"max_token": 5}, input_ids=[5])
    assert read({"timeout": 5, "triton_enable_empty_final_response": True}, input_ids=[5]).stream is False


def test_a_model_without_a_tokenizer_takes_token_ids() -> None:
    without = served(fake(), codec=False)
    assert read_request(tensors(input_ids=[5]), {}, without).prompt.tolist() == [5]
    with pytest.raises(InputError, match=r"has no tokenizer.json: send input_ids"):
        read_request(tensors(messages=CHAT), {}, without)


def test_ten_thousand_malformed_requests_get_a_sentence_each() -> None:
    """Any values of the declared types: run or refused, and never anything else."""
    draw = random.Random(7)

    def value(dtype: str) -> Any:
        if dtype == "BYTES":
            return draw.choice(
                [b"", b"12.", b"\xff", b"\x00", CHAT.encode(), b"[]", b"null", "\ud7ff".encode(), b"<|image|>"]
            )
        if dtype == "BOOL":
            return draw.random() < 0.5
        if dtype == "FP32":
            return draw.choice([0.0, -1.0, 0.5, 1.0, 1e38, -1e38, float("nan"), float("inf")])
        low, high = (-(2**31), 2**31 - 1) if dtype == "INT32" else (0, 2**32 - 1 if dtype == "UINT32" else 2**64 - 1)
        return draw.choice([low, high, 0, 1, 5, 48])

    ran = 0
    for _ in range(10_000):
        chosen = draw.sample(wire.INPUTS, draw.randrange(1, 6))
        values = {each.name: [value(each.dtype) for _ in range(draw.choice([0, 1, 1, 1, 1, 3]))] for each in chosen}
        values = {name: items for name, items in values.items() if items or name != "ping"}
        if draw.random() < 0.5:
            values.setdefault("input_ids", [5])
        try:
            asked = read_request(tensors(**values), {}, SERVED)
        except CanvasRTError:
            continue
        ran += 1
        assert asked.prompt.dtype == np.int32
        assert len(asked.prompt)
    assert 100 < ran < 9_000
