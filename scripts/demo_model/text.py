"""The tokenizer and the token streams that training reads."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

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
VOCAB_SIZE = 6144
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Every so many files teach the tokenizer.
_TOKENIZER_STEP = 6
_NUM_HELD_OUT_PROMPTS = 200
_NUM_ENCODED_TOGETHER = 1000


def train_tokenizer(documents: Iterable[Document]) -> Tokenizer:
    """Train a byte-level BPE on Qwen's normaliser and pre-tokenizer.

    Args:
        documents (list): The corpus; some of its training files are read.
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
    trained = (document for document in documents if not document.is_held_out)
    texts = (document.text for document in islice(trained, 0, None, _TOKENIZER_STEP))
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
    """Write the token streams, uint16 ids in a .npy file each, and what is held out.

    Args:
        documents (list): The whole corpus.
        tokenizer (Tokenizer): What cuts it.
        folder (Path): Where the files go.

    Returns:
        dict: The number of tokens of each stream.
    """
    held_out = [document for document in documents if document.is_held_out]
    trained = [document for document in documents if not document.is_held_out]
    random.Random(0).shuffle(trained)
    conversations = make_conversations(held_out, seed=2)
    texts = {
        "code": _file_texts(trained),
        "chat": _chat_texts(make_conversations(trained, seed=1)),
        "held_out_code": _file_texts(held_out),
        "held_out_chat": _chat_texts(conversations),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_held_out(held_out, conversations, folder)
    sizes = {}
    for name, each in texts.items():
        tokens = _encode(each, tokenizer)
        np.save(folder / f"{name}.npy", tokens)
        sizes[name] = len(tokens)
    return sizes


def _file_texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def _chat_texts(conversations: list[list[Message]]) -> list[str]:
    return [render(messages) for messages in conversations]


def _encode(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Encode texts, each behind an end of text, a few at a time to save memory."""
    parts = [
        np.array([END_OF_TEXT, *encoding.ids], np.uint16)
        for start in range(0, len(texts), _NUM_ENCODED_TOGETHER)
        for encoding in tokenizer.encode_batch_fast(
            texts[start : start + _NUM_ENCODED_TOGETHER]
        )
    ]
    return np.concatenate(parts)


def _write_held_out(
    documents: list[Document], conversations: list[list[Message]], folder: Path
) -> None:
    content = {
        "files": {document.name: document.text for document in documents},
        "conversations": conversations[:_NUM_HELD_OUT_PROMPTS],
    }
    (folder / "held_out.json").write_text(json.dumps(content))
