"""Plans for checkpoints whose weights are not here: a Hub repo by its headers, a folder by its config.json."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers
from families import VOCAB, each_family, make_checkpoint
from safetensors.torch import save

import bigmodel
from bigmodel.checkpoint import open_checkpoint
from bigmodel.errors import InvalidArgumentError, MissingFilesError
from bigmodel.units import format_bytes

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = bigmodel.Workload(prompt_tokens=8, new_tokens=4)
PLAN = """
import sys, bigmodel
small = bigmodel.Workload(prompt_tokens=8, new_tokens=4)
print(bigmodel.make_plan(sys.argv[1], workload=small, max_memory={"cpu": "1GiB"}).to_json())
"""
OPEN = """
import sys
from bigmodel.checkpoint import open_unread
from bigmodel.errors import BigModelError
for subfolder in sys.argv[1:]:
    try:
        found = open_unread("org/name", subfolder=subfolder or None)
        print(found.fingerprint, sorted(found.tensors))
    except BigModelError as error:
        print(f"{type(error).__name__}: {error}")
"""
# A newer commit of the same weights has their blob in the cache, and not yet its own link to it.
FETCH_AND_OPEN = """
import os, huggingface_hub
from bigmodel.checkpoint import open_checkpoint, open_unread
folder = huggingface_hub.snapshot_download("org/name")
print((open_unread("org/name") or open_checkpoint("org/name")).fingerprint)
os.unlink(os.path.join(folder, "pytorch_model.bin"))
print((open_unread("org/name") or open_checkpoint("org/name")).fingerprint)
"""


@pytest.fixture(scope="module", params=["llama_tied", pytest.param("mixtral", marks=pytest.mark.slow)])
def folder(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp("unread") / request.param, torch.bfloat16)


@contextlib.contextmanager
def hub_of(files):
    """A server that answers as the Hub does for one repo, org/name; and what was asked of its weights, with the ranges."""
    asked = []
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path, _, query = self.path.partition("?")
            name = path.removeprefix("/org/name/resolve/").partition("/")[2]
            if path.startswith("/api/models/org/name/tree/"):
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                self.answer(json.dumps(tree).encode())
            elif path.startswith("/api/models/org/name"):
                siblings = [{"rfilename": name} for name in files]
                if "blobs" in query:
                    for each in siblings:
                        size, digest = len(files[each["rfilename"]]), digests[each["rfilename"]]
                        each |= {"size": size, "lfs": {"size": size, "sha256": digest, "pointerSize": 1}}
                self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith("/org/name/resolve/") and name in files:
                self.file(name)
            else:
                self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def file(self, name):
            content = files[name]
            headers = {"ETag": f'"{digests[name]}"', "X-Repo-Commit": COMMIT}
            span = self.headers.get("Range", "").removeprefix("bytes=")
            if name.endswith((".safetensors", ".bin")):
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
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_at(endpoint, cache, script, *arguments):
    """What a script prints in a process of its own, with this Hub and this cache of it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(Path(bigmodel.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write(folder, files):
    """`files` in a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.slow
def test_a_repo_is_planned_for_by_its_headers_and_the_plan_holds_for_its_files(folder, tmp_path):
    with hub_of(files_of(folder)) as (endpoint, asked):
        printed = run_at(endpoint, tmp_path / "hub", PLAN, "org/name")
    weights = {file.name for file in folder.glob("*.safetensors")}
    assert {name for _, name, _ in asked} == weights
    assert all(span for command, _, span in asked if command == "GET")  # never a whole file
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    plan = bigmodel.Plan.from_json(printed)
    here = bigmodel.make_plan(folder, workload=SMALL, max_memory={"cpu": "1GiB"})
    assert plan.fingerprint == here.fingerprint
    assert [(p.unit, p.weight_bytes) for p in plan.placements] == [(p.unit, p.weight_bytes) for p in here.placements]
    model = bigmodel.load_sharded(folder, device_map=plan, progress=False, offload_folder=tmp_path / "converted")
    assert bigmodel.plan_of(model).fingerprint == plan.fingerprint


def test_what_headers_say_holds_for_files_in_folders_and_copies_that_the_index_passes_over(tmp_path):
    held = {"b/model.safetensors": "ac", "a/model.safetensors": "bd", "c/copies.safetensors": "ab"}
    weight_map = {"a": "./c/copies.safetensors", "b": "a/model.safetensors", "c": "b/model.safetensors"}
    whole = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        **{file: save({name: torch.ones(ord(name), 2) for name in names}) for file, names in held.items()},
    }
    lacking = {f"lacking/{name}": content for name, content in whole.items() if not name.startswith("b/")}
    with hub_of(whole | {f"deep/{name}": content for name, content in whole.items()} | lacking) as (endpoint, asked):
        top, deep, error = run_at(endpoint, tmp_path / "hub", OPEN, "", "deep", "lacking").splitlines()
    assert {name.removeprefix("deep/") for _, name, _ in asked} == held.keys()
    assert all(span for command, _, span in asked if command == "GET")
    here = open_checkpoint(write(tmp_path / "here", whole))
    assert top == deep == f"{here.fingerprint} {sorted(here.tensors)}"
    assert error == (
        "MissingFilesError: org/name lacks 1 of the 3 weight files that it names: lacking/b/model.safetensors. Give another "
        "revision, or a repo that is whole."
    )


@pytest.mark.slow
def test_a_repo_of_bin_files_is_refused_unread_and_opened_once_it_is_cached(tmp_path):
    content = io.BytesIO()
    torch.save({"a": torch.ones(300, 1000)}, content)
    files = {"config.json": b"{}", "pytorch_model.bin": content.getvalue()}
    with hub_of(files) as (endpoint, asked):
        refused = run_at(endpoint, tmp_path / "hub", OPEN, "")
        assert asked == []
        cached, linked = run_at(endpoint, tmp_path / "hub", FETCH_AND_OPEN).splitlines()
        assert [command for command, _, _ in asked if command == "GET"] == ["GET"]  # by the user's own download
    assert refused.startswith(
        "UnsupportedCheckpointError: org/name has no safetensors file for the weights that are meant"
    )
    assert f"pytorch_model.bin, {format_bytes(len(files['pytorch_model.bin']))} in all." in refused
    assert "`hf download org/name`" in refused
    assert cached == linked == open_checkpoint(write(tmp_path / "here", files)).fingerprint


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


def config_of(family):
    """A tiny config of a class with buffers, or without."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    gpt2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
    t5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4}
    t = transformers
    return {
        "gemma2": lambda: (t.Gemma2ForCausalLM, t.Gemma2Config(**sizes, sliding_window=8)),
        "gemma3": lambda: (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**sizes, sliding_window=8)),
        "qwen3": lambda: (t.Qwen3ForCausalLM, t.Qwen3Config(**sizes)),
        "mixtral": lambda: (
            t.MixtralForCausalLM,
            t.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
        ),
        "gpt2": lambda: (t.GPT2LMHeadModel, t.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2)),
        "phi3": lambda: (t.Phi3ForCausalLM, t.Phi3Config(**sizes)),
        "t5": lambda: (t.T5ForConditionalGeneration, t.T5Config(**t5, decoder_start_token_id=0)),
    }[family]()


@pytest.mark.parametrize("family", each_family(["gemma2", "gemma3", "qwen3", "mixtral", "gpt2", "phi3", "t5"]))
def test_a_config_alone_takes_what_the_model_with_its_weights_takes(family, tmp_path):
    kind, config = config_of(family)
    kind(config).to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    write(tmp_path / "config", {"config.json": (tmp_path / "whole" / "config.json").read_bytes()})
    machine = bigmodel.Machine.probe(tmp_path)
    whole, plan = (
        bigmodel.make_plan(tmp_path / name, machine=machine, workload=SMALL, max_memory={"cpu": "1GiB"})
        for name in ("whole", "config")
    )
    assert plan.notes == whole.notes == ()  # passes were tried, nothing is guessed
    for figure in ("weight_bytes", "buffer_bytes", "activation_bytes", "kv_bytes"):
        assert getattr(plan, figure) == getattr(whole, figure), figure
    for figure in ("ttft_s", "time_per_token_s", "tokens_per_s", "binds"):
        assert getattr(plan.estimate, figure) == getattr(whole.estimate, figure), figure
    # Pages that reads begin and end in, and conversions, are the files' and not known without them.
    files_bytes = whole.resident_bytes - plan.resident_bytes + whole.staging_bytes - plan.staging_bytes
    assert plan.estimate.peak_bytes["cpu"] + files_bytes == whole.estimate.peak_bytes["cpu"]


def test_options_and_paths_that_mean_nothing_are_refused_as_where_there_are_weights(tmp_path):
    kind, config = config_of("qwen3")
    config.architectures = [kind.__name__]
    config.save_pretrained(tmp_path / "config")
    config.save_pretrained(tmp_path / "x")
    folder = tmp_path / "config"
    for path in (folder, folder / "config.json", "org/name"):
        with pytest.raises(InvalidArgumentError, match=r"subfolder is '\.\./x'"):
            bigmodel.make_plan(path, subfolder="../x")
    with pytest.raises(InvalidArgumentError, match="revision is 'main'"):
        bigmodel.make_plan(folder, revision="main")
    with pytest.raises(InvalidArgumentError, match="is a file"):
        bigmodel.make_plan(folder / "config.json", subfolder="inner")
    with pytest.raises(InvalidArgumentError, match="5, of type int"):
        bigmodel.make_plan(5)
    with pytest.raises(InvalidArgumentError, match="None, of type NoneType"):
        bigmodel.make_plan(None)
    assert bigmodel.make_plan(tmp_path, subfolder="x", workload=SMALL).weight_bytes


def test_a_map_becomes_a_plan(folder):
    plan = bigmodel.Plan.from_device_map({"": "disk", "lm_head": "cpu"}, folder, workload=SMALL)
    assert {place.home for place in plan.placements if "layers" in place.unit} == {"disk"}
    assert plan.estimate.time_per_token_s > 0
