"""Settings of a serving model: what ``canvasrt serve --set key=value`` may set; JSON in the model's config.pbtxt."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from canvasrt.errors import InputError

Count = Annotated[int, Field(ge=1)]
PARAMETER = "settings"  # the key in config.pbtxt


class ServeSettings(BaseModel):
    """None leaves a value to the model or the bundle's profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="folder of a checkpoint or an engine bundle")
    slots: Count | None = Field(
        None, description="requests that hold K/V memory at once; by default 8, or as many as a bundle was planned for"
    )
    context: Count | None = Field(
        None, description="tokens per slot; by default 8,192, or all that the model has; a bundle's is fixed"
    )
    canvases: Count | None = Field(
        None, description="canvases of one denoising call; by default one for every slot, or as many as a bundle takes"
    )
    prefill_tokens: Count | None = Field(
        None, description="prompt tokens encoded between two denoising calls; by default the runner's chunk"
    )
    max_waiting: int = Field(256, ge=0, description="requests that wait for a slot; more are refused as busy")
    patience: Count = Field(16, description="later requests admitted before a waiting one, whatever their priority")
    reuse_prefixes: bool = Field(True, description="slots keep the tokens of requests that have ended")
    checkpoint: str | None = Field(
        None, description="folder of the checkpoint that a bundle was built from, where its weights are not inside"
    )
    verify: Literal["full", "sizes"] = Field(
        "full", description="of a bundle, before it is loaded: every byte, or only the files' sizes"
    )
    kernels: str | None = Field(
        None,
        description="file for the kernels that TensorRT-RTX compiles on this GPU; by default BUNDLE.kernels beside it",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="of the torch runner")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the torch runner")
    exact: bool = Field(False, description="round a quantized checkpoint's activations too, as a GPU engine does")
    threads: Count | None = Field(None, description="CPU threads of the torch runner; by default one less than cores")
    drain_seconds: float = Field(30.0, ge=0, description="for running requests when the server is told to stop")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @classmethod
    def parse(cls, model: Path | str, given: list[str]) -> "ServeSettings":
        """``given``: ["slots=4", ...]. Raises InputError for one that is unknown or out of range."""
        values: dict[str, str] = {}
        relative = ("checkpoint", "kernels")  # to this process: the engine's runs elsewhere
        for text in given:
            name, equals, value = text.partition("=")
            if not equals or name not in cls.model_fields or name == "model":
                known = ", ".join(sorted(set(cls.model_fields) - {"model"}))
                raise InputError(f"--set {text}: expected KEY=VALUE, where KEY is one of {known}")
            values[name] = str(Path(value).absolute()) if name in relative else value
        try:
            return cls.model_validate({"model": str(model), **values})
        except ValidationError as error:
            faults = [f"--set {item['loc'][0]}={item['input']}: {item['msg']}" for item in error.errors()]
            raise InputError("; ".join(faults)) from None
