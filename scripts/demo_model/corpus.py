"""The corpus: Python's standard library and packages under permissive licences."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Each package's licence is BSD, MIT or Apache-2.0; the standard library's is PSF-2.0.
PACKAGES = (
    "aiohttp==3.14.5",
    "attrs==26.1.0",
    "black==26.10.1",
    "celery==5.7.0",
    "click==8.5.1",
    "dask==2026.8.0",
    "django==5.2.19",
    "fastapi==0.165.0",
    "flask==3.1.3",
    "httpx==0.28.1",
    "ipython==9.18.1",
    "jinja2==3.1.6",
    "mlx-lm==0.32.2",
    "networkx==3.6.1",
    "pandas==3.1.1",
    "pydantic==2.14.3",
    "pytest==9.2.0",
    "requests==2.34.2",
    "rich==15.0.0",
    "scikit-learn==1.9.1",
    "scrapy==2.19.0",
    "setuptools==84.2.1",
    "sphinx==9.0.4",
    "sqlalchemy==2.1.9",
    "starlette==1.10.0",
    "sympy==1.14.0",
    "tornado==6.6.1",
    "twisted==26.10.0",
    "werkzeug==3.1.9",
    "xarray==2026.9.0",
)
STANDARD_LIBRARY = "python"

# Tests repeat themselves, vendored code is another package's (and may be a held-out
# file under another name), the rest is tables.
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "msilib", "turtledemo"),
    *("vendor", "_vendor", "_vendored", "extern", "externals", "third_party"),
    *("encodings", "ensurepip", "locale", "pydoc_data"),
    *("site-packages", "__pycache__"),
}
_MIN_CHARACTERS = 400
_MAX_CHARACTERS = 300_000
_MAX_LINE_LENGTH = 400
_MAX_DIGIT_SHARE = 0.15


@dataclass(frozen=True)
class Document:
    """One source file.

    Args:
        name (str): `package/path/in/package.py`.
        text (str): Its source.
    """

    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether the file is one of the 2 % that training never sees."""
        return int(hashlib.md5(self.name.encode()).hexdigest(), 16) % 50 == 7


def download(folder: Path) -> None:
    """Download the wheels of `PACKAGES` with pip.

    Args:
        folder (Path): Where the wheels go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.11"]
    subprocess.run([*command, f"--dest={folder}", *PACKAGES], check=True)


def read_documents(wheels: Path) -> list[Document]:
    """Read the corpus, each text once, sorted by name.

    Args:
        wheels (Path): A folder that `download` filled.

    Raises:
        FileNotFoundError: A pinned package has no wheel there.
    """
    documents = list(_read_standard_library())
    for pin in PACKAGES:
        documents += _read_wheel(pin, wheels)
    unique: dict[str, Document] = {}
    for document in sorted(documents, key=lambda document: document.name):
        if _is_code(document.text):
            unique.setdefault(document.text, document)
    return list(unique.values())


def _read_standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _is_wanted(name):
            text = path.read_text("utf-8", errors="ignore")
            yield Document(f"{STANDARD_LIBRARY}/{name}", text.replace("\r\n", "\n"))


def _read_wheel(pin: str, wheels: Path) -> Iterator[Document]:
    package, _, version = pin.partition("==")
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    path = next(wheels.glob(pattern), None)
    if path is None:
        raise FileNotFoundError(f"no wheel {pattern} in {wheels}: run `corpus` first")
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            if name.endswith(".py") and _is_wanted(name):
                text = wheel.read(name).decode("utf-8", errors="ignore")
                yield Document(f"{package}/{name}", text.replace("\r\n", "\n"))


def _is_wanted(name: str) -> bool:
    *folders, file = name.split("/")
    if file.startswith(("_sysconfigdata", "test_")):
        return False
    return not any(
        folder in _SKIPPED_FOLDERS or folder.startswith("config-") for folder in folders
    )


def _is_code(text: str) -> bool:
    if not _MIN_CHARACTERS < len(text) < _MAX_CHARACTERS:
        return False
    if max(map(len, text.split("\n"))) > _MAX_LINE_LENGTH:
        return False
    return sum(map(str.isdigit, text)) < _MAX_DIGIT_SHARE * len(text)
