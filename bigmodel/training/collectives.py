"""What a loop says to all of its processes: values gathered, summed, sent and divided, in nested lists, tuples and dicts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bigmodel.errors import InvalidArgumentError
from bigmodel.training.draws import random_states, restore_random
from bigmodel.training.processes import Processes

__all__ = ["Collectives", "mapped"]

Function = TypeVar("Function", bound=Callable[..., Any])
_HALVES = (torch.float16, torch.bfloat16)


class Collectives:
    """The verbs, of which every process calls the same ones in the same order. Alone, a process talks to itself.

    Structures are lists, tuples, named tuples and mappings of tensors; what is no tensor is left as it is.

    Attributes:
        processes: all of them.
    """

    processes: Processes

    @property
    def is_main_process(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.processes.is_main

    def wait_for_everyone(self) -> None:
        """For all processes to come here."""
        self.processes.wait()

    def print(self, *values: Any, **options: Any) -> None:
        """The built-in, in the main process alone."""
        if self.is_main_process:
            print(*values, **options)

    def on_main_process(self, function: Function) -> Function:
        """A function that other processes do not run: they get None."""

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if self.is_main_process else None

        return called  # type: ignore[return-value]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The others begin what is inside when the main process has ended it: it fills a cache, and they find it full."""
        if not self.is_main_process:
            self.processes.all_right(None)
            yield
            return
        try:
            yield
        except BaseException as error:
            self.processes.all_right(error)  # raises it here, and another in those that wait
        self.processes.all_right(None)

    def gather(self, values: Any) -> Any:
        """Rows of all processes, in the order of their ranks; there may be other numbers of rows in each.

        Args:
            values: tensors ``[rows, ...]``; one without a dimension is a row.

        Returns:
            The same structure, tensors ``[rows of all, ...]``, in every process.
        """
        return mapped(values, self._gathered, only_tensors=True)

    def gather_objects(self, value: Any) -> list[Any]:
        """What each process gave, by rank; anything that can be pickled."""
        return self.processes.gathered(value)

    def reduce(self, values: Any, reduction: str = "sum") -> Any:
        """Sums or means over processes, elementwise; halves are summed in float32.

        Args:
            values: tensors, of the same shapes in all processes.
            reduction: "sum" or "mean".
        """
        if reduction not in ("sum", "mean"):
            raise InvalidArgumentError(f'reduction is {reduction!r}. Give "sum" or "mean".')

        def reduced(tensor: torch.Tensor) -> torch.Tensor:
            if reduction == "mean" and not tensor.is_floating_point():
                raise InvalidArgumentError(f"The mean of {tensor.dtype} is not one. Give a tensor of a floating dtype.")
            total = tensor.detach().to(torch.float32 if tensor.dtype in _HALVES else tensor.dtype, copy=True)
            if self.processes.size > 1:
                dist.all_reduce(total)
            if reduction == "mean":
                total /= self.processes.size
            return total.to(tensor.dtype)

        return mapped(values, reduced)

    def broadcast(self, values: Any, source: int = 0) -> Any:
        """One process's values, in all of them; the others give tensors of the same shapes and dtypes."""

        def sent(tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.detach().clone().contiguous()
            if self.processes.size > 1:
                dist.broadcast(_bytes(copy), src=source)
            return copy

        return mapped(values, sent)

    def scatter(self, values: Any, source: int = 0) -> Any:
        """Rows of one process's tensors, divided into parts of equal size; each process gets the one of its rank.

        Args:
            values: in the source, tensors ``[processes x rows, ...]``; what the others give does not count.
        """
        size = self.processes.size
        parts: list[Any] = [None] * size
        error: BaseException | None = None
        if self.processes.rank == source:
            try:
                parts = [mapped(values, functools.partial(_part, rank=rank, size=size)) for rank in range(size)]
            except InvalidArgumentError as caught:
                error = caught
        self.processes.all_right(error)
        if size == 1:
            return parts[0]
        given: list[Any] = [None]
        dist.scatter_object_list(given, parts, src=source, group=self.processes.host_group)
        return mapped(given[0], lambda tensor: tensor.to(self.processes.device))

    def pad_across_processes(self, values: Any, dim: int = 0, value: float = 0, *, first: bool = False) -> Any:
        """Tensors made as long in one dimension as the longest of all processes.

        Args:
            dim: which one; tensors that have none of that number stay as they are.
            value: of what is added.
            first: whether it is added before the rest, and not after it.
        """

        def padded(tensor: torch.Tensor) -> torch.Tensor:
            if not -tensor.ndim <= dim < tensor.ndim:
                return tensor
            longest = max(self.gather_objects(tensor.shape[dim]))
            shape = list(tensor.shape)
            shape[dim] = longest - shape[dim]
            added = tensor.new_full(shape, value)
            return torch.cat([added, tensor] if first else [tensor, added], dim)

        return mapped(values, padded)

    @contextlib.contextmanager
    def split_between_processes(self, values: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This process's part of a list, tuple, tensor, or mapping of them: consecutive, the first ones one longer.

        Args:
            values: the same in all processes.
            apply_padding: whether the last value is repeated where a part is shorter.
        """
        lengths = {len(each) for each in values.values()} if isinstance(values, Mapping) else {len(values)}
        if len(lengths) != 1:
            raise InvalidArgumentError(
                f"The mapping's values have {_as_words(lengths)} elements. Give values of one length."
            )
        each, more = divmod(lengths.pop(), self.processes.size)
        rank = self.processes.rank
        begin = rank * each + min(rank, more)
        end = begin + each + (rank < more)

        def part(whole: Any) -> Any:
            found = whole[begin:end]
            missing = each + bool(more) - (end - begin) if apply_padding and len(whole) else 0
            if not missing:
                return found
            last = whole[-1:]
            return torch.cat([found, *[last] * missing]) if isinstance(whole, torch.Tensor) else found + last * missing

        yield {key: part(whole) for key, whole in values.items()} if isinstance(values, Mapping) else part(values)

    def synchronize_rng(self) -> None:
        """Give every process the main one's generators of torch, numpy and Python."""
        restore_random(self.processes.same(random_states(self.processes)), self.processes)

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.detach().reshape(1) if not tensor.ndim else tensor.detach()
        if self.processes.size == 1:
            return rows
        shapes = self.gather_objects(tuple(rows.shape))
        if len({shape[1:] for shape in shapes}) > 1:
            raise InvalidArgumentError(
                f"Processes gather tensors of the shapes {', '.join(map(str, shapes))}: they may differ in the first dimension "
                "alone. Call run.pad_across_processes first."
            )
        longest = max(shape[0] for shape in shapes)
        own = rows.new_zeros((longest, *rows.shape[1:]))
        own[: rows.shape[0]] = rows
        parts = [torch.empty_like(own) for _ in shapes]
        dist.all_gather([_bytes(part) for part in parts], _bytes(own))
        return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])


def _as_words(lengths: set[int]) -> str:
    """As words."""
    return " and ".join(map(str, sorted(lengths)))


def mapped(values: Any, function: Callable[[torch.Tensor], torch.Tensor], *, only_tensors: bool = False) -> Any:
    """The same structure, with a function's results in the place of tensors; of what is no tensor, itself or an error."""
    if isinstance(values, torch.Tensor):
        return function(values)
    if isinstance(values, Mapping):
        found = {key: mapped(each, function, only_tensors=only_tensors) for key, each in values.items()}
        if isinstance(values, MutableMapping) and type(values) is not dict:
            try:
                return type(values)(found)  # type: ignore[call-arg]
            except TypeError:
                return found
        return found
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(mapped(each, function, only_tensors=only_tensors) for each in values))
    if isinstance(values, (list, tuple)):
        return type(values)(mapped(each, function, only_tensors=only_tensors) for each in values)
    if only_tensors:
        raise InvalidArgumentError(f"A {type(values).__name__} is no tensor. Call run.gather_objects for what is none.")
    return values


def _part(tensor: torch.Tensor, *, rank: int, size: int) -> torch.Tensor:
    if not tensor.ndim or tensor.shape[0] % size:
        raise InvalidArgumentError(
            f"A tensor of shape {tuple(tensor.shape)} does not divide into {size} equal parts. Give rows that do."
        )
    each = tensor.shape[0] // size
    return tensor.detach()[rank * each : (rank + 1) * each].to("cpu", copy=True)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's own bytes: not every backend sends every dtype."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.ndim else tensor.view(1).view(torch.uint8)
