"""The client: one gRPC channel that many threads may use, a stream of its own for every request.

    with Client("localhost:8001") as client:
        for response in client.generate(messages=[{"role": "user", "content": "Why is the sky blue?"}]):
            print(response.text_output, end="")

tritonclient's own class runs all requests over one stream, by callbacks, and an error there may not say whose it is. So
only its messages are used. The stream ends after the one request that it is opened with, and to cancel it is to cancel
that request.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import grpc  # type: ignore[import-untyped]  # it ships no types
from tritonclient.grpc import service_pb2

from canvasrt import wire
from canvasrt.client.failures import failure
from canvasrt.client.tensors import Input, Response, decode, encode
from canvasrt.client.waiting import wait_for
from canvasrt.client.watch import Watch
from canvasrt.errors import CancelledError, CanvasRTError, InputError, ServerError, TimedOutError

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that was restarted is found again at once, and not after gRPC's usual minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 5000),  # also how long a connection may take
)
_GRACE = 2.0  # seconds that the server has to say itself that a request timed out
_PING_SECONDS = 5.0


class Client:
    """Talks to the server at ``url``, HOST:PORT of its gRPC endpoint. Close it, or use it in a with statement.

    A request that hears nothing for ``quiet_seconds`` makes the client ask whether the server is alive, and fails if it
    is not; after ``silence_seconds`` without a response it fails in any case.
    """

    def __init__(self, url: str, *, quiet_seconds: float = 5.0, silence_seconds: float = 600.0) -> None:
        address = _ADDRESS.fullmatch(url)
        if address is None or int(address[2]) > 65535:
            raise InputError(f"{url!r} is no address: give HOST:PORT of the server's gRPC endpoint, as localhost:8001")
        self.url = url
        self._channel = grpc.insecure_channel(url, options=_OPTIONS)
        self._call = self._channel.unary_stream(
            _METHOD,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._watch = Watch(self.ping, quiet_seconds, silence_seconds)
        self._closed = False

    def generate(self, *, stream: bool = True, request_id: str = "", **inputs: object) -> "Stream":
        """Sends a request; ``inputs`` are those of `canvasrt.wire.INPUTS`, None for one that is left out.

        Returns its responses as they come. Closing the iterator, or dropping it, cancels the request at the server.
        Raises InputError at once for inputs that do not exist or do not fit. What the server refuses is raised by
        the iterator: InputError, BusyError, TimedOutError, CancelledError or ServerError.
        """
        tensors = encode({"stream": stream, **inputs})
        limit = inputs.get("timeout_ms")
        seconds = float(str(limit)) / 1e3 + _GRACE if limit else None
        self._check_open()
        reader = _Reader(self.url, partial(self._open, tensors, request_id, seconds), self._watch)
        reader.start()
        return Stream(reader)

    def ping(self, seconds: float = _PING_SECONDS) -> None:
        """Raises ServerError, or BusyError for a server that is stopping, when the model does not answer."""
        self._check_open()
        call = self._open(encode({"ping": True}), "ping", seconds)
        try:
            message = next(call)
            _drain(call)
        except StopIteration:
            raise ServerError(f"the server at {self.url} did not answer a ping") from None
        except grpc.RpcError as error:
            if _code(error) == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServerError(
                    f"the server at {self.url} accepts connections and did not answer within {seconds:g} seconds"
                ) from None
            raise _lost(error, self.url, 0) from None
        if message.error_message:
            raise failure(message.error_message)

    def close(self) -> None:
        """Cancels the requests that are still running and closes the channel."""
        self._closed = True
        for each in self._watch.stop():
            each.give_up(CancelledError("the client was closed"))
        self._channel.close()
        self._watch.join()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CancelledError("the client was closed")

    def _open(self, tensors: list[Input], request_id: str, seconds: float | None) -> Any:
        request = service_pb2.ModelInferRequest(model_name=wire.MODEL, id=request_id)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        for each in tensors:
            request.inputs.add(name=each.tensor.name, datatype=each.tensor.dtype, shape=[1, each.count])
            request.raw_input_contents.append(each.raw)
        try:
            return self._call(request, timeout=seconds)
        except ValueError:  # what gRPC says of a channel that was closed meanwhile
            raise CancelledError("the client was closed") from None


class Stream:
    """The responses of one request. One thread iterates over it; any thread may close it."""

    def __init__(self, reader: "_Reader") -> None:
        self._reader = reader
        self._over = False

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Response:
        if self._over:
            raise StopIteration
        try:
            news = wait_for(self._reader.news)
        except BaseException:  # KeyboardInterrupt: who stops reading has no further use for the answer
            self.close()
            raise
        if isinstance(news, Response):
            return news
        self._over = True
        raise StopIteration if news is None else news

    def close(self) -> None:
        """Cancels the request, unless it has ended."""
        if not self._over:
            self._over = True
            self._reader.cancel()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # a loop that was left with break


class _Reader:
    """Makes one call and reads it, in a thread of its own.

    An interrupt (Ctrl-C) comes to the main thread, and where it hits gRPC's own code a lock may stay taken for ever. So
    the main thread, which iterates over a `Stream`, waits at a queue instead. Nothing here takes a lock of ours either.
    """

    def __init__(self, url: str, open_call: Callable[[], Any], watch: Watch) -> None:
        self.news: SimpleQueue[Response | Exception | None] = SimpleQueue()  # None: the regular end
        self.last_heard = time.monotonic()
        self._url = url
        self._open_call = open_call
        self._watch = watch
        self._call: Any = None
        self._received = 0
        self._cancelled = False
        self._reason: CanvasRTError | None = None

    def start(self) -> None:
        self._watch.add(self)
        threading.Thread(target=self._run, name="canvasrt-reader", daemon=True).start()

    def cancel(self) -> None:
        self._cancelled = True  # before the call is looked at: the thread does both in the other order
        if self._call is not None:
            self._call.cancel()

    def give_up(self, reason: CanvasRTError) -> None:
        """Ends the request with that error instead of what gRPC says about it."""
        self._reason = self._reason or reason
        self.cancel()

    def _run(self) -> None:
        try:
            self._call = self._open_call()
            if self._cancelled:
                self._call.cancel()
            for response in self._responses():
                self.news.put(response)
            self.news.put(None)
            _drain(self._call)
        except grpc.RpcError as error:
            self.news.put(self._reason or _lost(error, self._url, self._received))
        except Exception as error:  # a bug belongs to who reads, too
            self.cancel()
            self.news.put(self._reason or error)
        finally:
            self._watch.discard(self)

    def _responses(self) -> Iterator[Response]:
        finished = False
        for message in self._call:
            self.last_heard = time.monotonic()
            if message.error_message:
                raise failure(message.error_message)
            answer = message.infer_response
            if answer.outputs:
                outputs = zip(answer.outputs, answer.raw_output_contents, strict=True)
                response = decode({output.name: (output.datatype, raw) for output, raw in outputs})
                finished = finished or bool(response.finish_reason)
                self._received += 1
                yield response
            parameters = answer.parameters
            if "triton_final_response" in parameters and parameters["triton_final_response"].bool_param:
                if not finished:
                    raise ServerError(f"the server at {self._url} ended an answer without a finish_reason")
                return
        raise ServerError(f"the server at {self._url} ended an answer before it was complete")


def _drain(call: Any) -> None:
    """Waits for the server's word that a call is over, whose answer is complete.

    A call that is dropped before is cancelled, and Triton then never lets go of the request: the model could not be
    unloaded any more, and a server that is told to stop would wait until it is killed.
    """
    with suppress(grpc.RpcError):
        for _ in call:
            pass


def _lost(error: grpc.RpcError, url: str, received: int) -> CanvasRTError:
    """What a broken call means."""
    code, details = _code(error), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOutError(f"the server at {url} did not finish the request in time")
    if code == grpc.StatusCode.CANCELLED:
        return CancelledError("the request was cancelled")
    if received or "Stream removed" in details:
        return ServerError(f"the connection to {url} broke after {received} responses: {details}")
    if code == grpc.StatusCode.UNAVAILABLE:
        return ServerError(
            f"no server answers at {url}: start one with canvasrt serve, or correct the address ({details})"
        )
    return ServerError(f"the server at {url} failed: {code.name} ({details})")


def _code(error: grpc.RpcError) -> Any:
    return error.code()
