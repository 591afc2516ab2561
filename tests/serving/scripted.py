"""Makes the folder of the model that says what it is told to."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|image_start|>",
    "<|patch|>",
    "<|image_end|>",
)
MERGES = (("S", "T"), ("ST", "O"), ("O", "P"), ("h", "i"))
MAX_POSITIONS = 4096

TEMPLATE = """\
{%- if tools %}<|im_start|>tools
{%- for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>
{% endif %}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content or [] %}
{%- if part.type == "text" %}{{ part.text }}{% else %}<|patch|>{% endif %}
{%- endfor %}{% endif %}
{%- for tool_call in message.tool_calls or [] %}<tool_call>
{%- set tool_call = tool_call.function or tool_call %}
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

# A template that takes what it was made for and nothing else: one system message, and
# that first; roles that it knows; arguments that are objects, which it writes as
# <tool_call>\n<function=f>; and replies that begin with a thought.
STRICT = """\
{%- for message in messages %}
{%- if message.role not in ("system", "user", "assistant", "tool") %}
{{- raise_exception("Unexpected message role.") }}{% endif %}
{%- if message.role == "system" and not loop.first %}
{{- raise_exception("System message must be at the beginning.") }}{% endif %}
{%- for tool_call in message.tool_calls or [] %}
{%- for name, value in (tool_call.function or tool_call).arguments | items %}
{%- endfor %}{% endfor %}{% endfor %}"""
STRICT_ENDING = """\
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""


def strict_template() -> str:
    beginning, _, _ = TEMPLATE.partition("{%- if add_generation_prompt %}")
    return STRICT + beginning + STRICT_ENDING


def make_model(
    folder: Path,
    *,
    takes_images: bool = False,
    is_strict: bool = False,
    max_positions: int = MAX_POSITIONS,
    markers: str = "",
) -> Path:
    """Write the model's files into a folder.

    Args:
        folder (Path): Is made if it is not there.
        takes_images (bool): Whether images are taken.
        is_strict (bool): Whether the chat template refuses what it was not made for.
        max_positions (int): The size of the context.
        markers (str): What the chat template mentions, by which mlx-lm knows the
            format of calls; "" for calls as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    vocab_size = make_tokenizer().get_vocab_size()
    eos = make_tokenizer().token_to_id("<|im_end|>")
    config = {
        "model_type": "scripted",
        "model_file": "scripted_model.py",
        "vocab_size": vocab_size,
        "eos_token_id": eos,
        "max_position_embeddings": max_positions,
    }
    template = strict_template() if is_strict else TEMPLATE
    if takes_images:
        from mlx_lm.processors import PROCESSORS

        name, processor = next(iter(PROCESSORS.items()))
        config |= {"vision_config": {"patch_size": 14, "merge_size": 2}}
        config |= {"processor_type": name}
        # What stands for an image in a template, where that is not the patch's token.
        module = sys.modules[processor.__module__]
        image = getattr(module, "IMAGE_PLACEHOLDER", "<|patch|>")
        template = TEMPLATE.replace("<|patch|>", image)
    write(folder / "config.json", config)
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
    )
    if markers:
        template += f"{{# {markers} #}}"
    (folder / "chat_template.jinja").write_text(template)
    mx.save_safetensors(str(folder / "model.safetensors"), {"unused": mx.zeros((1,))})
    shutil.copy(Path(__file__).with_name("scripted_model.py"), folder)
    return folder


def make_tokenizer() -> Tokenizer:
    alphabet = byte_alphabet()
    vocab = {character: index for index, character in enumerate(alphabet)}
    for pair in MERGES:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL[:2]))
    tokenizer.add_tokens(list(SPECIAL[2:]))
    return tokenizer


def byte_alphabet() -> list[str]:
    """GPT-2's characters for bytes; the first 94 are those of printable ASCII."""
    printable = [chr(code) for code in range(33, 127)]
    return printable + sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(printable))


TOKENIZER = make_tokenizer()


def say(*pieces: str, **options: Any) -> str:
    """The message on which the model says the pieces, each tokenised on its own.

    Args:
        pieces: Text of the reply.
        options: ``sleep``, ``prefill_sleep`` and ``fail_at`` of the model.
    """
    ids = [token for piece in pieces for token in TOKENIZER.encode(piece).ids]
    script = json.dumps({"ids": ids, **options}, separators=(",", ":"))
    return f"@{script}@"


def call(name: str, arguments: Any) -> str:
    """The text with which the model calls a tool."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
