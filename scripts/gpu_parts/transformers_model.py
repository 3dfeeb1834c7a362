"""transformers' own model and ``generate`` at the same dimensions with random weights: milliseconds per step."""

import time
from statistics import median
from typing import Any

from gpu_parts.record import Options, PartError, Record, library

GENERATION = "transformers.models.diffusion_gemma.generation_diffusion_gemma"


class Drafts:
    """Listens to ``generate``, which hands over a draft after every step, copied to the CPU: so the GPU is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        pass

    def put_draft(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def step_ms(self) -> list[float]:
        """Of all steps but the first, which comes with the prompt."""
        return [1e3 * (after - before) for before, after in zip(self.times, self.times[1:], strict=False)]


def run(options: Options, record: Record) -> None:
    torch = library("torch")
    transformers = library("transformers")
    transformers.logging.set_verbosity_error()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise PartError("torch sees no NVIDIA GPU: check the driver, or use --device cpu")
    config = transformers.DiffusionGemmaConfig.from_pretrained(options.config)
    model = random_model(torch, transformers, config, options.device)
    record.note(
        device=options.device,
        numbers="bfloat16",
        torch_cuda=torch.version.cuda,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        experts=model.config._experts_implementation,
        attention=model.config._attn_implementation,
        cache="the default (dynamic), nothing compiled",
    )
    for canvases in options.canvases:
        try:
            _steps(torch, options, record, model, canvases)
        except Exception as error:  # a batch that it does not support, or memory: fewer may have worked
            record.fail(f"{canvases} canvases", error)
        if options.device == "cuda":
            torch.cuda.empty_cache()


def _steps(torch: Any, options: Options, record: Record, model: Any, canvases: int) -> None:
    config = model.config
    torch.manual_seed(1)
    shape = (canvases, options.context)
    prompt = torch.randint(6, config.text_config.vocab_size, shape, device=options.device)
    prompt[prompt == config.image_token_id] = 6
    drafts = Drafts()
    sampler = library(GENERATION).EntropyBoundSamplerConfig(entropy_bound=0.1)
    count = options.warmup + options.steps + 1
    with torch.inference_mode():
        model.generate(
            prompt,
            streamer=drafts,
            max_new_tokens=config.canvas_length,
            max_denoising_steps=count,
            sampler_config=sampler,
            t_min=0.4,
            t_max=0.8,
            stability_threshold=1,
            confidence_threshold=1e-30,  # no canvas is ever done, so that every step has all rows
            eos_token_id=None,
            pad_token_id=config.text_config.pad_token_id,
        )
    times = drafts.step_ms()[options.warmup :]
    if not times:
        raise PartError(f"generate ended after {len(drafts.times)} of {count} steps")
    record.row(
        "steps", canvases=canvases, context=options.context, steps=len(times), ms=median(times), ms_least=min(times),
        ms_most=max(times),
    )  # fmt: skip


def random_model(torch: Any, transformers: Any, config: Any, device: str) -> Any:
    """In BF16, initialized as transformers does. Built without memory first: encoder and decoder share their weights,
    and before they do the model is twice as large.
    """
    with torch.device("meta"):
        model = transformers.DiffusionGemmaForBlockDiffusion(config)
    made: dict[int, Any] = {}
    stored = set(model.state_dict())
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                    made[id(parameter)] = (torch.nn.Parameter(empty, requires_grad=False), parameter)
                module._parameters[name] = made[id(parameter)][0]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kept = f"{path}.{name}" in stored and buffer.is_floating_point()
                dtype = torch.bfloat16 if kept else buffer.dtype
                module._buffers[name] = torch.zeros(buffer.shape, dtype=dtype, device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for path, module in model.named_modules():
            if "vision" not in path:  # never run
                model._init_weights(module)
    return model.eval()
