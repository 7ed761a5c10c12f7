"""What a pass needs in memory beside the weights: measured by running the model on tensors that hold nothing.

The module on meta is run under fake tensors with the workload's shapes, and every storage that comes and goes is counted.
What the model's own cache object reaches at the end is the KV cache (or a state of any other kind); the rest is activations.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel.device_map.plan import Workload

__all__ = ["ModelCosts", "measure"]

MakeInputs = Callable[[int, int], dict[str, torch.Tensor] | None]

# Above what operators return they hold buffers of their own. Measured with bf16, fp16 and fp32 products of 1 to 512 tokens with
# 2048 x 32000 weights: 0 to 16% of the result; oneDNN made no copy of the weight.
_WORKSPACE_FACTOR = 1.15
# glibc serves blocks below 32 MiB from its heap (its mmap threshold rises to the largest one freed, up to that), where the KV
# cache's tensors come to lie between short-lived ones, so that holes stay. What they take, as a share of the live blocks of
# that size, beyond the planner's reserve: peaks of RssAnon of llamas of 2 to 12 layers, 512 to 4096 wide, 1 to 4 sequences of
# 512 to 1500 tokens on 1 and 2 threads gave up to 1.7 in fp32 (it varies by a third from run to run), and 0.6 in bf16.
# A fixed mmap threshold of 1 MiB leaves no holes, and slows a decode step by 30 to 50% (fresh pages for the cache).
_HEAP_BLOCK_BYTES = 32 << 20
_HOLES_FACTOR = {"wide": 1.75, "narrow": 0.75}
# Where no pass can be tried: tensors as wide as the widest weight that a layer holds at once.
_WIDE_TENSORS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Memory of passes of any size, from a few that were tried.

    Attributes:
        workload: what was tried.
        prefill_bytes: activations of the first pass.
        half_prefill_bytes: of a pass of half as many tokens.
        decode_bytes: of a pass of one token at the workload's last token.
        kv_fixed_bytes: per sequence, whatever its length (states, sliding windows).
        kv_bytes_per_token: per sequence and token.
        is_measured: whether passes were tried; otherwise these are estimates from the widest weights.
        reason: why no pass could be tried.
    """

    workload: Workload
    prefill_bytes: int
    half_prefill_bytes: int
    decode_bytes: int
    kv_fixed_bytes: int
    kv_bytes_per_token: int
    is_measured: bool = True
    reason: str = ""

    @property
    def workload_activation_bytes(self) -> int:
        """The largest activations of the workload's passes."""
        return max(self.prefill_bytes, self.decode_bytes)

    def kv_bytes(self, batch_size: int, total_tokens: int) -> int:
        """Bytes of the cache of `batch_size` sequences of `total_tokens` each."""
        return batch_size * (self.kv_fixed_bytes + self.kv_bytes_per_token * total_tokens)

    def activation_bytes(self, batch_size: int, num_tokens: int, past_tokens: int) -> int:
        """Bytes of activations of a pass of `num_tokens` a sequence after `past_tokens`; an upper estimate.

        Between what was tried it follows a parabola in the tokens (attention may hold scores of every pair); what a token
        needs grows with what it looks back on.
        """
        share = batch_size / self.workload.batch_size
        tried = self.workload.prompt_tokens
        half = max(1, tried // 2)
        square = 0.0
        if tried > half:
            square = (self.prefill_bytes / tried - self.half_prefill_bytes / half) / (tried - half)
        square = max(0.0, square)
        linear = max(self.prefill_bytes / tried - square * tried, self.half_prefill_bytes / half - square * half, 0.0)
        fitted = linear * num_tokens + square * num_tokens * (num_tokens + past_tokens)
        looking_back = self.decode_bytes * max(1.0, (past_tokens + num_tokens) / self.workload.total_tokens)
        return math.ceil(share * max(fitted, looking_back))


def measure(model: nn.Module, make_inputs: MakeInputs, workload: Workload, *, is_plentiful: bool = False) -> ModelCosts:
    """Try the workload's passes on tensors that hold nothing.

    Args:
        model: parameters on meta or real; it is not changed.
        make_inputs: (sequences, tokens) -> keyword arguments of forward, made in the mode that is set; or None.
        workload: the passes to try.
        is_plentiful: try the first pass alone, where memory is not what decides: what lies beyond the workload is then
            a cautious guess.
    """
    ways = [make_inputs]
    if workload.batch_size > 1 and _accepts(model, "attention_mask"):
        ways.insert(0, _with_mask(make_inputs))
    reason = ""
    for make in ways:
        try:
            return _tried(model, make, workload, is_plentiful)
        except _NotTried as error:
            reason = str(error)
        except Exception as error:  # a model's forward may do anything that fake tensors cannot follow
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return _guessed(model, workload, reason)


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _with_mask(make_inputs: MakeInputs) -> MakeInputs:
    """Inputs of sequences of unlike length: their mask is laid out for every pair of tokens, which one alone is spared."""

    def make(batch_size: int, num_tokens: int) -> dict[str, torch.Tensor] | None:
        inputs = make_inputs(batch_size, num_tokens)
        if inputs is not None and "input_ids" in inputs:
            inputs.setdefault("attention_mask", _mask(batch_size, num_tokens))
        return inputs

    return make


def _holes_factor(model: nn.Module) -> float:
    sizes = [(parameter.element_size() > 2, parameter.numel()) for parameter in model.parameters()]
    num_wide = sum(count for is_wide, count in sizes if is_wide)
    return _HOLES_FACTOR["wide" if 2 * num_wide > sum(count for _, count in sizes) else "narrow"]


def _mask(batch_size: int, num_tokens: int) -> torch.Tensor:
    return torch.ones(batch_size, num_tokens, dtype=torch.int64, device="cpu")


class _NotTried(Exception):
    """Nothing is known that a forward could be called with."""


def _tried(model: nn.Module, make_inputs: MakeInputs, workload: Workload, is_plentiful: bool) -> ModelCosts:
    with _few_blocks(model) as copies:
        try:
            return _tried_as_it_is(model, make_inputs, workload, is_plentiful, copies)
        except Exception:
            if not copies:
                raise
    # A model that counts its blocks, or asks for one by its number, is tried whole.
    return _tried_as_it_is(model, make_inputs, workload, is_plentiful, {})


def _tried_as_it_is(
    model: nn.Module,
    make_inputs: MakeInputs,
    workload: Workload,
    is_plentiful: bool,
    copies: Mapping[nn.Module, int],
) -> ModelCosts:
    batch_size, prompt = workload.batch_size, workload.prompt_tokens
    half = max(1, prompt // 2)
    prefill = _try_pass(model, make_inputs, batch_size, prompt, copies)
    # A pass of few tokens holds a fraction: with everything quadratic, a quarter.
    half_pass = _Tried(prefill.peak_bytes // 4, prefill.kv_bytes * half // prompt, 0)
    if not is_plentiful:
        half_pass = _try_pass(model, make_inputs, batch_size, half, copies)
    prefill_bytes = prefill.peak_bytes
    if _accepts(model, "logits_to_keep"):
        # As generate calls it: smaller logits, and at times a larger workspace.
        prefill_bytes = max(
            prefill_bytes,
            _try_pass(model, make_inputs, batch_size, prompt, copies, options={"logits_to_keep": 1}).peak_bytes,
        )
    fixed, per_token = _line(half, half_pass.kv_bytes / batch_size, prompt, prefill.kv_bytes / batch_size)
    decode_bytes = 0
    if prefill.kv_bytes and workload.new_tokens and not is_plentiful:
        # One token at the end: the cache is filled by a pass of all tokens before it, which is not counted.
        past = workload.total_tokens - 1
        decode_bytes = _try_pass(model, make_inputs, batch_size, past, copies, then_decode=True).decode_bytes
    return ModelCosts(
        workload=workload,
        prefill_bytes=prefill_bytes,
        half_prefill_bytes=half_pass.peak_bytes,
        decode_bytes=decode_bytes,
        kv_fixed_bytes=math.ceil(fixed),
        kv_bytes_per_token=math.ceil(per_token),
    )


def _line(first_tokens: int, first_bytes: float, tokens: int, num_bytes: float) -> tuple[float, float]:
    """(fixed, per token) of a line through two points; all per token where there is one point."""
    if tokens == first_tokens:
        return 0.0, num_bytes / tokens
    per_token = max(0.0, (num_bytes - first_bytes) / (tokens - first_tokens))
    return max(0.0, num_bytes - per_token * tokens), per_token


@dataclass(frozen=True, slots=True)
class _Tried:
    """Bytes of one pass: peak activations, its cache, and peak activations of a pass of one token after it."""

    peak_bytes: int
    kv_bytes: int
    decode_bytes: int


def _try_pass(
    model: nn.Module,
    make_inputs: MakeInputs,
    batch_size: int,
    num_tokens: int,
    copies: Mapping[nn.Module, int],
    *,
    options: Mapping[str, Any] | None = None,
    then_decode: bool = False,
) -> _Tried:
    """Run a pass on tensors that hold nothing; `copies` says for how many blocks each of the model's blocks stands."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    counter = _Counter(_holes_factor(model))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), torch.inference_mode(False):
        weights = {
            name: torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            for name, parameter in model.named_parameters()
        }
        inputs = make_inputs(batch_size, num_tokens)
        if inputs is None:
            raise _NotTried("nothing is known that the model's forward could be called with")
        inputs |= options or {}
        counter.leave_out(weights.values())
        with _collector_off(), _blocks_told(counter, copies), counter:
            output = torch.func.functional_call(model, weights, (), inputs)
            cache = getattr(output, "past_key_values", None)
            held = _reachable_storages(cache)
            peak_bytes = counter.taken_bytes(held)
            makers = {key: counter.maker(key) for key in held}
            kv_bytes = sum(
                nbytes * (1 if (maker := makers[key]) is None else copies.get(maker, 1)) for key, nbytes in held.items()
            )
            decode_bytes = 0
            if then_decode and cache is not None:
                del output
                main = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
                token = torch.zeros(batch_size, 1, dtype=torch.int64, device="cpu")
                inputs |= {main: token, "past_key_values": cache}
                if "attention_mask" in inputs and main == "input_ids":
                    inputs["attention_mask"] = _mask(batch_size, num_tokens + 1)
                counter.start_again()
                torch.func.functional_call(model, weights, (), inputs)
                decode_bytes = counter.taken_bytes(_reachable_storages(cache))
    return _Tried(peak_bytes, kv_bytes, decode_bytes)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that are alive among those that were made while it is on."""

    def __init__(self, holes_factor: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._holes_factor = holes_factor
        self.live_bytes = 0
        self.peak_bytes = 0
        self.heap_bytes = 0  # of `live_bytes`, what the allocator serves from its heap
        self.heap_peak_bytes = 0
        self.block: nn.Module | None = None
        self._seen: dict[int, object] = {}
        self._makers: dict[int, nn.Module | None] = {}

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors' storages, nor views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage

    def start_again(self) -> None:
        """Forget the peaks so far."""
        self.peak_bytes, self.heap_peak_bytes = self.live_bytes, self.heap_bytes

    def taken_bytes(self, held: Mapping[int, int]) -> int:
        """What the process takes at the peak beside the storages that are `held`: workspaces and holes included."""
        held_heap = sum(nbytes for nbytes in held.values() if nbytes < _HEAP_BLOCK_BYTES)
        live = max(0, self.peak_bytes - sum(held.values()))
        holes = max(0, self.heap_peak_bytes - held_heap)
        return math.ceil(_WORKSPACE_FACTOR * live + self._holes_factor * holes)

    def maker(self, key: int) -> nn.Module | None:
        """The block that ran when a storage was made."""
        return self._makers.get(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            # Its shape function refuses dtypes that its CPU kernel takes.
            result: Any = _grouped_product(*args[:2])
        else:
            result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        if func in _BATCHED_PRODUCTS:
            copied = sum(tensor.nbytes for tensor in args if isinstance(tensor, torch.Tensor) and _is_copied(tensor))
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + copied)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = storage.nbytes()
        heap_bytes = nbytes if nbytes < _HEAP_BLOCK_BYTES else 0

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.live_bytes -= nbytes
            self.heap_bytes -= heap_bytes

        self._seen[key] = weakref.ref(storage, gone)
        self._makers[key] = self.block
        self.live_bytes += nbytes
        self.heap_bytes += heap_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.heap_peak_bytes = max(self.heap_peak_bytes, self.heap_bytes)


_BATCHED_PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)


def _is_copied(tensor: torch.Tensor) -> bool:
    """Whether a batched product on the CPU copies this operand first.

    A linear layer that is given a slice, such as the last token's hidden state, becomes a batched product with its whole
    weight as one operand, at a batch stride that oneDNN does not take: 125 MiB for a head of 32000 x 2048 (measured).
    """
    if tensor.ndim != 3 or tensor.dtype not in (torch.bfloat16, torch.float16):
        return False  # fp32 products are MKL's, which takes any stride (measured: nothing)
    _, rows, columns = tensor.shape
    return tensor.stride() not in ((rows * columns, columns, 1), (rows * columns, 1, rows))


def _grouped_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The empty result of a product of groups of rows: [rows, k] with [groups, k, n], or batched on either side."""
    if left.ndim == 2 and right.ndim == 3:
        shape: tuple[int, ...] = (left.shape[0], right.shape[2])
    elif left.ndim == 3 and right.ndim == 3:
        shape = (left.shape[0], left.shape[1], right.shape[2])
    else:
        raise _NotTried("a product of groups along the inner dimension needs its group sizes")
    return left.new_empty(shape)


@contextlib.contextmanager
def _few_blocks(model: nn.Module) -> Iterator[dict[nn.Module, int]]:
    """Of alike blocks in a list, keep two while this is on; gives kept block -> how many it stands for.

    Two, because in the second what the first one left is still held.
    """
    shortened: list[tuple[nn.ModuleList, Any]] = []
    copies: dict[nn.Module, int] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or module in inside or len(module) < 3:
            continue
        inside.update(each for child in module for each in child.modules())
        described = [_settings(child) for child in module]
        # A block knows its own number; what equals it in every block says nothing about what the block costs.
        numbers = {
            key
            for key in described[0]
            if all(type(own.get(key)) is int and own[key] == number for number, own in enumerate(described))
        }
        kinds: dict[object, list[nn.Module]] = {}
        for child, own in zip(module, described, strict=True):
            kinds.setdefault(tuple((key, own[key]) for key in own if key not in numbers), []).append(child)
        if any(len(alike) > 2 for alike in kinds.values()):
            shortened.append((module, module._modules))
            for first, *others in kinds.values():
                copies[first] = 1
                if others:
                    copies[others[0]] = len(others)
    try:
        for container, _ in shortened:
            kept = [child for child in container if child in copies]
            container._modules = {str(number): child for number, child in enumerate(kept)}
        yield copies
    finally:
        for container, children in shortened:
            container._modules = children


def _settings(block: nn.Module) -> dict[tuple[str, str], object]:
    """What a block's cost may depend on: classes, parameters, and plain attributes, of all modules in it."""
    found: dict[tuple[str, str], object] = {}
    for name, module in block.named_modules():
        found[name, ""] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, bool, type(None))):
                found[name, key] = value
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found[name, key] = (tuple(parameter.shape), parameter.dtype)
    return found


@contextlib.contextmanager
def _blocks_told(counter: _Counter, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Tell the counter which block runs."""

    def enter(module: nn.Module, args: Any) -> None:
        counter.block = module

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        counter.block = None

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave, always_call=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """The collector would stop at every object of the run; reference counts free what matters."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _reachable_storages(root: Any) -> dict[int, int]:
    """Storage -> bytes, for the tensors that a cache object holds."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending = [root]
    while pending:
        value = pending.pop()
        if value is None or isinstance(value, (str, bytes, int, float, bool, type)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            pending.extend(value)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            pending.extend(vars(value).values())
    return storages


def _guessed(model: nn.Module, workload: Workload, reason: str) -> ModelCosts:
    """Upper estimates from the widest weights, where no pass can be tried."""
    widths = [max(p.shape[0], p.shape[-1]) * p.element_size() for p in model.parameters() if p.ndim >= 2]
    widest, typical = max(widths, default=0), sorted(widths)[len(widths) // 2] if widths else 0
    tokens = workload.batch_size * workload.prompt_tokens
    activations = tokens * (2 * widest + _WIDE_TENSORS * typical)
    num_blocks = max((len(each) for each in model.modules() if isinstance(each, nn.ModuleList)), default=1)
    return ModelCosts(
        workload=workload,
        prefill_bytes=activations,
        half_prefill_bytes=activations // 2,
        decode_bytes=activations // workload.prompt_tokens,
        kv_fixed_bytes=0,
        kv_bytes_per_token=2 * typical * num_blocks,
        is_measured=False,
        reason=reason,
    )
