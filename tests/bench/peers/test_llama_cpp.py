"""llama.cpp as a peer: its file is written once, and its tokens are those of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_llamas import FAMILIES, save_random

from bigmodel.bench.peers.llama_cpp import LlamaCpp
from bigmodel.errors import InvalidArgumentError

PROMPT = [5, 17, 300, 42, 42, 9, 120]

RUN = """
import json, sys
from bigmodel.bench.peers.llama_cpp import LlamaCpp
path, scratch, dtype, ids, new_tokens = json.loads(sys.argv[1])
peer, tokens = LlamaCpp(dtype, 512), []
peer.load(path, scratch)
peer.generate(ids, new_tokens, tokens.append)
assert "torch" not in sys.modules
print(json.dumps(tokens))
"""


def run(path: Path, scratch: Path, dtype: str, ids: list[int], new_tokens: int) -> list[int]:
    """What the peer gives in a process of its own, as it is measured."""
    arguments = json.dumps([str(path), str(scratch), dtype, ids, new_tokens])
    done = subprocess.run([sys.executable, "-c", RUN, arguments], stdout=subprocess.PIPE, text=True, check=True)
    tokens: list[int] = json.loads(done.stdout)
    return tokens


def greedy(path: Path, ids: list[int], new_tokens: int) -> list[int]:
    """What transformers gives in float32, in which llama.cpp computes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    output = model.generate(
        given, attention_mask=mask, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
    )
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


def missed(path: Path, ids: list[int], tokens: list[int]) -> list[float]:
    """By how much each token's logit is below the best one of its step; the random models' spread is about 1.5."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    logits[:, model.config.eos_token_id] = -torch.inf
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    below: list[float] = (logits.amax(1) - chosen).tolist()
    return below


def test_the_file_is_written_once_and_again_when_the_checkpoint_changed(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path, scratch = tmp_path / "model", tmp_path / "scratch"
    save_random(path, "llama")
    (first,) = LlamaCpp("bf16", 64).prepare(str(path), str(scratch))
    written = Path(first).stat()
    assert LlamaCpp("bf16", 64).prepare(str(path), str(scratch)) == [first]
    assert Path(first).stat() == written
    (other,) = LlamaCpp("f16", 64).prepare(str(path), str(scratch))
    save_random(path, "llama", vocab_size=256)
    (second,) = LlamaCpp("bf16", 64).prepare(str(path), str(scratch))
    assert second != first
    assert set(scratch.iterdir()) == {Path(second), Path(other)}


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(InvalidArgumentError, match="'q4_0' is no dtype"):
        LlamaCpp("q4_0").prepare(str(tmp_path), str(tmp_path))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImportError, match="pip install xllamacpp"):
        LlamaCpp().settings()


def test_what_was_not_prepared_is_not_loaded(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    with pytest.raises(InvalidArgumentError, match="Call prepare first"):
        LlamaCpp("bf16").load(str(tmp_path), str(tmp_path))


def test_a_text_beyond_the_cache_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="60 tokens and 5 more were asked for, and num_positions is 64"):
        LlamaCpp("bf16", 64).generate([1] * 60, 5, print)


def test_settings_are_one_line_with_the_version() -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    line = LlamaCpp("f16", 64).settings()
    assert "\n" not in line
    assert xllamacpp.__version__ in line
    assert "f16 file" in line


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_is_the_likeliest_by_transformers(tmp_path: Path, family: str) -> None:
    pytest.importorskip("xllamacpp")
    save_random(tmp_path, family)
    for dtype in ("bf16", "f16", "f32"):
        LlamaCpp(dtype, 512).prepare(str(tmp_path), str(tmp_path / "scratch"))
        tokens = run(tmp_path, tmp_path / "scratch", dtype, PROMPT, 24)
        assert len(tokens) == 24
        # Random models have near ties, which roundings decide: activations are rounded to the file's dtype, the cache to f16.
        assert max(missed(tmp_path, PROMPT, tokens)) < (0.02 if dtype == "f32" else 0.1), dtype


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_the_real_model_says_the_same(smollm2: Path, tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2)("The capital of France is Paris, and")["input_ids"]
    LlamaCpp(dtype, 512).prepare(str(smollm2), str(tmp_path))
    assert run(smollm2, tmp_path, dtype, ids, 20) == greedy(smollm2, ids, 20)


def test_an_end_token_is_not_chosen(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    save_random(tmp_path, "llama", eos_token_id=None)
    free = greedy(tmp_path, PROMPT, 8)
    save_random(tmp_path, "llama", eos_token_id=free[3])
    LlamaCpp("bf16", 512).prepare(str(tmp_path), str(tmp_path / "scratch"))
    tokens = run(tmp_path, tmp_path / "scratch", "bf16", PROMPT, 8)
    assert tokens[:3] == free[:3]
    assert free[3] not in tokens
    assert tokens == greedy(tmp_path, PROMPT, 8)


def test_an_error_in_the_callback_reaches_the_caller(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    save_random(tmp_path, "llama")
    peer = LlamaCpp("bf16", 64)
    peer.prepare(str(tmp_path), str(tmp_path / "scratch"))
    peer.load(str(tmp_path), str(tmp_path / "scratch"))

    def refuse(token: int) -> None:
        raise LookupError(token)

    with pytest.raises(LookupError):
        peer.generate(PROMPT, 8, refuse)
