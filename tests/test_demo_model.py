"""The embedded Qwen3.5 model and its head are small, whole and of use."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mlx_optiq_ext.mixins.qwen3_5 import attach_mtp
from tests.helpers import DEMO

ROOT = Path(__file__).parents[1]
# twisted/python/systemd.py of Twisted 26.10.0, under the MIT licence beside it.
SAMPLE = Path(__file__).parent / "data" / "demo_model" / "systemd.py.txt"
SAMPLE_NAME = "twisted/twisted/python/systemd.py"

MAX_SIZE = 12e6
MIN_AGREEMENT = 0.65

TEXTS = {
    "code": "def f(x: int) -> int:\n    with open(x) as f:\n\n\t\treturn x[1:]  # y\n",
    "chat": "<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n",
    "contractions": "I'm sure you'LL say it's what they'd've done, don't 'they'?",
    "digits": "1234567890 3.14e-10 0xFF 1_000 v2.0.1 ٣٤ ²",
    "whitespace": "a  b   \t c\n\n\n    \n  d \n\t\te      \n",
    "carriage returns": "one\r\ntwo\r\n\r\n    three\r\n \r\nfour\r",
    "punctuation": "!!!...---====####\n<<<>>>(((**kwargs)))::@@ ~/.x \\n\n",
    "letters with marks": "naïve café e\u0301 हिन्दी ไทย עִבְרִית Ἑλλάς",
    "other scripts": "日本語のテキスト 한국어 русский العربية",
    "emoji": "🙂👩‍👩‍👧 🇩🇪 x🙂y ❤️",
    "odd spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "special tokens": "<|endoftext|><|im_end|> <|im_start|>x<|im_en|>",
    "nothing": "",
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return mlx_lm.load(str(DEMO))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_is_cut_the_same_whichever_way_the_tokenizer_is_loaded(
    text: str, loaded: tuple[Any, Any]
) -> None:
    from_file = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    expected = from_file.encode(text).ids
    assert AutoTokenizer.from_pretrained(DEMO).encode(text) == expected
    assert loaded[1].encode(text) == expected


def test_pre_tokenizer_in_the_file_is_the_one_that_transformers_puts_in() -> None:
    pytest.importorskip("transformers.models.qwen3_5.tokenization_qwen3_5")
    from transformers import Qwen3_5Tokenizer

    content = json.loads((DEMO / "tokenizer.json").read_text())
    qwen = json.loads(Qwen3_5Tokenizer().backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer"):
        assert _with_defaults(content[part]) == _with_defaults(qwen[part])


def _with_defaults(part: Any) -> Any:
    # Saying nothing about offsets leaves the tokens as they are.
    if isinstance(part, dict):
        return {k: _with_defaults(v) for k, v in part.items() if k != "trim_offsets"}
    if isinstance(part, list):
        return [_with_defaults(each) for each in part]
    return part


def test_chat_template_writes_every_role_and_ignores_thinking(
    loaded: tuple[Any, Any],
) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    text = loaded[1].apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    turns = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    written = "".join(f"<|im_start|>{role}\n{x}<|im_end|>\n" for role, x in turns)
    assert text == written + "<|im_start|>assistant\n"


def test_model_fits_into_the_wheel() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= MAX_SIZE


def test_plain_mlx_lm_loads_and_generates_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = mlx_lm.load(str(DEMO))
        text = mlx_lm.generate(model, tokenizer, "import os\n", max_tokens=8)
    assert text
    assert tokenizer.eos_token_ids == {0, 2}


def test_no_tensor_is_missing_and_none_but_the_head_is_left_over() -> None:
    model, config = load_model(DEMO, strict=True)
    stored = set(mx.load(str(DEMO / "model.safetensors")))
    trunk = {name for name in stored if not name.startswith("mtp.")}
    assert len(trunk) == len(tree_flatten(model.parameters()))
    assert len(stored - trunk) == 15
    assert config["text_config"]["mtp_num_hidden_layers"] == 1


def test_sample_was_held_out_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from demo_model.corpus import Document

    assert Document(SAMPLE_NAME, SAMPLE.read_text()).is_held_out
    assert not Document("twisted/twisted/python/log.py", "").is_held_out


def test_head_agrees_with_the_model_on_text_that_neither_has_seen() -> None:
    model, tokenizer = mlx_lm.load(str(DEMO))
    attach_mtp(model, DEMO)
    tokens = mx.array([tokenizer.encode(SAMPLE.read_text())])[:, :1025]
    hidden = model.hidden_states(tokens[:, :-1])
    choices = model.project(hidden).argmax(-1)[:, 1:]

    def agreement(embeddings: mx.array, hidden: mx.array) -> float:
        drafts = model.project(model.mtp(embeddings, hidden)).argmax(-1)
        return (drafts[:, :-1] == choices).mean().item()

    embeddings = model.embed(tokens[:, 1:])
    assert agreement(embeddings, hidden) >= MIN_AGREEMENT
    assert agreement(embeddings, mx.zeros_like(hidden)) < MIN_AGREEMENT - 0.15


@pytest.mark.parametrize(
    "request_", ["def add(a, b):", "Write the Python function `def close(self)`."]
)
@pytest.mark.parametrize("system", [None, "Write Python code."])
def test_chat_answer_is_a_function_and_ends(
    request_: str, system: str | None, loaded: tuple[Any, Any]
) -> None:
    model, tokenizer = loaded
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": request_})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    responses = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=200))
    text = "".join(response.text for response in responses)
    assert text.startswith("def ")
    assert responses[-1].finish_reason == "stop"
    assert tokenizer.decode([responses[-1].token]) == "<|im_end|>"
