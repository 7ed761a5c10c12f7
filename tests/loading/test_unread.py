"""Plans for checkpoints whose weights are not here: a Hub repo by its headers, a folder by its config.json."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from families import make_checkpoint

import bigmodel
from bigmodel.errors import MissingFilesError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = bigmodel.Workload(prompt_tokens=8, new_tokens=4)
PLAN = """
import sys, bigmodel
small = bigmodel.Workload(prompt_tokens=8, new_tokens=4)
print(bigmodel.make_plan(sys.argv[1], workload=small, max_memory={"cpu": "1GiB"}).to_json())
"""


@pytest.fixture(scope="module", params=["llama_tied", pytest.param("mixtral", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp("unread") / request.param, torch.bfloat16)


@pytest.fixture
def hub(folder):
    """A server that answers as the Hub does for one repo; and the ranges that were asked of its weights."""
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.partition("?")[0]
            siblings = [{"rfilename": name} for name in files]
            if path.startswith("/api/models/org/name/tree/"):
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                self.answer(json.dumps(tree).encode())
            elif path.startswith("/api/models/org/name"):
                self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith("/org/name/resolve/") and path.rpartition("/")[2] in files:
                self.file(path.rpartition("/")[2])
            else:
                self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def file(self, name):
            content = files[name]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            span = self.headers.get("Range", "").removeprefix("bytes=")
            if name.endswith(".safetensors"):
                asked.append((self.command, name, span))
            if span:
                begin, _, end = span.partition("-")
                last = min(int(end or len(content) - 1), len(content) - 1)
                headers["Content-Range"] = f"bytes {begin}-{last}/{len(content)}"
                self.answer(content[int(begin) : last + 1], 206, **headers)
            else:
                self.answer(content, **headers)

        def answer(self, content, status=200, **headers):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_repo_is_planned_for_by_its_headers_and_the_plan_holds_for_its_files(hub, folder, tmp_path):
    endpoint, asked = hub
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(Path(bigmodel.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PLAN, "org/name"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    weights = {file.name for file in folder.glob("*.safetensors")}
    assert {name for _, name, _ in asked} == weights
    assert all(span for command, _, span in asked if command == "GET")  # never a whole file
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    plan = bigmodel.Plan.from_json(done.stdout)
    here = bigmodel.make_plan(folder, workload=SMALL, max_memory={"cpu": "1GiB"})
    assert plan.fingerprint == here.fingerprint
    assert [(p.unit, p.weight_bytes) for p in plan.placements] == [(p.unit, p.weight_bytes) for p in here.placements]
    model = bigmodel.load_sharded(folder, device_map=plan, progress=False, offload_folder=tmp_path / "converted")
    assert bigmodel.plan_of(model).fingerprint == plan.fingerprint


def test_a_folder_with_a_config_alone_is_planned_for_and_not_loaded(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    whole = bigmodel.make_plan(folder, workload=SMALL)
    plan = bigmodel.make_plan(tmp_path, workload=SMALL)
    assert plan.weight_bytes == whole.weight_bytes
    assert [place.unit for place in plan.placements] == [place.unit for place in whole.placements]
    with pytest.raises(MissingFilesError):
        bigmodel.load_sharded(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")  # a download that was begun
    with pytest.raises(bigmodel.errors.CheckpointError):
        bigmodel.make_plan(tmp_path, workload=SMALL)


def test_a_map_becomes_a_plan(folder):
    plan = bigmodel.Plan.from_device_map({"": "disk", "lm_head": "cpu"}, folder, workload=SMALL)
    assert {place.home for place in plan.placements if "layers" in place.unit} == {"disk"}
    assert plan.estimate.time_per_token_s > 0
