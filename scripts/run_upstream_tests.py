"""Run mlx-lm's own tests with this project switched off and on, and compare.

python scripts/run_upstream_tests.py [--tests FILE ...] [--sdist FILE] [--keep]

Wants this project, `requests` and `mlx-lm[test]` in the environment that runs it. The
tests run offline: a tiny model with random weights takes the place of the one that they
download, and those that need something else fail, switched off and on alike.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

MODEL = "mlx-community/Qwen1.5-0.5B-Chat-4bit"
REVISION = "0" * 40
QUANTIZATION = {"group_size": 64, "bits": 4}
SWITCH = "MLX_OPTIQ_EXT"
WRONG_STATE = 100  # exit status of a run that tested something else
RESULTS = {"failure": "failed", "error": "errors", "skipped": "skipped"}
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Outcome(NamedTuple):
    """The outcome of a test, named as in the table, and its reasons."""

    result: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.result} ({' and '.join(self.reasons)})".removesuffix(" ()")

    @property
    def essence(self) -> str:
        """The outcome without what every run changes: numbers and temporary files."""
        folder = re.escape(tempfile.gettempdir())
        return re.sub(rf"0x[0-9a-f]+|\d+|{folder}\S+", "", str(self))


NOT_RUN = Outcome("not run")


class Run(NamedTuple):
    """One run of the tests: their outcomes, and pytest's exit status."""

    state: str
    outcomes: dict[str, Outcome]
    status: int
    seconds: float

    @property
    def is_complete(self) -> bool:
        return self.status in (0, 1)


def main() -> int:
    args = _parse_args()
    if util.find_spec("requests") is None:
        sys.exit("error: the tests of the server need `requests`, please install it")
    folder = Path(tempfile.mkdtemp(prefix="mlx-lm-tests-"))
    try:
        return run_all(args.tests, args.sdist, folder)
    finally:
        if args.keep:
            print(f"The tests and the reports on them are in {folder}")
        else:
            shutil.rmtree(folder)


def run_all(tests: list[str], sdist: Path | None, folder: Path) -> int:
    """Run the tests twice and print how the outcomes differ.

    Args:
        tests: Files of mlx-lm's tests, or ids of tests in them; all if empty.
        sdist: mlx-lm's source distribution, downloaded if None.
        folder: An empty folder to work in.

    Returns:
        0 if both runs came to the same outcomes, else 1.
    """
    version = metadata.version("mlx-lm")
    unpack_tests(sdist or download(version, folder), version, folder)
    make_model(folder / "hub")
    runs = [run_tests(state, tests, folder) for state in ("off", "on")]
    print_table(version, runs)
    differences = compare(*(run.outcomes for run in runs))
    if not all(run.is_complete for run in runs):
        return 1
    print("\n".join(differences or ["No outcome differs."]))
    return 1 if differences else 0


def download(version: str, folder: Path) -> Path:
    """Download the source distribution of a release of mlx-lm with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=mlx-lm", f"--dest={folder}", f"mlx-lm=={version}"]
    subprocess.run(command, check=True)
    return next(folder.glob("mlx*.tar.gz"))


def unpack_tests(sdist: Path, version: str, folder: Path) -> None:
    """Unpack `tests` alone: the package beside it would hide the installed one."""
    top = f"mlx_lm-{version}"
    with tarfile.open(sdist) as archive:
        for member in archive:
            if member.name.startswith(f"{top}/tests/"):
                archive.extract(member, folder, filter="data")
    if not (folder / top).exists():
        sys.exit(
            f"error: {sdist} has no {top}/tests, and mlx-lm {version} is installed"
        )
    (folder / top / "tests").rename(folder / "tests")
    shutil.copy(__file__, folder / "tests")
    (folder / "tests" / "pytest.ini").write_text("[pytest]\n")


def make_model(hub: Path) -> None:
    """Make a random 4-bit Qwen2 model where the Hub's cache keeps `MODEL`."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import utils
    from mlx_lm.models import qwen2

    repository = hub / f"models--{MODEL.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    config = {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": save_tokenizer(snapshot),
        "quantization": QUANTIZATION,
    }
    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    nn.quantize(model, **QUANTIZATION)
    utils.save_model(snapshot, model)
    utils.save_config(config, snapshot / "config.json")
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")


def save_tokenizer(folder: Path) -> int:
    """Save a tokenizer whose tokens are the bytes and three special tokens.

    Args:
        folder: Where the files go.

    Returns:
        The number of tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    bytes_alone = Tokenizer(models.BPE(vocabulary, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def run_tests(state: str, tests: list[str], folder: Path) -> Run:
    """Run the tests in a process of their own.

    Args:
        state: Of this project: "off" or "on".
        tests: As for `run_all`.
        folder: The folder with the tests and the model, which gets the report.
    """
    print(f"\n=== {state}", flush=True)
    report = folder / f"{state}.xml"
    # Without the plugin, which is this file, nobody would notice a dead start-up file.
    options = ["-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    options += ["-q", "-rN", "--tb=no", "--disable-warnings", f"--junitxml={report}"]
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder / "tests",
        env=_environment(state, folder),
    )
    seconds = time.perf_counter() - start
    outcomes = read_report(report) if report.exists() else {}
    return Run(state, outcomes, process.returncode, seconds)


def _environment(state: str, folder: Path) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop(SWITCH, None)
    if state == "off":
        environment[SWITCH] = "0"
    return environment | {
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
    }


def read_report(report: Path) -> dict[str, Outcome]:
    """Read the outcomes of the tests, by name, from a report in JUnit's format."""
    return {
        f"{case.get('classname')}.{case.get('name')}".strip("."): _outcome(case)
        for case in ElementTree.parse(report).iter("testcase")
    }


def _outcome(case: ElementTree.Element) -> Outcome:
    for tag, result in RESULTS.items():
        # A test has as many failures as subtests that fail.
        if found := case.findall(tag):
            lines = (each.get("message", "").partition("\n")[0] for each in found)
            return Outcome(result, tuple(dict.fromkeys(lines)))
    return Outcome("passed")


def print_table(version: str, runs: list[Run]) -> None:
    results = ("passed", *RESULTS.values())
    print(f"\nmlx-lm {version:<9}" + "".join(f"{name:>9}" for name in results))
    for run in runs:
        counts = Counter(outcome.result for outcome in run.outcomes.values())
        numbers = "".join(f"{counts[result]:>9}" for result in results)
        print(f"{run.state:<16}{numbers}  in {run.seconds:.0f} s")
        if not run.is_complete:
            print(f"  pytest did not finish: exit status {run.status}")


def compare(off: dict[str, Outcome], on: dict[str, Outcome]) -> list[str]:
    """Describe every test whose outcome differs, in the order of the tests."""
    names = dict.fromkeys([*off, *on])
    pairs = ((name, off.get(name, NOT_RUN), on.get(name, NOT_RUN)) for name in names)
    return [
        f"{name}\n  off: {one}\n  on:  {other}"
        for name, one, other in pairs
        if one.essence != other.essence
    ]


# The hooks below are for the pytest that `run_tests` starts.


def pytest_sessionstart() -> None:
    _check_state()


def pytest_runtest_setup() -> None:
    import mlx.core as mx

    # Many tests make random models: they have to be the same in both runs.
    random.seed(0)
    mx.random.seed(0)


def pytest_sessionfinish() -> None:
    # A patch that does not fit a module imported late undoes all others.
    _check_state()


def _check_state() -> None:
    """End the run unless the patches are in place when, and only when, they should."""
    import pytest
    import wrapt
    from mlx_lm.generate import stream_generate

    expected = os.environ.get(SWITCH) != "0"
    if isinstance(stream_generate, wrapt.FunctionWrapper) == expected:
        return
    found = "is not wrapped" if expected else "is wrapped"
    patches = sys.modules.get("mlx_optiq_ext.patches")
    reason = patches.problem() if patches else "no start-up file of mlx-optiq-ext ran"
    message = f"mlx_lm.generate.stream_generate {found}: {reason}"
    pytest.exit(message, returncode=WRONG_STATE)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run mlx-lm's own tests with this project off and on, and compare."
    )
    parser.add_argument(
        "--tests",
        nargs="+",
        default=[],
        metavar="FILE",
        help="Only these of mlx-lm's test files, such as test_generate.py.",
    )
    parser.add_argument(
        "--sdist",
        type=Path,
        metavar="FILE",
        help="mlx-lm's source distribution, downloaded by default.",
    )
    parser.add_argument(
        "--keep", action="store_true", help="Keep the folder with tests and reports."
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
