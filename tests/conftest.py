"""What the tests share: the real model, two tiny ones with a tokenizer, and what the markers mean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before huggingface_hub is imported by anyone: no test asks the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not any(Path("/dev").glob("nvidia[0-9]*")):
    # DeepSpeed, which transformers imports where it is installed, tells on stdout that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Time is not what properties are about, and the machine may be busy. CI draws the same examples in every run.
settings.register_profile(
    "bigmodel",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("bigmodel")

REPOSITORY = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SENTENCE = "the quick brown fox jumps over the lazy dog, and the dog sleeps on the mat"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real model: SmolLM2-135M-Instruct, 272 bfloat16 tensors in 5 files; made once a machine."""
    script = REPOSITORY / "examples" / "make_smollm2.py"
    # A process of its own: what it takes to make the checkpoint must not count as ours in tests of memory.
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random llama (4 layers, float32, several files), a tokenizer and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,  # random weights would end the text anywhere
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random T5 (2 encoder and 2 decoder layers, float32) and a tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny_t5")
    tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


def _train_tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level tokenizer of 320 tokens, learned from a sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this user or this machine cannot run; the reason is printed."""
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="makes a memory cgroup, which only root may"))
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        import torch

        if not torch.accelerator.is_available():
            for item in needs_gpu:
                item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


_left_out: list[pytest.Item] = []


def pytest_deselected(items: list[pytest.Item]) -> None:
    _left_out.extend(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names what a run left out, and how to run it."""
    for marker, how in (("gpu", "make test-gpu"), ("slow", "make test")):
        names = [item.nodeid for item in _left_out if item.get_closest_marker(marker)]
        if names:
            terminalreporter.write_sep("-", f"left out: {len(names)} tests marked {marker} ({how} runs them)")
            for name in names:
                terminalreporter.write_line(f"  {name}")
