"""The tokenizer and the token streams that training reads."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from .chat import Message, make_conversations
from .corpus import Document

# As transformers' Qwen3_5Tokenizer has it: whatever a `qwen3_5` folder says, recent
# transformers cut text with this pattern, so the model must be trained on it.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, _, END_OF_TURN = range(len(SPECIAL_TOKENS))
VOCAB_SIZE = 2048
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_CHAT_SHARE = 0.9
_CHAT_BLOCK = 2000


def train_tokenizer(documents: Iterable[Document]) -> Tokenizer:
    """Train a byte-level BPE on Qwen's normaliser and pre-tokenizer.

    Args:
        documents (list): The training files.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in documents)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `TOKENIZER_FILES`.

    Args:
        tokenizer (Tokenizer): What `train_tokenizer` returned.
        folder (Path): Where the files go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, settings, template = (folder / name for name in TOKENIZER_FILES)
    tokenizer.save(str(vocabulary), pretty=False)
    end_of_text, start_of_turn, end_of_turn = SPECIAL_TOKENS
    config = {
        "add_prefix_space": False,
        "additional_special_tokens": [start_of_turn, end_of_turn],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": end_of_turn,
        "model_max_length": 4096,
        "pad_token": end_of_text,
        "tokenizer_class": "Qwen3_5Tokenizer",
        "unk_token": None,
    }
    settings.write_text(json.dumps(config, indent=2) + "\n")
    template.write_text(CHAT_TEMPLATE)


def render(messages: list[Message]) -> str:
    """Render a whole conversation as the chat template does."""
    return Template(CHAT_TEMPLATE).render(messages=messages)


def write_streams(
    documents: list[Document], tokenizer: Tokenizer, folder: Path
) -> dict[str, int]:
    """Write streams.npz: `train`, and held out `code` and `chat`, uint16 token ids.

    Args:
        documents (list): The whole corpus.
        tokenizer (Tokenizer): What cuts it.
        folder (Path): Where the files go.

    Returns:
        dict: The number of tokens of each stream.
    """
    held_out = [document for document in documents if document.is_held_out]
    trained = [document for document in documents if not document.is_held_out]
    held_out_chat = make_conversations(held_out, share=1.0, seed=2)
    chat = make_conversations(trained, share=_CHAT_SHARE, seed=1)
    blocks = _encode_files(trained, tokenizer) + _encode_chat(chat, tokenizer)
    random.Random(0).shuffle(blocks)
    streams = {
        "train": blocks,
        "code": _encode_files(held_out, tokenizer),
        "chat": _encode_chat(held_out_chat, tokenizer),
    }
    joined: dict[str, Any] = {n: np.concatenate(parts) for n, parts in streams.items()}
    np.savez_compressed(folder / "streams.npz", **joined)
    prompts = [render(messages[:-1]) for messages in held_out_chat[:200]]
    (folder / "chat_prompts.json").write_text(json.dumps(prompts))
    return {name: len(tokens) for name, tokens in joined.items()}


def _encode_files(documents: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    return [
        np.array([END_OF_TEXT, *encoding.ids], np.uint16)
        for encoding in tokenizer.encode_batch(
            [document.text for document in documents]
        )
    ]


def _encode_chat(
    conversations: list[list[Message]], tokenizer: Tokenizer
) -> list[np.ndarray]:
    texts = [SPECIAL_TOKENS[END_OF_TEXT] + render(chat) for chat in conversations]
    blocks: list[np.ndarray] = []
    block: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        block += encoding.ids
        if len(block) > _CHAT_BLOCK:
            blocks.append(np.array(block, np.uint16))
            block = []
    return [*blocks, np.array(block, np.uint16)]
