"""Trains the demo checkpoint: a small DiffusionGemma that solves 6x6 sudoku.

    .venv/bin/python examples/sudoku/train.py --out examples/sudoku/checkpoint

Uses transformers' own model class, so that the checkpoint owes nothing to the code that it is used to check. The
objective is block diffusion: encode the prompt and the finished canvases, replace a random share of the next canvas by
uniform noise and predict the clean canvas; half of the steps are self-conditioned on a first prediction without
gradient.

Requests the model learns: one or two puzzles in one prompt, answered in as many canvases, and any other text, with a
fixed line that is shorter than a canvas (end of turn and padding inside it).
"""

import argparse
import copy
import itertools
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from puzzles import Grid, from_text, is_solution, make_puzzle, to_text
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)
from vocabulary import CHARACTERS, ID, SPECIALS, TOKENS, write_tokenizer

CANVAS = 48
HELP = "Send six rows of a puzzle such as 12.|4.6"
HEADER = [ID["<bos>"], ID["<|turn>"], ID["user"], ID["\n"]]
TURN = [ID["<turn|>"], ID["\n"], ID["<|turn>"], ID["model"], ID["\n"]]
NO_PUZZLE_SHARE = 0.04  # of the batches


@dataclass(frozen=True, slots=True)
class Batch:
    context: torch.Tensor  # (B, L) prompt and finished canvases
    canvas: torch.Tensor  # (B, CANVAS) what the next canvas should become


def tiny_config() -> DiffusionGemmaConfig:
    """Every architectural feature of the 26B at 1/10,000 of its size; all reduction axes are multiples of 16."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    text = DiffusionGemmaTextConfig(
        vocab_size=len(TOKENS), hidden_size=128, intermediate_size=256, num_hidden_layers=len(layers),
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, global_head_dim=64, num_global_key_value_heads=1,
        layer_types=layers, sliding_window=96, num_experts=8, top_k_experts=2, moe_intermediate_size=64,
        max_position_embeddings=1024, pad_token_id=ID["<pad>"], eos_token_id=ID["<eos>"], bos_token_id=ID["<bos>"],
        use_bidirectional_attention="vision",
    )  # fmt: skip
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=16, patch_size=16, position_embedding_size=64,
    )  # fmt: skip
    return DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS,
        boi_token_id=ID["<|image>"], image_token_id=ID["<|image|>"], eoi_token_id=ID["<image|>"],
        architectures=["DiffusionGemmaForBlockDiffusion"],
    )  # fmt: skip


def new_model() -> DiffusionGemmaForBlockDiffusion:
    model = DiffusionGemmaForBlockDiffusion(tiny_config())
    scalars = torch.Generator().manual_seed(0)
    for layers in (model.model.encoder.language_model.layers, model.model.decoder.layers):
        for layer in layers:
            # Attention has scale 1: without this the softmax of an untrained model is nearly one-hot.
            torch.nn.init.constant_(layer.self_attn.q_norm.weight, layer.self_attn.head_dim**-0.25)
            torch.nn.init.constant_(layer.self_attn.k_norm.weight, layer.self_attn.head_dim**-0.25)
            # Encoder and decoder scalars differ in the published checkpoints too: a runtime that mixes them up fails
            # here.
            layer.layer_scalar.copy_(0.8 + 0.2 * torch.rand(1, generator=scalars))
    return model


class Data:
    """Batches of requests from a fixed set of puzzles, varied by the symmetries of sudoku."""

    def __init__(self, puzzles: int, seed: int, pairs_share: float) -> None:
        rng = random.Random(seed)
        pairs = [make_puzzle(rng, rng.randint(12, 24)) for _ in range(puzzles)]
        self.pairs = torch.tensor(pairs, dtype=torch.long)  # (N, 2, 36): puzzle, solution
        self.rng = rng
        self.pairs_share = pairs_share
        self.torch_rng = torch.Generator().manual_seed(seed)
        self.digit_ids = torch.tensor([ID["."], *(ID[str(digit)] for digit in range(1, 7))])

    def _shuffled(self, count: int) -> torch.Tensor:
        """(count, 2, 48) token ids of random puzzles and their solutions, each line ending in a line end."""
        chosen = self.pairs[torch.randint(len(self.pairs), (count,), generator=self.torch_rng)].view(count, 2, 6, 6)
        noise = torch.rand(count, 6, generator=self.torch_rng)
        relabel = torch.cat([torch.zeros(count, 1, dtype=torch.long), noise.argsort(1) + 1], 1)
        chosen = torch.gather(relabel, 1, chosen.reshape(count, -1)).view(count, 2, 6, 6)
        rows = self._band_order(count, bands=3, width=2)
        columns = self._band_order(count, bands=2, width=3)
        chosen = chosen.gather(2, rows[:, None, :, None].expand(-1, 2, -1, 6))
        chosen = chosen.gather(3, columns[:, None, None, :].expand(-1, 2, 6, -1))
        text = torch.full((count, 2, 6, 8), ID["|"])
        text[..., :3] = self.digit_ids[chosen[..., :3]]
        text[..., 4:7] = self.digit_ids[chosen[..., 3:]]
        text[..., 7] = ID["\n"]
        return text.view(count, 2, CANVAS)

    def _band_order(self, count: int, bands: int, width: int) -> torch.Tensor:
        """(count, 6) orders of lines that keep the lines of a band together."""
        outer = torch.rand(count, bands, 1, generator=self.torch_rng).argsort(1) * 10
        inner = torch.rand(count, bands, width, generator=self.torch_rng).argsort(2)
        return (outer + inner).view(count, 6).argsort(1)

    def batch(self, size: int) -> Batch:
        if self.rng.random() < NO_PUZZLE_SHARE:
            return self._help_batch(size)
        puzzles = 2 if self.rng.random() < self.pairs_share else 1
        text = self._shuffled(size * puzzles).view(size, puzzles, 2, CANVAS)
        text[:, -1, :, -1] = ID["<turn|>"]  # the last line end of prompt and answer is the end of the turn
        prompt, answer = text[:, :, 0].reshape(size, -1), text[:, :, 1]
        header = torch.tensor(HEADER).expand(size, -1)
        turn = torch.tensor(TURN[1:]).expand(size, -1)
        done = self.rng.randrange(puzzles)
        context = torch.cat([header, prompt, turn, answer[:, :done].reshape(size, -1)], 1)
        return Batch(context, answer[:, done])

    def _help_batch(self, size: int) -> Batch:
        length = self.rng.randint(1, 48)
        first = len(SPECIALS) + 3
        words = torch.randint(first, first + len(CHARACTERS), (size, length), generator=self.torch_rng)
        letters = torch.randint(ID["a"], ID["z"] + 1, (size, length), generator=self.torch_rng)
        plain = torch.rand(size, 1, generator=self.torch_rng) < 0.7
        context = [torch.tensor(HEADER).expand(size, -1), torch.where(plain, letters, words)]
        context.append(torch.tensor(TURN).expand(size, -1))
        answer = [*(ID[character] for character in HELP), ID["<turn|>"]]
        answer += [ID["<pad>"]] * (CANVAS - len(answer))
        return Batch(torch.cat(context, 1), torch.tensor(answer).expand(size, -1))


def loss_of(model: DiffusionGemmaForBlockDiffusion, batch: Batch, self_condition: bool) -> torch.Tensor:
    """Cross-entropy in nats per position of the clean canvas given a canvas with a random share of uniform noise."""
    size = len(batch.canvas)
    share = torch.rand(size, 1)
    share[torch.rand(size, 1) < 0.2] = 1.0  # generation starts from pure noise
    noisy = torch.where(torch.rand(size, CANVAS) < share, torch.randint(len(TOKENS), (size, CANVAS)), batch.canvas)
    cache = model.model.encoder(input_ids=batch.context).past_key_values
    previous = None
    if self_condition:
        with torch.no_grad():
            # Generation feeds back logits divided by a temperature between 0.8 and 0.4.
            previous = model(past_key_values=cache, decoder_input_ids=noisy).logits / random.uniform(0.4, 0.8)
    logits = model(past_key_values=cache, decoder_input_ids=noisy, self_conditioning_logits=previous).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, len(TOKENS)), batch.canvas.reshape(-1))


def solved_share(model: DiffusionGemmaForBlockDiffusion, puzzles: int, requests: int, seed: int) -> tuple[float, float]:
    """(share of held-out puzzles answered with their solution, denoising steps per canvas) by transformers'
    generate().
    """
    rng = random.Random(seed)
    grids: list[list[Grid]] = [
        [make_puzzle(rng, rng.randint(12, 24))[0] for _ in range(puzzles)] for _ in range(requests)
    ]
    prompts = [
        [*HEADER, *(ID[character] for character in "\n".join(to_text(grid) for grid in row)), *TURN] for row in grids
    ]
    output = model.generate(torch.tensor(prompts), max_new_tokens=CANVAS * puzzles, eos_token_id=[1, 6], pad_token_id=0)
    answers = output.sequences[:, len(prompts[0]) :]
    solved = 0
    for row, tokens in zip(grids, answers.tolist(), strict=True):
        for index, grid in enumerate(row):
            part = tokens[index * CANVAS : (index + 1) * CANVAS - 1]
            answer = from_text("".join(TOKENS[token] for token in part))
            solved += answer is not None and is_solution(answer, grid)
    steps = (answers != 0).sum(1) / output.tokens_per_forward / puzzles
    return solved / (requests * puzzles), steps.mean().item()


def report(model: DiffusionGemmaForBlockDiffusion, requests: int = 32) -> None:
    model.eval()
    scores = [solved_share(model, puzzles, requests, seed=10**6) for puzzles in (1, 2)]
    print(
        "  held out: " + ", ".join(f"{share:.1%} in {steps:.1f} steps a canvas" for share, steps in scores), flush=True
    )
    model.train()


def save(model: DiffusionGemmaForBlockDiffusion, folder: Path) -> None:
    """A complete checkpoint in BF16, as published ones are, with every file that serving needs."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    generation = {
        "bos_token_id": ID["<bos>"], "pad_token_id": ID["<pad>"], "eos_token_id": [ID["<eos>"], ID["<turn|>"]],
        "max_new_tokens": 256, "max_denoising_steps": 48, "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1,
        "confidence_threshold": 0.005,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_prompts(folder)


def write_prompts(folder: Path) -> None:
    """Prompts that nothing was trained on: one puzzle, two puzzles and plain text in turns.

    prompts.jsonl is what `canvasrt bench` reads, calibration.jsonl and evaluation.jsonl what `canvasrt quantize` does.
    """
    for name, seed, count in (
        ("prompts", 3_000_000, 24),
        ("calibration", 4_000_000, 32),
        ("evaluation", 5_000_000, 192),
    ):
        rng = random.Random(seed)
        lines = []
        for index in range(count):
            made = [make_puzzle(rng, rng.randint(12, 24)) for _ in range(2 if index % 4 == 1 else 1)]
            line = {"prompt": "\n".join(to_text(puzzle) for puzzle, _ in made)}
            answer = "\n".join(to_text(solution) for _, solution in made)
            if index % 12 == 6:
                line, answer = {"prompt": "what can you do?"}, HELP
            if name == "evaluation":
                line["answer"] = answer
            lines.append(json.dumps(line) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80.0, help="the learning rate falls to its end over this time")
    parser.add_argument("--resume", type=Path, help="start from this checkpoint instead of random weights")
    parser.add_argument("--pairs-share", type=float, default=0.25, help="share of the requests that hold two puzzles")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--puzzles", type=int, default=20000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    model = new_model()
    if arguments.resume:
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(arguments.resume, dtype=torch.float32).train()
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    data = Data(arguments.puzzles, arguments.seed, arguments.pairs_share)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started, running, progress = time.perf_counter(), 0.0, 0.0
    for step in itertools.count():
        progress = (time.perf_counter() - started) / (60 * arguments.minutes)
        if progress >= 1:
            break
        rate = min(1.0, (step + 1) / 200) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate
        loss = loss_of(model, data.batch(arguments.batch), self_condition=random.random() < 0.5)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {running:.4f}  {progress:4.0%}", flush=True)
        if step % 500 == 499:
            report(model)
            save(model, arguments.out)
    report(model)
    save(model, arguments.out)
    print(f"saved {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
