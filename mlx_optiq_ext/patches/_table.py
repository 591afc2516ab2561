"""The one table of all functions that are wrapped in mlx-lm."""

from __future__ import annotations

from typing import NamedTuple


class Patch(NamedTuple):
    """One seam of mlx-lm and the function that goes around it.

    Args:
        module: The module that has the seam. If the module also defines the seam, the
          copies that other modules of its package hold are replaced, too.
        attribute: The name of the seam in the module, dotted for a method:
          ``"APIHandler.do_POST"``.
        wrapper: The place of the wrapper, as ``"module:function"``. The wrapper has
          wrapt's parameters ``(wrapped, instance, args, kwargs)`` and is imported when
          ``module`` is.
        parameters: The names of parameters that the seam must have.
    """

    module: str
    attribute: str
    wrapper: str
    parameters: tuple[str, ...] = ()

    @property
    def seam(self) -> str:
        return f"{self.module}.{self.attribute}"


_HERE = "mlx_optiq_ext.patches"


def _command_line(command: str) -> tuple[Patch, Patch]:
    """List the seams of a command's module, which are the same for every command."""
    module, wrappers = f"mlx_lm.{command}", f"{_HERE}.command_line"
    return (
        Patch(module, "setup_arg_parser", f"{wrappers}:setup_arg_parser"),
        Patch(module, "main", f"{wrappers}:main"),
    )


def _server() -> tuple[Patch, ...]:
    """List the seams of the HTTP server and of its generation thread."""
    module, wrappers = "mlx_lm.server", f"{_HERE}.server"
    seams: dict[str, tuple[str, tuple[str, ...]]] = {
        "run": ("run", ("host", "port", "model_provider")),
        "_make_logits_processors": ("logits_processors", ("args",)),
        "ModelProvider.load": ("load", ("model_path",)),
        "ModelProvider.load_default": ("load_default", ()),
        "main": ("main", ()),
    }
    return tuple(
        Patch(module, attribute, f"{wrappers}:{wrapper}", parameters)
        for attribute, (wrapper, parameters) in seams.items()
    )


def _batching() -> tuple[Patch, ...]:
    """List the seams by which served models are decoded speculatively."""
    wrappers = f"{_HERE}.batching"
    seams: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
        ("generate", "BatchGenerator.__init__"): ("batch_generator", ("model",)),
        ("generate", "batch_generate"): ("batch_generate", ("model", "kwargs")),
        ("generate", "BatchGenerator.insert_segments"): (
            "insert_segments",
            ("segments", "caches"),
        ),
        ("server", "ModelProvider._load"): ("load_served", ("draft_model_path",)),
    }
    return tuple(
        Patch(f"mlx_lm.{module}", attribute, f"{wrappers}:{wrapper}", parameters)
        for (module, attribute), (wrapper, parameters) in seams.items()
    )


def _rows_apart() -> tuple[Patch, ...]:
    """List the seams where mlx-lm computes several rows unlike one row."""
    wrappers = f"{_HERE}.models"
    classes = {
        "bailing_hybrid": "MultiLatentAttention",
        "bailing_moe_v3": "BailingMLA",
        "deepseek_v3": "DeepseekV3Attention",
        "deepseek_v32": "DeepseekV32Attention",
        "glm4_moe_lite": "Glm4MoeLiteAttention",
        "kimi_k3": "KimiK3MLAAttention",
        "kimi_linear": "KimiMLAAttention",
        "longcat_flash": "LongcatFlashMLA",
        "mistral4": "Mistral4Attention",
    }
    parameters = ("hidden_states", "A_log", "B", "C", "dt", "state", "mask")
    return (
        Patch("mlx_lm.models.ssm", "ssm_update", f"{wrappers}:ssm_update", parameters),
        *(
            Patch(
                f"mlx_lm.models.{module}",
                f"{name}.__call__",
                f"{wrappers}:latent_attention",
                ("x", "mask", "cache"),
            )
            for module, name in classes.items()
        ),
    )


PATCHES: tuple[Patch, ...] = (
    Patch(
        "mlx_lm.utils",
        "load_model",
        f"{_HERE}.utils:load_model",
        ("model_path",),
    ),
    Patch(
        "mlx_lm.utils",
        "save",
        f"{_HERE}.convert:save",
        ("dst_path", "src_path_or_repo", "model", "config"),
    ),
    Patch("mlx_lm.convert", "convert", f"{_HERE}.convert:convert", ("hf_path",)),
    Patch("mlx_lm.convert", "configure_parser", f"{_HERE}.convert:configure_parser"),
    Patch(
        "mlx_lm.generate",
        "generate",
        f"{_HERE}.generate:generate",
        ("model", "verbose", "kwargs"),
    ),
    Patch(
        "mlx_lm.generate",
        "stream_generate",
        f"{_HERE}.generate:stream_generate",
        ("model", "tokenizer", "prompt", "max_tokens", "draft_model", "kwargs"),
    ),
    Patch(
        "mlx_lm.generate",
        "speculative_generate_step",
        f"{_HERE}.generate:speculative_generate_step",
        ("prompt", "model", "draft_model", "stream", "num_draft_tokens"),
    ),
    Patch(
        "mlx_lm.generate",
        "generate_step",
        f"{_HERE}.generate:generate_step",
        ("prompt", "model", "stream", "prompt_cache", "prompt_progress_callback"),
    ),
    Patch(
        "mlx_lm.models.qwen3_5",
        "gated_delta_update",
        f"{_HERE}.models:gated_delta_update",
        ("q", "k", "v", "a", "b", "state"),
    ),
    Patch(
        "mlx_lm.models.base",
        "scaled_dot_product_attention",
        f"{_HERE}.models:scaled_dot_product_attention",
        ("queries", "keys", "values", "cache", "scale", "mask", "sinks"),
    ),
    *_rows_apart(),
    *_command_line("generate"),
    *_command_line("chat"),
    *_command_line("benchmark"),
    *_command_line("cache_prompt"),
    *_server(),
    *_batching(),
)
