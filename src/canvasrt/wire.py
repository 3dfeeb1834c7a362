"""What crosses the wire between Triton and its clients: the tensors of one request and of its responses, once for both.

The names follow TensorRT-LLM's and vLLM's Triton models, so that their clients and Triton's OpenAI frontend work as
they are. Every tensor has a batch dimension of 1 in front of the one given here. Knows nothing of Triton's API.
"""

from dataclasses import dataclass
from typing import Literal

MODEL = "diffusion_gemma"

DType = Literal["BYTES", "BOOL", "INT32", "UINT32", "UINT64", "FP32"]
ONE, ANY = 1, -1


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dtype: DType  # in the words of the KServe protocol; BYTES is UTF-8 text
    size: int  # ONE, or ANY number of values
    meaning: str


# Of a request: one of text_input, messages and input_ids; everything else may be left out.
INPUTS = (
    Tensor("text_input", "BYTES", ONE, "a prompt as it is, without the chat template"),
    Tensor("messages", "BYTES", ONE, 'a conversation as JSON: [{"role": "user", "content": "..."}, ...]'),
    Tensor("input_ids", "INT32", ANY, "a prompt as token ids"),
    Tensor("stream", "BOOL", ONE, "a response for each finished canvas instead of one for all (default false)"),
    Tensor("max_tokens", "INT32", ONE, "most tokens to generate (default: the checkpoint's, as far as they fit)"),
    Tensor("seed", "UINT64", ONE, "same seed, same text; drawn at random by default and returned"),
    Tensor("stop_words", "BYTES", ANY, "texts that end the answer, which does not include them"),
    Tensor("stop_token_ids", "INT32", ANY, "token ids that end the answer, besides the checkpoint's"),
    Tensor("ignore_eos", "BOOL", ONE, "do not end at the checkpoint's end-of-sequence tokens (default false)"),
    Tensor("temperature", "FP32", ONE, "the schedule's start (t_max), its end in proportion; 0: a repeatable answer"),
    Tensor("top_p", "FP32", ONE, "sample among the likeliest tokens of this total probability, 0 to 1 (default 1)"),
    Tensor("top_k", "INT32", ONE, "sample among the k likeliest tokens; 0 (default): all"),
    Tensor("frequency_penalty", "FP32", ONE, "0 only: a canvas is denoised at once, so there is nothing to count yet"),
    Tensor("presence_penalty", "FP32", ONE, "0 only, for the same reason"),
    Tensor("repetition_penalty", "FP32", ONE, "1 only, for the same reason"),
    Tensor("beam_width", "INT32", ONE, "1 only"),
    Tensor("max_denoising_steps", "INT32", ONE, "most denoising steps per canvas"),
    Tensor("t_min", "FP32", ONE, "temperature that the schedule falls to with the remaining steps"),
    Tensor("t_max", "FP32", ONE, "temperature at the first step"),
    Tensor("entropy_bound", "FP32", ONE, "entropy in nats up to which a step accepts tokens"),
    Tensor(
        "stability_threshold", "INT32", ONE, "earlier steps whose draft must equal this one's before a canvas stops"
    ),
    Tensor("confidence_threshold", "FP32", ONE, "mean entropy in nats below which a canvas may stop"),
    Tensor("stream_drafts", "INT32", ONE, "also a draft every so many steps; needs stream; 0 (default): none"),
    Tensor("priority_level", "INT32", ONE, "1 (first) to 5 (last), as Triton counts; 0 (default): 3"),
    Tensor("timeout_ms", "UINT32", ONE, "milliseconds after which the request is given up; 0 (default): never"),
    Tensor("exclude_input_in_output", "BOOL", ONE, "false: the answer to text_input starts with it (default true)"),
    Tensor("return_num_input_tokens", "BOOL", ONE, "accepted for TensorRT-LLM's clients; the counts are always there"),
    Tensor("return_num_output_tokens", "BOOL", ONE, "accepted for the same reason"),
    Tensor("ping", "BOOL", ONE, "true: answer at once, without a prompt, whether the canvas loop is alive"),
)

# Of a response. The texts and token counts of all responses that are no drafts add up to the whole answer.
OUTPUTS = (
    Tensor("text_output", "BYTES", ONE, "the text that this response adds; of a draft: the whole text so far"),
    Tensor("finish_reason", "BYTES", ONE, '"stop" or "length" in the last response, empty before it'),
    Tensor("num_input_tokens", "UINT32", ONE, "tokens of the prompt"),
    Tensor("num_cached_tokens", "UINT32", ONE, "of these, how many were still in memory from an earlier request"),
    Tensor("num_output_tokens", "UINT32", ONE, "tokens that this response adds; of a draft: 0"),
    Tensor("canvas_index", "INT32", ONE, "of the canvas that this response is about, from 0"),
    Tensor("denoising_steps", "INT32", ONE, "steps of all canvases of the request so far"),
    Tensor("seed", "UINT64", ONE, "of the request"),
    Tensor("is_draft", "BOOL", ONE, "the canvas is not finished: its text may still change"),
    Tensor("draft_pieces", "BYTES", ANY, "of a draft: the text of every position of the canvas; else empty"),
    Tensor("draft_settled", "BOOL", ANY, "of a draft: which positions the last step accepted; else empty"),
)

HIGHEST_PRIORITY, DEFAULT_PRIORITY, LOWEST_PRIORITY = 1, 3, 5

# How every error message begins. gRPC streams lose Triton's error codes, so a client tells errors apart by these words.
ErrorKind = Literal["invalid request", "busy", "timed out", "cancelled", "server error"]
INVALID: ErrorKind = "invalid request"  # sending it again can't help
BUSY: ErrorKind = "busy"  # the queue is full, or the server is stopping: try again, here or elsewhere
TIMED_OUT: ErrorKind = "timed out"  # the request's own timeout
CANCELLED: ErrorKind = "cancelled"
FAILED: ErrorKind = "server error"
ERROR_KINDS = (INVALID, BUSY, TIMED_OUT, CANCELLED, FAILED)
