"""A model that says what the prompt tells it to; mlx-lm loads it as `model_file`.

The last `@{...}@` of the prompt is JSON: `ids` are the tokens to emit before EOS,
`sleep` seconds to take for each, `prefill_sleep` for the prompt, `fail_at` where to
raise.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

MAX_ROWS = 9  # Of a verify pass.


@dataclass
class ModelArgs:
    vocab_size: int
    eos_token_id: int

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelArgs":
        return cls(config["vocab_size"], config["eos_token_id"])


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = "scripted"
        self.unused = mx.zeros((1,))

    @property
    def layers(self) -> list[nn.Module]:
        return [nn.Module()]

    def embed_inputs(
        self, inputs: mx.array, pixel_values: Sequence[mx.array]
    ) -> mx.array:
        """What the model is to see of images, to which it says nothing."""
        assert all(pixels.ndim == 3 for pixels in pixel_values)
        return mx.zeros((*inputs.shape, 1))

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any],
        input_embeddings: mx.array | None = None,
        **kwargs: Any,
    ) -> mx.array:
        keys = inputs.astype(mx.float32)[:, None, :, None]
        history, _ = cache[0].update_and_fetch(keys, keys)
        rows = history[:, 0, :, 0].astype(mx.int32).tolist()
        tokens = mx.array([self._next(row, inputs.shape[1]) for row in rows])
        return mx.where(mx.arange(self.args.vocab_size) == tokens[..., None], 50.0, 0.0)

    def _next(self, row: list[int], num_new: int) -> list[int]:
        """What follows each of the last tokens; earlier ones nobody asks about."""
        script = read_script(row) or {"ids": []}
        num_said = count_said(row, script["ids"])
        time.sleep(script.get("prefill_sleep" if num_new > 1 else "sleep", 0.0))
        if num_new == 1 and script.get("fail_at") == num_said:
            raise RuntimeError("scripted failure")
        ends = range(len(row) - min(num_new, MAX_ROWS) + 1, len(row) + 1)
        known = [next_token(row[:end], self.args.eos_token_id) for end in ends]
        return [self.args.eos_token_id] * (num_new - len(known)) + known


def next_token(row: list[int], eos_token_id: int) -> int:
    script = read_script(row)
    if script is None:
        return eos_token_id
    ids = script["ids"]
    return [*ids, eos_token_id][count_said(row, ids)]


def count_said(row: list[int], ids: list[int]) -> int:
    return max(
        count
        for count in range(min(len(ids), len(row)) + 1)
        if row[len(row) - count :] == ids[:count]
    )


def read_script(row: list[int]) -> dict[str, Any] | None:
    # The tokens of ASCII text are its bytes in the order of the byte-level alphabet.
    text = "".join(chr(token + 33) if token < 94 else " " for token in row)
    start = text.rfind("@{")
    end = text.find("}@", start)
    return json.loads(text[start + 1 : end + 1]) if start >= 0 <= end else None
