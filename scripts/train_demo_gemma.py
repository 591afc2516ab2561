"""Make a larger demo pair, Gemma-4 and its assistant, in one go or step by step.

Needs torch, transformers and tokenizers beside the project itself, in any environment;
`train` needs torch and numpy alone, so that it can run on another machine, given
`scripts` and the folder that `corpus` wrote, which is that of `train_demo_model.py`. It
stops after `--max-minutes` and goes on from there when it is run again. Python must be
3.11 for the same corpus, because its standard library is part of it. Seeds are fixed,
but CUDA adds up gradients in no fixed order, so that a second pair is as good and not
the same.

    python scripts/train_demo_gemma.py              # all of them:
    python scripts/train_demo_gemma.py corpus
    python scripts/train_demo_gemma.py train        # 9 minutes on an H100
    python scripts/train_demo_gemma.py export
    python scripts/train_demo_gemma.py measure
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".train" / "gemma"
STEPS = ("corpus", "train", "export", "measure")


def main() -> None:
    """Run some of the four steps."""
    arguments = _parse()
    steps = {
        "corpus": make_corpus,
        "train": train,
        "export": export,
        "measure": measure,
    }
    for step in arguments.step or STEPS:
        steps[step](arguments)


def make_corpus(arguments: argparse.Namespace) -> None:
    """Download the corpus, train the tokenizer, write the token streams."""
    import train_demo_model

    train_demo_model.make_corpus(arguments)


def train(arguments: argparse.Namespace) -> None:
    """Train the language model, then its assistant."""
    from demo_gemma.train import train_assistant, train_target
    from demo_model.loop import Recipe

    options = {
        "max_seconds": 60 * arguments.max_minutes,
        "length": arguments.length,
        "seed": arguments.seed,
    }
    target = Recipe(
        num_steps=arguments.steps, batch_size=arguments.batch_size, **options
    )
    assistant = Recipe(
        num_steps=arguments.assistant_steps,
        batch_size=arguments.batch_size // 2,
        **options,
    )
    work, is_compiled = arguments.work, arguments.compile
    is_done = train_target(
        work, work, target, is_compiled=is_compiled
    ) and train_assistant(work, work, assistant, is_compiled=is_compiled)
    print("done" if is_done else "not done: run this again")


def export(arguments: argparse.Namespace) -> None:
    """Write the model's folder and the assistant's in it."""
    from demo_gemma.export import export

    export(arguments.work, arguments.work, arguments.model)


def measure(arguments: argparse.Namespace) -> None:
    """Print the figures of the model card."""
    from demo_gemma.measure import measure

    figures = measure(arguments.model, arguments.work)
    print(json.dumps(figures, indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="*", choices=STEPS)
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
        help="folder of the model (default: .train/gemma)",
    )
    group = parser.add_argument_group("train")
    group.add_argument("--steps", type=int, default=3546, help="of the model")
    group.add_argument("--assistant-steps", type=int, default=3446)
    group.add_argument(
        "--max-minutes", type=float, default=math.inf, help="of each of the two"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="in sequences; the assistant's is half of it",
    )
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
