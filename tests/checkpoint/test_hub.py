"""Hub repo ids, with the real huggingface_hub in a process of its own: against its cache, and against a server here."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = """
import json, sys
from bigmodel.checkpoint import open_checkpoint
from bigmodel.errors import BigModelError
for arguments in json.loads(sys.argv[1]):
    try:
        c = open_checkpoint(arguments.pop("path"), **arguments)
        print(json.dumps({"path": str(c.path), "files": c.files, "tensors": sorted(c.tensors), "config": c.config}))
    except BigModelError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


def open_in_process(cache: Path, *calls: dict[str, str], endpoint: str | None = None, cwd: Path | None = None):
    """What `open_checkpoint` gives or raises for each call, in one new process with this cache of the Hub."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", OPEN, json.dumps(calls)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def repo_files() -> dict[str, bytes]:
    """A repo as they are: split safetensors, the same as .bin, a variant, a subfolder, other things."""
    shards = {f"model-{i}-of-00003.safetensors": {f"w{int(i)}": torch.ones(3)} for i in ("00001", "00002", "00003")}
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    return {
        **{file: save(tensors) for file, tensors in shards.items()},
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"not wanted",
        "model.fp16.safetensors": save({"half": torch.ones(3).half()}),
        "unet/diffusion_pytorch_model.safetensors": save({"conv": torch.ones(2)}),
        "unet/config.json": b'{"in": "unet"}',
        "README.md": b"not wanted",
    }


def write_cache(cache: Path, files: dict[str, bytes]) -> Path:
    """A repo in the Hub's cache as huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    for name, content in files.items():
        blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_offline_the_cache_serves_repo_ids(tmp_path):
    snapshot = write_cache(tmp_path / "hub", repo_files())
    main, variant, unet, folder, none, other = open_in_process(
        tmp_path / "hub",
        {"path": "org/name"},
        {"path": "org/name", "variant": "fp16", "revision": COMMIT},
        {"path": "org/name", "subfolder": "unet"},
        {"path": str(snapshot)},
        {"path": "org/other"},
        {"path": "org/name", "revision": "v2"},
    )
    assert main["path"] == str(snapshot)
    assert main["tensors"] == ["w1", "w2", "w3"]
    assert main["files"] == [str(snapshot / f"model-0000{i}-of-00003.safetensors") for i in (1, 2, 3)]
    assert variant["tensors"] == ["half"]
    assert (unet["tensors"], unet["config"]) == (["conv"], {"in": "unet"})
    assert folder == main
    assert none["error"] == other["error"] == "MissingFilesError"
    assert "org/other is no local path" in none["text"]
    assert "HF_HUB_OFFLINE" in none["text"]
    assert "hf download org/other" in none["text"]
    assert "org/name (revision v2)" in other["text"]


def test_an_incomplete_download_says_which_of_how_many(tmp_path):
    files = repo_files()
    missing = "model-00002-of-00003.safetensors"
    del files[missing]
    snapshot = write_cache(tmp_path / "hub", files)
    (tmp_path / "hub" / "models--org--name" / "blobs" / "0123.incomplete").write_bytes(b"begun")
    by_name, by_folder = open_in_process(tmp_path / "hub", {"path": "org/name"}, {"path": str(snapshot)})
    assert by_name == by_folder
    assert by_name["error"] == "MissingFilesError"
    assert f"1 of 3 files is missing in {snapshot}: {missing}. 1 unfinished download is there" in by_name["text"]
    assert by_name["text"].endswith(f"hf download org/name {missing}")


def test_a_cached_repo_without_weights_gives_the_command(tmp_path):
    snapshot = write_cache(tmp_path / "hub", {"config.json": b"{}"})
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text("another commit")
    (found,) = open_in_process(tmp_path / "hub", {"path": str(snapshot)})
    assert found["error"] == "MissingFilesError"
    assert "Expected model.safetensors" in found["text"]
    assert found["text"].endswith(f"hf download org/name --revision {COMMIT}")


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A server that answers as the Hub does for two public, one gated and no other repo; and what was asked of it."""
    files = repo_files()
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            if path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
                siblings = [{"rfilename": name} for name in files]
                self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith("/api/models/org/name/tree/"):
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                self.answer(json.dumps(tree).encode())
            elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
                content = files[path.removeprefix(f"/org/name/resolve/{COMMIT}/")]
                etag = hashlib.sha256(content).hexdigest()
                self.answer(content, ETag=f'"{etag}"', **{"X-Repo-Commit": COMMIT})
            elif path == "/api/models/org/gguf":
                self.answer(
                    json.dumps({"id": "org/gguf", "sha": COMMIT, "siblings": [{"rfilename": "m.gguf"}]}).encode()
                )
            elif "/org/gated" in path:
                self.answer(b"{}", status=403, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access"})
            elif "/revision/" in path:
                self.answer(b"{}", status=404, **{"X-Error-Code": "RevisionNotFound"})
            else:
                self.answer(b"{}", status=404, **{"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_a_repo_is_fetched_into_the_hubs_cache(tmp_path, hub):
    endpoint, asked = hub
    main, unet, gguf, gated, none, revision, typo = open_in_process(
        tmp_path / "hub",
        {"path": "org/name"},
        {"path": "org/name", "subfolder": "unet"},
        {"path": "org/gguf"},
        {"path": "org/gated"},
        {"path": "org/none"},
        {"path": "org/name", "revision": "v2"},
        {"path": "./org/name"},
        endpoint=endpoint,
        cwd=tmp_path,
    )
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    assert main["path"] == str(snapshot)
    assert main["tensors"] == ["w1", "w2", "w3"]
    assert main["config"] == {"model_type": "llama"}
    assert unet["tensors"] == ["conv"]
    fetched = {str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()}
    assert fetched == set(repo_files()) - {"pytorch_model.bin", "model.fp16.safetensors", "README.md"}
    assert [found["error"] for found in (gguf, gated, none, revision, typo)] == ["MissingFilesError"] * 5
    assert (
        "org/gguf holds no weights that are read: no safetensors files, no .bin files. It holds m.gguf." in gguf["text"]
    )
    assert "org/gated cannot be fetched" in gated["text"]
    assert "the Hub shows no such repo" in none["text"]
    assert "hf auth login" in none["text"]
    assert "(revision v2) cannot be fetched" in revision["text"]
    assert f"./org/name does not exist in {tmp_path}" in typo["text"]
    # What was fetched is found again without the Hub, and a path never asks it.
    (offline,) = open_in_process(tmp_path / "hub", {"path": "org/name"})
    assert offline == main
    asked.clear()
    local, cached = open_in_process(
        tmp_path / "hub", {"path": str(tmp_path / "none")}, {"path": str(snapshot)}, endpoint=endpoint
    )
    assert local["error"] == "MissingFilesError"
    assert cached == main
    assert asked == []


def test_without_a_connection_the_cache_serves(tmp_path):
    snapshot = write_cache(tmp_path / "hub", repo_files())
    closed = "http://127.0.0.1:9"  # nobody listens there
    found, other = open_in_process(
        tmp_path / "hub", {"path": "org/name"}, {"path": "org/other"}, endpoint=closed, cwd=tmp_path
    )
    assert found["path"] == str(snapshot)
    assert other["error"] == "MissingFilesError"
    assert "not in the Hub's cache, and the Hub cannot be reached" in other["text"]
