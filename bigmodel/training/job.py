"""What a run trains, as a forecast needs it: rehearsed on tensors that hold nothing, before anything is read."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bigmodel.device_map.counter import NotTriedError
from bigmodel.device_map.rates import NOTHING
from bigmodel.device_map.rehearsal import Moment, OptimizerStep, Rehearsal, rehearse, rehearse_optimizer
from bigmodel.device_map.trial import Call
from bigmodel.device_map.twin import twin_of
from bigmodel.footprint import MAPPED_BYTES
from bigmodel.models import example_inputs
from bigmodel.training.config import PRECISIONS
from bigmodel.training.quantized import Quantized
from bigmodel.training.recompute import recomputed_units
from bigmodel.training.weights import Origin

__all__ = ["Group", "Job", "job_of", "num_states", "unread"]

_SIZE = 1024  # of a parameter that an optimizer is tried with
_SIZES = (1, 2, 4, 8)  # samples of the passes that are tried

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are gathered together.

    Attributes:
        num_trained: values.
        frozen_bytes: in the dtype that they are stored in.
    """

    num_trained: int
    frozen_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, whoever carries it out.

    Attributes:
        groups: in the order of the model; the last is the root's, with all that is in no other.
        group_of: name of a parameter that is trained -> number of its group.
        sizes: name -> values.
        num_tail: groups at the end, before the root's, that come after the last block.
        itemsize: bytes of a value that computes.
        optimizer: of a step of all parameters.
        rehearsed: of samples in a pass, whether units are checkpointed, and whether large blocks are told apart, as on a host:
            what the pass takes.
        has_scalars: whether a parameter has no dimension.
        num_largest: values of the largest parameter, trained or not.
        tokens_per_sample: the longest.
        global_batch_size: samples of a step.
    """

    groups: tuple[Group, ...]
    group_of: Mapping[str, int]
    sizes: Mapping[str, int]
    num_tail: int
    itemsize: int
    optimizer: OptimizerStep
    rehearsed: Callable[[int, bool, bool], Rehearsal]
    tokens_per_sample: int
    global_batch_size: int
    has_scalars: bool = False
    num_largest: int = 0

    @property
    def num_trained(self) -> int:
        return sum(each.num_trained for each in self.groups)

    @property
    def frozen_bytes(self) -> int:
        return sum(each.frozen_bytes for each in self.groups)

    def gathered_bytes(self, number: int) -> int:
        """Of a group, as it computes."""
        return self.itemsize * self.groups[number].num_trained + self.groups[number].frozen_bytes


def job_of(
    origin: Origin,
    *,
    precision: str,
    global_batch_size: int,
    optimizer: MakeOptimizer | Optimizer | None = None,
    example: Mapping[str, torch.Tensor] | None = None,
    num_tokens: int = 0,
    units: Any = None,
) -> Job:
    """What is trained, whoever carries it out.

    Args:
        origin: its parameters may be on meta.
        precision: of a TrainingConfig.
        global_batch_size: samples of a step.
        optimizer: of parameters, to it; or one that was built; AdamW if None.
        example: a batch of one sample, the largest; made of `num_tokens` if None.
        num_tokens: of a sample, where there is no example.
        units: of `Origin.groups`.

    Raises:
        NotTriedError: the model, its optimizer or fake tensors cannot follow.
    """
    module, dtype = origin.module, PRECISIONS[precision]
    found = origin.groups(units)
    groups, group_of, sizes = [], {}, {}
    seen: set[int] = set()
    names = {id(each): name for name, each in module.named_parameters()}
    in_4_bits = {id(each.weight): each.held_bytes for each in module.modules() if isinstance(each, Quantized)}
    for number, root in enumerate([*found, module]):
        num_trained = frozen_bytes = 0
        for parameter in root.parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad:
                num_trained += parameter.numel()
                group_of[names[id(parameter)]] = number
                sizes[names[id(parameter)]] = parameter.numel()
            else:
                frozen_bytes += in_4_bits.get(id(parameter), parameter.nbytes)
        groups.append(Group(num_trained, frozen_bytes))
    blocks = [number for number, each in enumerate(found) if any(True for _ in each.children())]
    trained = [each.shape for each in module.parameters() if each.requires_grad]
    if example is None and example_inputs(module, 1, max(1, num_tokens)) is None:
        raise NotTriedError("nothing is known that the model's forward could be called with")
    known = {id(each): name for name, each in module.named_modules()}
    checkpointed = [known[id(each)] for each in recomputed_units(found)]
    call = functools.partial(_call, module, example, num_tokens)
    return Job(
        groups=tuple(groups),
        group_of=group_of,
        sizes=sizes,
        num_tail=len(found) - 1 - max(blocks, default=len(found) - 1),
        itemsize=dtype.itemsize,
        optimizer=rehearse_optimizer(_maker_of(optimizer), trained) if trained else OptimizerStep(0, 0, NOTHING),
        rehearsed=_Rehearsals(module, call, checkpointed, dtype),
        tokens_per_sample=num_tokens or _tokens_of(example),
        global_batch_size=global_batch_size,
        has_scalars=any(not each.ndim for each in module.parameters()),
        num_largest=max(each.numel() for each in module.parameters()),
    )


def num_states(optimizer: Optimizer) -> int:
    """How many tensors of a parameter's size it keeps of each; two, as Adam, where that cannot be tried."""
    try:
        return math.ceil(rehearse_optimizer(_maker_of(optimizer), [(_SIZE,)]).state_bytes / (4 * _SIZE) - 0.5)
    except NotTriedError:
        return 2


def unread(origin: Origin) -> Origin:
    """The same with a module of its own on meta, which nothing that an engine does to the other one reaches."""
    twin = twin_of(origin.module)
    made: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for key, each in module._parameters.items():
            if each is not None:
                if id(each) not in made:
                    made[id(each)] = nn.Parameter(
                        torch.empty_like(each, device="meta"), requires_grad=each.requires_grad
                    )
                module._parameters[key] = made[id(each)]
    return replace(origin, module=twin)


class _Rehearsals:
    """Passes of a few numbers of samples, and between and beyond them what these say: it grows evenly with samples.

    Where large blocks and small ones are told apart, it does so only from one power of two to the next.
    """

    def __init__(
        self, module: nn.Module, call: Callable[[int], Call], checkpointed: Sequence[str], dtype: torch.dtype
    ) -> None:
        self._module, self._call, self._checkpointed, self._dtype = module, call, checkpointed, dtype
        self._known: dict[tuple[int, bool], Rehearsal] = {}

    def __call__(self, micro_batch_size: int, checkpoints: bool, by_block: bool = False) -> Rehearsal:
        sizes = _SIZES if by_block else _SIZES[:2]
        if micro_batch_size in sizes:
            return self._tried(micro_batch_size, checkpoints)
        place = min(bisect.bisect(sizes, micro_batch_size), len(sizes) - 1)
        fewer, more = sizes[place - 1], sizes[place]
        one, two = self._tried(fewer, checkpoints), self._tried(more, checkpoints)
        if [m.name for m in one.moments] != [m.name for m in two.moments]:
            return two
        times = (micro_batch_size - fewer) / (more - fewer)

        def grown(first: int, second: int) -> int:
            return max(0, round(first + times * (second - first)))

        return Rehearsal(
            grown(one.host_bytes, two.host_bytes),
            tuple(
                Moment(
                    first.name,
                    grown(first.highest_bytes, second.highest_bytes),
                    grown(first.mapped_bytes, second.mapped_bytes),
                    grown(first.heap_bytes, second.heap_bytes),
                    grown(first.held_bytes, second.held_bytes),
                    grown(first.held_mapped_bytes, second.held_mapped_bytes),
                )
                for first, second in zip(one.moments, two.moments, strict=True)
            ),
            one.work.plus(two.work, times).plus(one.work, -times),
        )

    def _tried(self, micro_batch_size: int, checkpoints: bool) -> Rehearsal:
        key = micro_batch_size, checkpoints
        if key not in self._known:
            units = self._checkpointed if checkpoints else ()
            call = functools.partial(self._call, micro_batch_size)
            self._known[key] = rehearse(self._module, call, units, dtype=self._dtype, mapped_bytes=MAPPED_BYTES)
        return self._known[key]


def _call(
    module: nn.Module, example: Mapping[str, torch.Tensor] | None, num_tokens: int, micro_batch_size: int
) -> Call:
    if example is not None:
        return (), {name: _empty(each, micro_batch_size) for name, each in example.items()}
    inputs = example_inputs(module, micro_batch_size, num_tokens)
    assert inputs is not None  # asked before
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return (), inputs | ({} if tokens is None else {"labels": torch.zeros_like(tokens)})


def _empty(value: Any, micro_batch_size: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros(micro_batch_size * value.shape[0], *value.shape[1:], dtype=value.dtype, device="cpu")


def _tokens_of(example: Mapping[str, torch.Tensor] | None) -> int:
    """Of a sample: its labels, or the longest of what else there is."""
    if not example:
        return 1
    labels = example.get("labels")
    if isinstance(labels, torch.Tensor) and labels.ndim > 1:
        return int(labels.shape[1])
    return max([each.shape[1] for each in example.values() if each.ndim == 2], default=1)


def _maker_of(optimizer: MakeOptimizer | Optimizer | None) -> MakeOptimizer:
    if optimizer is None:
        return torch.optim.AdamW
    if not isinstance(optimizer, Optimizer):
        return optimizer
    kind: Any = type(optimizer)

    def like(parameters: list[nn.Parameter]) -> Optimizer:
        made: Optimizer = kind(parameters, **optimizer.defaults)
        return made

    return like
