"""The roofline floor beside a measurement: seconds that no implementation of the same arithmetic is below."""

from typing import Any

from canvasrt.compile.roofline import Cost, Experts, Rates, denoising_step, prefill_call
from canvasrt.compile.source import ModelSource
from canvasrt.errors import CanvasRTError
from canvasrt.profiles.detect import detect
from canvasrt.profiles.profile import GpuProfile, load_profile
from canvasrt.spec import ModelSpec
from gpu_parts.record import Options, PartError


def gpu_profile(options: Options) -> GpuProfile:
    """--profile, else that of the first GPU. Raises PartError where no profile is of its compute capability."""
    if options.profile is not None:
        return load_profile(options.profile)
    found = detect()[0]
    if found.profile is None:
        raise PartError(f"{' '.join(found.notes)} Give --profile.")
    return load_profile(found.profile)


class Floors:
    """Floors of a model on a GPU; without a profile or its rates there are none, and ``said`` tells why."""

    def __init__(self, source: ModelSource | None, profile: GpuProfile | None, why_not: str = "") -> None:
        self._source, self._rates = source, None
        self.said = why_not
        if source is not None and profile is not None:
            try:
                self._rates = Rates.of(profile)
                self.said = f"canvasrt.compile.roofline, facts of the profile {profile.name}, {source.quantization}"
            except CanvasRTError as error:
                self.said = str(error)

    @classmethod
    def of(cls, options: Options, source: ModelSource) -> "Floors":
        try:
            return cls(source, gpu_profile(options))
        except (CanvasRTError, PartError) as error:
            return cls(None, None, f"no floor: {error}")

    def step(self, canvases: int, active: int, seats: int | None, ms: float | None) -> dict[str, Any]:
        """``seats``: tokens per expert that are computed, None for all. Also the floor of the routed tokens alone."""
        if self._source is None or self._rates is None:
            return {"floor_ms": None, "floor_share": None, "routed_floor_ms": None}
        spec = self._source.spec
        routed = mean_seats(spec, canvases * spec.canvas_length)
        floor = self._ms(denoising_step(self._source, canvases, active, Experts(seats)))
        least = self._ms(denoising_step(self._source, canvases, active, Experts(routed)))
        return {"floor_ms": floor, "floor_share": floor / ms if ms else None, "routed_floor_ms": least}

    def prefill(self, tokens: int, chunk: int, seats: int | None, ms: float) -> dict[str, Any]:
        """Of all chunks, one after the other, from an empty context."""
        if self._source is None or self._rates is None:
            return {"floor_ms": None, "floor_share": None}
        starts = range(0, tokens, chunk)
        costs = [prefill_call(self._source, min(chunk, tokens - start), start, Experts(seats)) for start in starts]
        floor = sum(map(self._ms, costs))
        return {"floor_ms": floor, "floor_share": floor / ms}

    def _ms(self, cost: Cost) -> float:
        assert self._rates is not None
        return 1e3 * self._rates.floor(cost)


def mean_seats(spec: ModelSpec, tokens: int) -> int:
    """Tokens per expert where all experts get the same number."""
    return -(-tokens * spec.experts_per_token // spec.experts)
