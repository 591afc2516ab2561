"""Make a larger demo model: `corpus`, then `train`, then `export`, then `measure`.

Needs the project, whose mlx-lm brings transformers and tokenizers, and torch. `train`
needs torch and numpy alone, so that it can run on another machine, given `scripts` and
the folder that `corpus` wrote; on a CPU use `--no-compile`, far fewer `--steps`, and
patience. It stops after `--max-minutes` and goes on from there when it is run again.
The corpus holds the standard library of the Python that runs: use 3.11 for the very
same tokens. Seeds are fixed, but CUDA adds up gradients in no fixed order, so that a
second model is as good and not the same.

    python scripts/train_demo_model.py corpus
    python scripts/train_demo_model.py train        # 9 minutes on an H100
    python scripts/train_demo_model.py export
    python scripts/train_demo_model.py measure
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".train" / "qwen"
BASELINE = ROOT / "mlx_optiq_ext" / "demo_model"


def main() -> None:
    """Run one of the four steps."""
    arguments = _parse()
    {
        "corpus": make_corpus,
        "train": train,
        "export": export,
        "measure": measure,
    }[
        arguments.step
    ](arguments)


def make_corpus(arguments: argparse.Namespace) -> None:
    """Download the corpus, train the tokenizer, write the token streams."""
    from demo_model import corpus, text

    wheels = arguments.work / "wheels"
    corpus.download(wheels)
    documents = corpus.read_documents(wheels)
    tokenizer = text.train_tokenizer(documents)
    text.save_tokenizer(tokenizer, arguments.work)
    print(text.write_streams(documents, tokenizer, arguments.work))


def train(arguments: argparse.Namespace) -> None:
    """Train on the token streams."""
    from demo_model.train import Recipe, train

    recipe = Recipe(
        num_steps=arguments.steps,
        max_seconds=60 * arguments.max_minutes,
        batch_size=arguments.batch_size,
        length=arguments.length,
        seed=arguments.seed,
    )
    is_done = train(
        arguments.work, arguments.work, recipe, is_compiled=arguments.compile
    )
    print("done" if is_done else "not done: run this again")


def export(arguments: argparse.Namespace) -> None:
    """Write the model folder."""
    from demo_model.export import export

    export(arguments.work / "checkpoint.pt", arguments.work, arguments.model)


def measure(arguments: argparse.Namespace) -> None:
    """Print the figures of the model card."""
    from demo_model.measure import measure

    figures = measure(arguments.model, arguments.work, arguments.baseline)
    print(json.dumps(figures, indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["corpus", "train", "export", "measure"])
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / ".train",
        help="folder of everything that is not the model (default: .train)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=MODEL,
        help="folder of the model (default: .train/qwen)",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        default=BASELINE,
        help="folder of the model to compare with (default: the embedded one)",
    )
    group = parser.add_argument_group("train")
    group.add_argument("--steps", type=int, default=3021)
    group.add_argument("--max-minutes", type=float, default=math.inf)
    group.add_argument("--batch-size", type=int, default=64, help="in sequences")
    group.add_argument("--length", type=int, default=1024, help="of a sequence")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile with torch.compile; --no-compile is for a quick look on a CPU",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
