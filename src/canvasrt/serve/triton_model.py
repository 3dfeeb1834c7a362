"""The Python backend's side: Triton's requests, responses, metrics and log for `canvasrt.serve.service`.

The only file that imports triton_python_backend_utils, which exists inside Triton's stub process alone.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from canvasrt import wire
from canvasrt.errors import CanvasRTError
from canvasrt.serve.engine_process import EngineProcess
from canvasrt.serve.log import write_line
from canvasrt.serve.metrics import Family, Metric, Metrics
from canvasrt.serve.model import open_served
from canvasrt.serve.responses import Response, as_arrays
from canvasrt.serve.service import Service
from canvasrt.serve.settings import PARAMETER, ServeSettings

_LEVELS = ("debug", "info", "warning", "error")


class TritonPythonModel:
    """One instance serves all requests: batching is the scheduler's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        if PARAMETER not in parameters:
            raise pb_utils.TritonModelException(
                f"config.pbtxt has no parameter {PARAMETER}, which names the checkpoint: start it with canvasrt serve"
            )
        settings = ServeSettings.model_validate_json(parameters[PARAMETER]["string_value"])
        self._drain_seconds = settings.drain_seconds
        self._level = _LEVELS.index(settings.log_level)
        try:
            engine = EngineProcess.start(settings)
            served = open_served(settings, engine.limits.context)
        except CanvasRTError as error:  # one sentence in Triton's log instead of a traceback
            raise pb_utils.TritonModelException(str(error)) from None
        limits = engine.limits
        metrics = Metrics(_Families().metric, limits.slots, limits.context)
        self._service = Service(engine.attach, served, metrics, self._log)
        self._log("ready", {"model": settings.model, "slots": limits.slots, "context": limits.context})

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._service.accept(_TritonRequest(request))

    def finalize(self) -> None:
        """Triton calls this at once when it is told to stop, while streams are still running."""
        self._service.close(self._drain_seconds)
        write_line("info", "stopped", {})  # at any level: the supervisor waits for it

    def _log(self, event: str, fields: Mapping[str, object]) -> None:
        level = "error" if "error" in fields else "info"
        if _LEVELS.index(level) >= self._level:
            write_line(level, event, fields)


class _TritonRequest:
    """Implements Incoming. Made inside execute(): afterwards Triton uses the memory of the inputs for others."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._wanted = frozenset(request.requested_output_names())
        self.name = str(request.request_id())
        microseconds = request.timeout()
        self.timeout = microseconds / 1e6 if microseconds else None
        self.tensors = {tensor.name(): np.copy(tensor.as_numpy()) for tensor in request.inputs()}
        parameters = request.parameters()
        self.parameters: dict[str, object] = json.loads(parameters) if parameters else {}

    def send(self, response: Response, final: bool) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in as_arrays(response).items() if name in self._wanted]
        self._send(pb_utils.InferenceResponse(output_tensors=tensors), final)

    def fail(self, kind: wire.ErrorKind, message: str) -> None:
        codes = {
            wire.INVALID: pb_utils.TritonError.INVALID_ARG,
            wire.BUSY: pb_utils.TritonError.UNAVAILABLE,
            wire.CANCELLED: pb_utils.TritonError.CANCELLED,
        }
        error = pb_utils.TritonError(f"{kind}: {message}", codes.get(kind, pb_utils.TritonError.INTERNAL))
        self._send(pb_utils.InferenceResponse(output_tensors=[], error=error), final=True)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())

    def _send(self, response: Any, final: bool) -> None:
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


class _Families:
    """Triton's metric families, each made once."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}

    def metric(self, family: Family, labels: Mapping[str, str]) -> Metric:
        kinds = pb_utils.MetricFamily
        if family.name not in self._families:
            kind = {"counter": kinds.COUNTER, "gauge": kinds.GAUGE, "histogram": kinds.HISTOGRAM}[family.kind]
            self._families[family.name] = kinds(name=family.name, description=family.meaning, kind=kind)
        buckets = {"buckets": list(family.buckets)} if family.kind == "histogram" else {}
        made: Metric = self._families[family.name].Metric(labels=dict(labels), **buckets)
        return made
