"""A gRPC server in this process that speaks Triton's protocol and plays what a test tells it: faults on demand."""

import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from canvasrt import wire
from canvasrt.client.tensors import Response

Message = service_pb2.ModelStreamInferResponse
# Gets the inputs of a request by name and gRPC's context of the call; a ping is answered before it is asked.
Script = Callable[[dict[str, Any], Any], Iterator[Message]]

_FORMATS = {"BOOL": "?", "INT32": "i", "UINT32": "I", "UINT64": "Q", "FP32": "f"}


def canvas(text: str, index: int = 0, finish: str = "", **changes: Any) -> Response:
    values = {
        "text_output": text, "finish_reason": finish, "num_input_tokens": 5, "num_cached_tokens": 2,
        "num_output_tokens": len(text), "canvas_index": index, "denoising_steps": 4 * (index + 1), "seed": 7,
        "is_draft": False, "draft_pieces": (), "draft_settled": (),
    }  # fmt: skip
    return Response(**{**values, **changes})


def draft(text: str, settled: int, index: int = 0) -> Response:
    flags = tuple(position < settled for position in range(len(text)))
    return canvas(text, index, is_draft=True, num_output_tokens=0, draft_pieces=tuple(text), draft_settled=flags)


def data(response: Response, final: bool = False) -> Message:
    message = Message()
    for tensor in wire.OUTPUTS:
        value = getattr(response, tensor.name)
        values = [value] if tensor.size == wire.ONE else list(value)
        message.infer_response.outputs.add(name=tensor.name, datatype=tensor.dtype, shape=[1, len(values)])
        message.infer_response.raw_output_contents.append(pack(tensor.dtype, values))
    message.infer_response.parameters["triton_final_response"].bool_param = final
    return message


def end() -> Message:
    """The empty final response."""
    message = Message()
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


def error(text: str) -> Message:
    message = Message(error_message=text)
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


def pack(dtype: str, values: list[Any]) -> bytes:
    if dtype == "BYTES":
        return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in values)
    return struct.pack(f"<{len(values)}{_FORMATS[dtype]}", *values)


def unpack(dtype: str, raw: bytes) -> list[Any]:
    if dtype != "BYTES":
        return [value for (value,) in struct.iter_unpack(f"<{_FORMATS[dtype]}", raw)]
    values = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        values.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    return values


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, script: Script, pings: Callable[[], Message]) -> None:
        self._script = script
        self._pings = pings

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Message]:  # noqa: N802  # gRPC's name
        for request in requests:
            assert request.model_name == wire.MODEL
            assert request.parameters["triton_enable_empty_final_response"].bool_param
            inputs: dict[str, Any] = {}
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
                values = unpack(tensor.datatype, raw)
                assert list(tensor.shape) == [1, len(values)]
                one = next(each for each in wire.INPUTS if each.name == tensor.name).size == wire.ONE
                inputs[tensor.name] = values[0] if one else values
            if inputs.get("ping"):
                yield self._pings()
            else:
                yield from self._script(inputs, context)


@contextmanager
def scripted(
    script: Script, pings: Callable[[], Message] = lambda: data(canvas("alive"), True), port: str = "0"
) -> Iterator[str]:
    """The server's HOST:PORT. Calls that still run at the end are aborted."""
    server = grpc.server(ThreadPoolExecutor(max_workers=40))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(script, pings), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        server.stop(grace=0).wait()
