"""transformers' model behind the few calls that comparisons need.

Runs on the CPU, one sequence or a left-padded batch.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.params import RequestParams
from canvasrt.errors import CheckpointError

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class ReferenceAnswer:
    tokens: list[int]  # whole canvases, padding after the end-of-sequence token included
    passes: float  # decoder passes of this sequence, as the reference counts them


class ReferenceModel:
    """The oracle for one checkpoint, in float32 or bfloat16."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> "ReferenceModel":
        """Raises CheckpointError when transformers would leave a tensor of the text network at random values.

        That is what it does with the experts of a quantized checkpoint, without an error of its own.
        """
        if checkpoint.quantization is not None:
            raise CheckpointError(
                f"{checkpoint.folder} is quantized ({checkpoint.quantization.name}), and transformers can't run it: it "
                "refuses such a checkpoint, or loads it with random experts and says nothing. Compare it with its "
                f"source instead: canvasrt verify {checkpoint.folder} --source CHECKPOINT"
            )
        # transformers reports missing tensors in a log line and carries on with random ones.
        transformers.logging.set_verbosity_error()
        with contextlib.redirect_stderr(io.StringIO()):
            model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
                Path(checkpoint.folder), dtype=dtype, output_loading_info=True
            )
        missing = sorted(
            name for name in report["missing_keys"] if "vision_tower" not in name and "embed_vision" not in name
        )
        if missing:
            raise CheckpointError(
                f"transformers finds no value for {len(missing)} tensors of {checkpoint.folder}, such as {missing[0]}: "
                "it can't serve as the reference for this checkpoint"
            )
        return cls(model)

    @torch.no_grad()
    def encode(self, tokens: NDArray[np.int32], cache: Any = None) -> Any:
        """Appends tokens (n,) to a cache, a new one by default.

        Returns the cache. Sliding layers keep window - 1 tokens.
        """
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        return self.model.model.encoder(input_ids=ids, past_key_values=cache).past_key_values

    @torch.no_grad()
    def denoise(self, cache: Any, canvas: NDArray[np.int32], previous: Tensor | None) -> Tensor:
        """Softcapped logits (canvas, vocabulary) of one step.

        ``previous`` are the temperature-scaled ones before it.
        """
        ids = torch.from_numpy(canvas.astype(np.int64))[None]
        signal = None if previous is None else previous[None].to(self.model.dtype)
        result: Tensor = self.model(
            past_key_values=cache, decoder_input_ids=ids, self_conditioning_logits=signal
        ).logits[0]
        return result

    def generate(
        self, prompts: Sequence[NDArray[np.int32]], params: RequestParams, streamer: Any = None
    ) -> list[ReferenceAnswer]:
        """transformers' own ``generate`` over a left-padded batch, with the settings of ``params`` but
        its own noise.
        """
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        padding = self.model.config.text_config.pad_token_id
        output = self.model.generate(
            ids,
            streamer=streamer,
            **({"attention_mask": mask} if len({len(prompt) for prompt in prompts}) > 1 else {}),
            max_new_tokens=params.max_tokens,
            max_denoising_steps=params.max_denoising_steps,
            t_min=params.t_min,
            t_max=params.t_max,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=params.entropy_bound),
            stability_threshold=params.stability_threshold,
            confidence_threshold=params.confidence_threshold,
            eos_token_id=sorted(params.stop_token_ids) or None,
            pad_token_id=padding,
        )
        answers = output.sequences[:, width:]
        passes = (answers != padding).sum(-1) / output.tokens_per_forward
        return [
            ReferenceAnswer(tokens, float(count))
            for tokens, count in zip(answers.tolist(), passes.tolist(), strict=True)
        ]
