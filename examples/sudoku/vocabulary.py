"""Writes the demo's tokenizer: Gemma 4's special tokens and turn layout, one token per printable ASCII character.

The vocabulary has 112 entries because the sampler draws noise from all of it and NVFP4 wants multiples of 16.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

SPECIALS = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>",
    "<|channel>", "<channel|>", "<|think|>", "<|image>", "<|image|>", "<image|>",
]  # fmt: skip
ROLES = ["user", "model", "system"]
CHARACTERS = ["\n", *map(chr, range(32, 127))]
TOKENS = [*SPECIALS, *ROLES, *CHARACTERS]
ID = {token: index for index, token in enumerate(TOKENS)}

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{%- if role not in ['user', 'model', 'system'] -%}
{{- raise_exception("the roles of this model are user, assistant (or model) and system") -}}
{%- endif -%}
{{- '<|turn>' + role + '\\n' + message['content'] | trim + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into ``folder``."""
    tokenizer = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    # A role is one token only right before a line end, as in a turn header; elsewhere it is spelled.
    tokenizer.pre_tokenizer = Split(Regex(r"(?:user|model|system)(?=\n)|[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
