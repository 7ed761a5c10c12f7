"""What bound a streamed model, and each cause of being below it, provoked: real reads, real passes."""

import errno
import gc
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from simulated import COMPILER, simulated

import bigmodel
from bigmodel.device_map.demand import CONTEXT_BYTES
from bigmodel.hooks.limit import limit_of
from bigmodel.offload import link

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="simulated accelerators need a C++ compiler")

SMALL = bigmodel.Workload(prompt_tokens=8, new_tokens=8)
DISK_BYTES_PER_S = 1e8
IDS = torch.ones(1, 4, dtype=torch.long)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama whose layers are 4.2 MB each: reads of them are long."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def one_processor():
    """Models as small as these gain nothing from more, and on a busy machine threads wait for each other."""
    threads, processors = torch.get_num_threads(), os.sched_getaffinity(0)
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {sorted(processors)[number % len(processors)]})
    yield processors
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, processors)
    gc.collect()


@pytest.fixture
def throttled(monkeypatch):
    """Reads take as long as a disk of `DISK_BYTES_PER_S` would, one after another."""
    preadv, one_at_a_time = os.preadv, threading.Lock()

    def read(fd, buffers, offset):
        with one_at_a_time:
            started = time.perf_counter()
            count = preadv(fd, buffers, offset)
            time.sleep(max(0.0, count / DISK_BYTES_PER_S - (time.perf_counter() - started)))
        return count

    monkeypatch.setattr(os, "preadv", read)


def evict(folder):
    """The checkpoint leaves the page cache, as far as nobody has it mapped."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder):
    for path in folder.glob("*.safetensors"):
        path.read_bytes()


def streamed(folder, *, num_slots=3):
    """All on disk, with so many slots a lane."""
    plan = bigmodel.make_plan(folder, None, SMALL, device_map={"": "disk"})
    slots = tuple(replace(group, num_slots=min(num_slots, group.num_slots)) for group in plan.slots)
    model = bigmodel.load_sharded(folder, device_map=replace(plan, slots=slots), progress=False)
    assert all(group.num_slots <= num_slots for group in bigmodel.plan_of(model).slots)
    return model


def passes(model, count=4, *, between=lambda: None):
    """The account of so many passes after the first."""
    with torch.no_grad():
        model(input_ids=IDS)
        before = bigmodel.stats_of(model)
        for _ in range(count):
            between()
            model(input_ids=IDS)
    return bigmodel.stats_of(model) - before


def limit_at(stats, plan=None, **rates):
    """The limit, where the machine had been measured to give these rates."""
    plan = plan or stats.plan
    known = dict(plan.estimate.bytes_per_s) | {name.replace("_", " "): rate for name, rate in rates.items()}
    estimate = replace(plan.estimate, bytes_per_s=known)
    return limit_of(replace(plan, rates_from="measured", estimate=estimate), stats.steady)


def told(limit, words):
    """The one cause with these words."""
    found = [cause for cause in limit.causes if words in cause]
    assert len(found) == 1, limit.causes
    return found[0]


def test_a_disk_that_reads_all_the_time_binds_and_its_limit_is_reached(folder, throttled):
    evict(folder)
    model = streamed(folder)
    stats = passes(model)
    streamed_bytes = bigmodel.plan_of(model).streamed_bytes
    limit = limit_at(stats, disk=DISK_BYTES_PER_S)
    assert limit.binds == "disk"
    assert limit.least_s["disk"] == pytest.approx(4 * streamed_bytes / DISK_BYTES_PER_S, rel=0.3)
    assert limit.least_s["disk"] == stats.steady.flow.reads.num_bytes / DISK_BYTES_PER_S
    assert 0.4 <= limit.fraction <= 1.02  # the rest is the load of the machine
    assert limit.rate_bytes_per_s == pytest.approx(limit.fraction * DISK_BYTES_PER_S, rel=1e-6)
    assert limit.rests_on == "rates"
    assert limit.causes == ()
    assert limit.headline == str(limit)
    # Where nobody measured the disk, its own best is what it is compared with, and that is told.
    own = stats.limit
    assert (own.binds, own.rests_on) == ("disk", "reached")
    assert 0.4 <= own.fraction <= 1.1
    assert "of the best rate it reached" in own.headline


def test_a_disk_that_gives_less_than_was_measured(folder, throttled):
    evict(folder)
    limit = limit_at(passes(streamed(folder)), disk=5 * DISK_BYTES_PER_S)
    assert limit.fraction < 0.3
    cause = told(limit, "the disk gave")
    assert "was measured to give 477 MiB/s" in cause
    assert "bigmodel calibrate" in cause


def test_reads_that_are_too_short_for_the_disk(tmp_path, monkeypatch):
    from families import make_checkpoint

    preadv = os.preadv

    def seek_and_read(*args):
        time.sleep(0.01)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", seek_and_read)
    folder = make_checkpoint("llama", tmp_path)
    evict(folder)
    # What of such small files is looked up brings all of them into the page cache.
    limit = limit_at(passes(streamed(folder), 8, between=lambda: evict(folder)), disk=1e12)
    assert "too short for its rate" in told(limit, "the disk gave")


def test_a_file_system_without_direct_reads(folder, monkeypatch):
    open_file = os.open

    def refuse(path, flags, *args, **options):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_file(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    evict(folder)
    stats = passes(streamed(folder, num_slots=1), between=lambda: evict(folder))
    assert stats.steady.flow.reads.buffered_bytes > 0
    told(limit_at(stats, disk=1e12), "refuses direct reads (O_DIRECT)")


def test_reads_that_the_page_cache_could_have_been_spared(folder):
    warm(folder)
    stats = passes(streamed(folder))
    assert stats.steady.flow.reads.num_bytes == 0
    assert "raise max_memory['cpu'] by up to" in told(stats.limit, "copied out of the page cache")


def test_too_few_slots(folder, throttled):
    evict(folder)
    model = streamed(folder, num_slots=1)
    for layer in model.model.layers:  # a computation that takes as long as a read
        layer.mlp.register_forward_hook(lambda *_: time.sleep(0.04))
    limit = limit_at(passes(model), disk=DISK_BYTES_PER_S)
    assert limit.binds == "disk"
    assert "raise max_memory['cpu'] by" in told(limit, "take turns in 1 slot")
    more = streamed(folder)
    for layer in more.model.layers:
        layer.mlp.register_forward_hook(lambda *_: time.sleep(0.04))
    reached = limit_at(passes(more), disk=DISK_BYTES_PER_S)
    assert reached.fraction > 1.2 * limit.fraction
    assert "take turns" not in str(reached)


def test_fewer_threads_than_processors(folder, one_processor):
    if len(one_processor) < 2:
        pytest.skip("there is one processor")
    os.sched_setaffinity(0, one_processor)
    model = bigmodel.load_sharded(folder, workload=SMALL, max_memory={"cpu": "8GiB"}, progress=False)
    stats = passes(model)
    assert stats.limit.binds.endswith("of cpu")
    assert stats.limit.rests_on == "defaults"
    assert f"torch.set_num_threads({len(one_processor)})" in told(stats.limit, "passes computed for")


def test_a_computation_that_takes_longer_than_planned_or_than_its_bytes(folder):
    model = bigmodel.load_sharded(folder, workload=SMALL, max_memory={"cpu": "8GiB"}, progress=False)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    stats = passes(model)
    assert "were planned" in told(limit_at(stats), "passes computed for")
    slow = replace(stats.plan, estimate=replace(stats.plan.estimate, time_per_token_s=1.0, ttft_s=1.0))
    assert "what each operator takes by itself" in told(limit_at(stats, slow), "passes computed for")


def test_time_between_passes_counts_and_before_the_first_of_them_does_not(folder):
    model = bigmodel.load_sharded(folder, workload=SMALL, max_memory={"cpu": "8GiB"}, progress=False)
    stats = passes(model, between=lambda: time.sleep(0.05))
    assert stats.steady.outside_s >= 0.15
    assert "TextIteratorStreamer" in told(stats.limit, "lay between passes")
    time.sleep(0.3)
    before = bigmodel.stats_of(model)
    with torch.no_grad():
        model(input_ids=IDS)
        model(input_ids=IDS)
    steady = (bigmodel.stats_of(model) - before).steady
    assert steady.outside_s < 0.1
    assert (steady.prefills.num_passes, steady.prefills.num_tokens) == (2, 8)


def test_what_was_read_before_a_difference_began_is_not_of_its_time(folder, throttled):
    evict(folder)
    model = streamed(folder)
    with torch.no_grad():
        model(input_ids=IDS)
        time.sleep(0.5)  # the slots fill, for the pass to come
        before = bigmodel.stats_of(model)
        assert before.steady.idle_flow.reads.num_bytes > 0
        model(input_ids=IDS)
    steady = (bigmodel.stats_of(model) - before).steady
    assert steady.prefills.num_passes == 1
    assert steady.prefills.read_bytes == steady.flow.reads.num_bytes
    assert limit_at(bigmodel.stats_of(model) - before, disk=DISK_BYTES_PER_S).fraction <= 1.02


def test_generated_tokens_are_told_from_prompts(folder):
    model = bigmodel.load_sharded(folder, workload=SMALL, max_memory={"cpu": "8GiB"}, progress=False)
    assert bigmodel.stats_of(model).limit is None
    model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    steady = bigmodel.stats_of(model).steady
    assert (steady.prefills.num_passes, steady.prefills.num_tokens) == (1, 4)  # the model's first pass is not counted
    assert (steady.steps.num_passes, steady.steps.num_tokens) == (6, 6)
    least = bigmodel.plan_of(model).estimate.least_s
    # 8 passes of which one has 4 of 8 planned tokens: on the line between the two.
    arithmetic = "arithmetic of cpu"
    expected = (
        6 * least["decode"][arithmetic] + (4 * least["decode"][arithmetic] + 3 * least["prefill"][arithmetic]) / 7
    )
    found = limit_at(bigmodel.stats_of(model)).least_s[arithmetic]
    assert found == pytest.approx(expected)


class Refusing:
    """CUDA's functions, on a system that page-locks nothing."""

    def cudaHostRegister(self, address, nbytes, flags):
        return 2

    def cudaHostUnregister(self, address):
        raise AssertionError("nothing was registered")


def on_accelerator(folder):
    """Runs on sim:0 and rests in host memory."""
    limits = {0: CONTEXT_BYTES + (64 << 20), "cpu": "4GiB"}
    homes = {"": "cpu", "model.embed_tokens": "sim:0", "lm_head": "sim:0"}
    return bigmodel.load_sharded(folder, device_map=homes, max_memory=limits, workload=SMALL, progress=False)


@needs_compiler
def test_a_link_that_gives_its_rate_and_one_that_gives_less(folder):
    with simulated(1, link_bytes_per_s=2e8):
        stats = passes(on_accelerator(folder))
        limit = limit_at(stats, **{"link to sim:0": 2e8})
        assert limit.binds == "link to sim:0"
        assert 0.4 <= limit.fraction <= 1.02  # the rest is the load of the machine
        assert stats.limit.rests_on == "reached"
        slower = limit_at(stats, **{"link to sim:0": 1e9})
        assert "look at its width" in told(slower, "the link to sim:0 gave")


@needs_compiler
def test_memory_that_may_not_be_page_locked(folder, monkeypatch):
    monkeypatch.setattr(link, "_runtime_of", lambda device: Refusing())
    with simulated(1, link_bytes_per_s=1e9):
        stats = passes(on_accelerator(folder))
        assert not stats.steady.flow.is_page_locked
        assert "ulimit -l" in told(limit_at(stats, **{"link to sim:0": 1e11}), "refused to page-lock")
