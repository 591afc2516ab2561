"""Only the files with the head are fetched from the Hub, and only if they must be."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub.constants
import mlx.core as mx
import pytest

from mlx_optiq_ext._errors import SpeculationError
from mlx_optiq_ext.heads import load_head
from mlx_optiq_ext.heads._hub import HubRepo, parse_repo_id, repo_of_snapshot
from mlx_optiq_ext.heads._locate import files_to_fetch
from tests.heads.variants import (
    DENSE,
    absolute,
    assert_same,
    convert,
    oracle,
    prefixed,
    reference_head,
    text_args,
    write,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"


def load_same(source: Path | str) -> None:
    found = load_head(source, text_args(DENSE), mx.float32)
    assert_same(found, reference_head(DENSE))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def offline(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def snapshot(cache: Path, repo_id: str, source: Path, *names: str) -> Path:
    """Put files into the cache as the client does after downloading only those."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    folder = repo / "snapshots" / COMMIT
    for name in names or [str(p.relative_to(source)) for p in source.rglob("*.*")]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return folder


@dataclass
class Hub:
    """A repository that is served as the Hub does, and what was asked of it."""

    folder: Path
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[bytes, dict[str, str]]:
        files = [p for p in sorted(self.folder.rglob("*.*")) if p.is_file()]
        names = [str(p.relative_to(self.folder)) for p in files]
        assert "/main" in path or COMMIT in path or path.endswith("org/head")
        if "/tree/" in path:
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": (self.folder / name).stat().st_size,
                    "oid": self.etag(name),
                }
                for name in names
            ]
            return json.dumps(entries).encode(), {}
        if path.startswith("/api/"):
            info = {"id": "org/head", "sha": COMMIT, "siblings": []}
            info["siblings"] = [{"rfilename": name} for name in names]
            return json.dumps(info).encode(), {}
        name = path.split(f"/resolve/{COMMIT}/")[-1].split("/resolve/main/")[-1]
        headers = {"ETag": f'"{self.etag(name)}"', "X-Repo-Commit": COMMIT}
        return (self.folder / name).read_bytes(), headers

    def etag(self, name: str) -> str:
        return hashlib.sha1((self.folder / name).read_bytes()).hexdigest()

    def downloads(self) -> set[str]:
        return {
            path.split(f"/{COMMIT}/")[-1]
            for method, path in map(str.split, self.requests)
            if method == "GET" and "/resolve/" in path
        }


@pytest.fixture
def hub(tmp_path, hub_cache, monkeypatch) -> Iterator[Hub]:
    served = Hub(tmp_path / "served")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            served.requests.append(f"{self.command} {self.path.partition('?')[0]}")
            content, headers = served.answer(self.path.partition("?")[0])
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield served
    server.shutdown()
    server.server_close()


def test_repositories_are_recognised_by_name_and_by_snapshot(tmp_path):
    assert parse_repo_id("Qwen/Qwen3.5-4B") == HubRepo("Qwen/Qwen3.5-4B")
    assert not parse_repo_id("Qwen3.5-4B")
    assert not parse_repo_id("../Qwen3.5-4B")
    assert not parse_repo_id("/models/Qwen3.5-4B")

    folder = tmp_path / "models--Qwen--Qwen3.5-4B" / "snapshots" / COMMIT
    assert repo_of_snapshot(folder) == HubRepo("Qwen/Qwen3.5-4B", COMMIT, tmp_path)
    assert not repo_of_snapshot(tmp_path / "datasets--a--b" / "snapshots" / COMMIT)
    assert not repo_of_snapshot(tmp_path / "models--a--b" / "refs" / COMMIT)


def test_of_a_repository_the_files_with_the_head_are_chosen(tmp_path):
    config, _, head = oracle(DENSE)
    shards = {
        "model-00001-of-00002.safetensors": {"lm_head.weight": mx.zeros((1,))},
        "model-00002-of-00002.safetensors": prefixed(head),
    }
    folder = write(tmp_path, config, shards, with_index=True)
    names = [*shards, "config.json", "optiq/other.safetensors"]
    chosen = files_to_fetch(folder, [*names, INDEX])
    assert chosen == ["model-00002-of-00002.safetensors"]
    sidecars = ["mtp.safetensors", "optiq/mtp.safetensors"]
    assert files_to_fetch(folder, [*names, INDEX, *sidecars]) == sidecars[1:]
    assert files_to_fetch(folder, names) == list(shards)

    config["mlx_lm_extra_tensors"] = {"mtp_file": "optiq/other.safetensors"}
    write(tmp_path, config, {})
    chosen = files_to_fetch(folder, [*names, INDEX, *sidecars])
    assert chosen == ["optiq/other.safetensors"]


def test_of_an_index_without_a_head_nothing_is_chosen(tmp_path):
    config, trunk, _ = oracle(DENSE)
    folder = write(tmp_path, config, {"model.safetensors": trunk}, with_index=True)
    assert files_to_fetch(folder, ["model.safetensors", INDEX]) == []


@pytest.mark.usefixtures("offline")
def test_a_cached_repository_is_read_without_the_hub(tmp_path, hub_cache):
    config, _, head = oracle(DENSE)
    files = {"model.safetensors": absolute(head)}
    source = write(tmp_path / "head", config, files, {"format": "mlx"})
    snapshot(hub_cache, "org/head", source)
    load_same("org/head")


@pytest.mark.usefixtures("hub_cache", "offline")
def test_a_repository_that_cannot_be_reached_is_named():
    with pytest.raises(SpeculationError, match="org/head, revision main") as error:
        load_head("org/head", text_args(DENSE), mx.float32)
    assert error.value.__cause__ is not None


@pytest.mark.usefixtures("offline")
def test_a_cached_model_whose_sidecar_cannot_be_fetched_is_named(tmp_path, hub_cache):
    folder = snapshot(hub_cache, "org/model", convert(DENSE, tmp_path / "model"))
    with pytest.raises(SpeculationError, match=f"org/model, revision {COMMIT}"):
        load_head(folder, text_args(DENSE), mx.float32)


def test_the_sidecar_of_a_cached_model_is_fetched_and_nothing_else(hub, tmp_path):
    *_, head = oracle(DENSE)
    convert(DENSE, hub.folder)
    files = {
        "optiq/mtp.safetensors": prefixed(head),
        "mtp.safetensors": {"x": head["norm.weight"]},
    }
    write(hub.folder, None, files)
    names = [p.name for p in hub.folder.glob("*.*") if p.name != "mtp.safetensors"]
    folder = snapshot(tmp_path / "other", "org/model", hub.folder, *names)
    load_same(folder)
    assert hub.downloads() <= {"optiq/mtp.safetensors", "config.json", INDEX}
    assert (folder / "optiq" / "mtp.safetensors").is_file()
    assert not (folder / "mtp.safetensors").exists()

    hub.requests.clear()
    load_same(folder)
    assert hub.requests == []


@pytest.mark.usefixtures("hub_cache")
def test_of_a_repository_by_name_only_the_shard_with_the_head_is_fetched(hub):
    config, trunk, head = oracle(DENSE)
    shards = {
        "model-00001-of-00002.safetensors": trunk,
        "model-00002-of-00002.safetensors": prefixed(head),
    }
    write(hub.folder, config, shards, with_index=True)
    load_same("org/head")
    assert hub.downloads() == {"config.json", INDEX, "model-00002-of-00002.safetensors"}


@pytest.mark.usefixtures("hub_cache")
def test_a_repository_without_a_head_is_named(hub):
    convert(DENSE, hub.folder)
    with pytest.raises(SpeculationError, match=r"no MTP head in .*models--org--model"):
        load_head("org/model", text_args(DENSE), mx.float32)
