"""Puts the streamer's verbs on a model with public hooks, and guards what would give wrong numbers."""

from __future__ import annotations

import contextlib
import functools
import os
import time
import types
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bigmodel.errors import ForkedError, GradientRefusedError, MoveRefusedError, StreamingError
from bigmodel.hooks.backward import Backward, any_recorded, records
from bigmodel.hooks.caches import move_cache
from bigmodel.hooks.hops import Hops, Phase, Route, SiteHops, first_device, moved
from bigmodel.hooks.pace import Pace, PassKind, Reading
from bigmodel.hooks.pass_lock import PassLock, num_calls
from bigmodel.hooks.stats import StreamStats
from bigmodel.hooks.streamer import Streamer
from bigmodel.offload.store import Store

__all__ = ["Attachment", "PassCheck", "opaque"]

COPY_REFUSED = (
    "A model whose weights stream, or whose passes are checked against a budget, cannot be copied: the copy would share its "
    "slots. Load it a second time, or call bigmodel.materialize(model) first."
)
PICKLE_REFUSED = (
    "A model whose weights stream, or whose passes are checked against a budget, cannot be pickled. Use "
    "bigmodel.save(model, folder)."
)
# Looks at a pass before it begins: says of which kind it is, and raises DoesNotFitError when it would not fit; "" is the root's
# name.
PassCheck = Callable[[str, nn.Module, tuple[Any, ...], Mapping[str, Any]], PassKind]


class Attachment:
    """The hooks of one model, and everything that goes when they go.

    Args:
        model: the root; its forward is a pass.
        streamer: moves the units; None where nothing streams and only passes are checked.
        sites: per unit number, the modules whose forward uses it.
        entries: name -> modules around units, which may be called by themselves, such as an encoder; the root is always one.
        check_pass: called before each pass.
        sizes: resident and mapped bytes, for the statistics.
        resting: blocks of the units that stay where they run.
        refuses_moves: whether weights rest elsewhere than where they run, so that the model cannot be moved or cast in place.
        route: the devices of a pass; None where all of it runs on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        streamer: Streamer | None,
        sites: Mapping[int, Sequence[tuple[str, nn.Module]]],
        entries: Mapping[str, nn.Module],
        check_pass: PassCheck | None,
        sizes: StreamStats,
        *,
        refuses_moves: bool,
        resting: Sequence[nn.Module] = (),
        route: Route | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self._streamer = streamer
        self._check_pass = check_pass
        self._sizes = sizes
        self._pid = os.getpid()
        self._lock = PassLock()
        self._opener: nn.Module | None = None  # whose call is the pass under way
        self._num_inside = 0  # calls of it inside of it
        self._pass_started_s = 0.0
        self._num_passes = 0
        self._pass_s = 0.0
        self._pace = Pace()
        self._main = route.main if route is not None else None
        self._hops = Hops()
        self._kind = PassKind(self._hops.phase)
        self._site_hops: list[tuple[weakref.ref[nn.Module], SiteHops]] = []
        self._came_from: torch.device | None = None  # the inputs of the pass under way
        self._handles: list[RemovableHandle] = []
        ways = {} if route is None else {module: route.ways_of(name) for name, module in route.modules.items()}
        self._loaded = {id(parameter) for parameter in model.parameters()}  # as long as it lives
        modules_of = {number: [module for _, module in found] for number, found in sites.items()}
        self._backward = Backward(streamer, self._lock, modules_of, resting)
        for number, modules in sites.items():
            for name, module in modules:
                devices = {phase: site.device for phase, site in ways[module].items()} if module in ways else {}
                if not devices and self._main is not None:
                    devices = dict.fromkeys(Phase, self._main)
                hook = _UnitHook(self, number, name, devices)
                self._handles.append(
                    module.register_forward_pre_hook(opaque(hook.enter), prepend=True, with_kwargs=True)
                )
                self._handles.append(module.register_forward_hook(opaque(hook.leave), always_call=True))
        for module, way in ways.items():
            hops = SiteHops(self._hops, module, way)
            self._site_hops.append((weakref.ref(module), hops))
            self._handles.append(module.register_forward_pre_hook(opaque(hops.enter), prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(opaque(hops.leave), with_kwargs=True))
        # After the units' own hooks, so that a root that is a unit begins its pass first and ends it last.
        for name, module in {**entries, "": model}.items():
            begin = functools.partial(opaque(self._begin_pass), name)
            self._handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            self._handles.append(module.register_forward_hook(opaque(self._end_pass), always_call=True))
        if refuses_moves:
            model.__dict__["_apply"] = _MoveGuard(model)
        if streamer is not None:
            # Threads and slots go with the model, also when nobody calls unload.
            self._finalizer = weakref.finalize(model, streamer.close)

    def detach(self) -> None:
        """Take the hooks off and stop the reader threads; parameters go to rest and stay right."""
        model = self._model()
        with self._lock:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._backward.take_off()
            if self._streamer is not None:
                self._finalizer.detach()
                self._streamer.close()
            for reference, hops in self._site_hops:
                module = reference()
                if module is not None:
                    hops.move_buffers(module)
            if model is not None:
                model.__dict__.pop("_apply", None)

    @property
    def is_running(self) -> bool:
        """Whether a pass is under way."""
        return self._opener is not None

    @property
    def phase(self) -> Phase:
        """Of the pass under way; between passes, of the one that is expected."""
        return self._hops.phase

    @contextlib.contextmanager
    def fetching_from(self, store_over: Callable[[Store], Store]) -> Iterator[None]:
        """Between passes: units are fetched from the store that is made over the model's own, until the block ends."""
        streamer = self._streamer
        if streamer is None:
            yield
            return
        with self._lock:
            own, streamer.store = streamer.store, store_over(streamer.store)
        try:
            yield
        finally:
            with self._lock:
                streamer.store = own

    def stats(self) -> StreamStats:
        """Counts so far."""
        counts = self._streamer.counts() if self._streamer is not None else StreamStats()
        return replace(
            counts,
            num_passes=self._num_passes,
            pass_s=self._pass_s,
            resident_bytes=self._sizes.resident_bytes,
            mapped_bytes=self._sizes.mapped_bytes,
            steady=self._pace.steady(self._reading().flow, is_running=self.is_running),
        )

    def _reading(self) -> Reading:
        return Reading() if self._streamer is None else self._streamer.reading()

    def __deepcopy__(self, memo: dict[int, object]) -> Attachment:
        raise StreamingError(COPY_REFUSED)

    def __reduce__(self) -> str:
        raise StreamingError(PICKLE_REFUSED)

    def _begin_pass(
        self, entry: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        self._refuse_fork()
        if self._opener is not None and self._lock.is_mine():
            depth = num_calls(self._opener)
            if module is not self._opener and depth > 0:
                return None  # a part of the pass under way
            if module is self._opener and depth > 1:
                self._num_inside += 1
                return None
            # An interrupt (Ctrl-C) ended a pass where no hook saw it: what it left is put to rest now.
        self._lock.acquire()
        is_nested = self._backward.is_here()  # a pass in a gradient's hook: what backward holds stays
        if not is_nested:
            self._lock.depth = 1
        try:
            if self._check_pass is not None:
                self._kind = self._check_pass(entry, module, args, kwargs)
                self._hops.phase = self._kind.phase
            self._kind = replace(self._kind, is_whole=not entry)
            is_recorded = records(module, args, kwargs)
            if is_recorded:
                self._refuse_trained()
                self._backward.put_on(module)
                args, kwargs = self._backward.without_cache(module, args, kwargs)
            if self._streamer is not None:
                if not is_nested:
                    self._backward.forget()
                    self._streamer.reset()
                self._streamer.turn_to(self._hops.phase)
        except BaseException:
            self._opener = None
            self._lock.release()
            raise
        self._opener, self._num_inside = module, 0
        self._pass_started_s = time.perf_counter()
        if self._main is None:
            return (args, kwargs) if is_recorded else None
        self._came_from = first_device((args, kwargs))
        if not self._site_hops:  # one device runs all
            move_cache((args, kwargs), None, self._main)
        return self._hops.into_pass(args, self._main), self._hops.into_pass(kwargs, self._main)

    def _end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if module is not self._opener or not self._lock.is_mine():
            return None
        if self._num_inside:
            self._num_inside -= 1
            return None
        pass_s = time.perf_counter() - self._pass_started_s
        self._pass_s += pass_s
        self._num_passes += output is not None
        self._opener = None
        try:
            if output is not None:  # one that failed is no pass, and moved what the next one is told of
                self._pace.ended(self._kind, pass_s, self._reading())
            self._hops.forget()
            self._hops.phase = Phase.STEP  # which mostly comes next
            if self._streamer is not None:
                self._streamer.turn_to(Phase.STEP)
            return moved(output, self._came_from) if self._main is not None and self._came_from is not None else None
        finally:
            self._lock.release()

    def _refuse_trained(self) -> None:
        """GradientRefusedError where weights that were loaded are to be trained: what is streamed is read anew each time."""
        model = self._model()
        own = (
            []
            if model is None
            else [n for n, each in model.named_parameters() if each.requires_grad and id(each) in self._loaded]
        )
        if own:
            raise GradientRefusedError(
                f"{len(own)} of the model's own parameters require grad, such as {own[0]}, and its weights stream: only what "
                "was added to it (adapters) can be trained. Call model.requires_grad_(False) before adapters are added, or "
                "bigmodel.materialize(model)."
            )

    def _refuse_fork(self) -> None:
        if os.getpid() != self._pid and self._streamer is not None:
            raise ForkedError(
                f"This model was loaded in process {self._pid} and streams with threads that do not exist in its forked "
                f"child {os.getpid()}. Load it in the child, or start the child with the 'spawn' method."
            )


class _UnitHook:
    """Enter and leave for one module of one unit."""

    __slots__ = ("_added_on", "_attachment", "_devices", "_name", "_num_known", "_number", "_streamer")

    def __init__(self, attachment: Attachment, number: int, name: str, devices: Mapping[Phase, torch.device]) -> None:
        assert attachment._streamer is not None
        self._devices = devices  # none, where all runs on the host
        self._num_known = 0
        self._added_on: torch.device | None = None
        self._attachment: Attachment | None = attachment
        self._number, self._name = number, name
        self._streamer = attachment._streamer

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attachment = self._attachment
        if attachment is None:
            return
        phase = attachment._hops.phase
        if phase in self._devices:
            self._bring_added(module, self._devices[phase], attachment._loaded)
        if not self._streamer.is_fetched(self._number, phase):
            return
        attachment._refuse_fork()
        if records(module, args, kwargs) and not attachment._backward.covers(module):
            self._refuse_gradients(module, args, kwargs)
        # A submodule may be called without the root: then each unit takes its turn on its own.
        attachment._lock.acquire()
        try:
            self._streamer.enter(self._number)
        finally:
            if not self._streamer.is_entered(self._number):
                attachment._lock.release()

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        attachment = self._attachment
        if attachment is None or not attachment._lock.is_mine() or not self._streamer.is_entered(self._number):
            return
        try:
            self._streamer.leave(self._number)
        finally:
            attachment._lock.release()
        if torch.is_grad_enabled() and any_recorded(output) and not attachment._backward.covers(module):
            self._refuse_gradients(module, args, {})

    def _bring_added(self, module: nn.Module, device: torch.device, loaded: Collection[int]) -> None:
        """Parameters that somebody added (adapters) were made where the unit's weights rest: they stay where it runs."""
        parameters = list(module.parameters())
        if (len(parameters), device) != (self._num_known, self._added_on):
            self._num_known, self._added_on = len(parameters), device
            for parameter in parameters:
                if id(parameter) not in loaded and parameter.device != device:
                    parameter.data = parameter.data.to(device)

    def __deepcopy__(self, memo: dict[int, object]) -> _UnitHook:
        """The hook of a copied module does nothing: the copy has its weights in memory of its own."""
        twin = object.__new__(_UnitHook)
        twin._attachment = None
        return twin

    def _refuse_gradients(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        what = "computed with something from elsewhere that requires grad"
        if any(parameter.requires_grad for parameter in module.parameters()):
            what = "has a parameter that requires grad"
        elif records(module, args, kwargs):
            what = "was given an input that requires grad"
        raise GradientRefusedError(
            f"{self._name} {what}, and its weights are streamed: they would be overwritten before backward, and the "
            "gradient would be wrong. Run under torch.no_grad() or torch.inference_mode(); call the whole model, with what "
            "requires grad in it or among its inputs, so that its units fetch their weights again in backward; or call "
            "bigmodel.materialize(model) to train it."
        )


def opaque(hook: Any) -> Any:
    """A bound method that torch.compile calls and does not look into: what it finds there is another thing in each pass."""
    return types.MethodType(torch.compiler.disable(hook.__func__), hook.__self__)  # type: ignore[no-untyped-call]


class _MoveGuard:
    """Refuses moves and casts before anything is changed: the one method that is replaced, on the root instance alone."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # weak: it stands in the model itself

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        model = self._model()
        assert model is not None
        kinds = {(tensor.dtype, tensor.device) for tensor in (*model.parameters(), *model.buffers())}
        for dtype, device in sorted(kinds, key=str):
            before = torch.empty(0, dtype=dtype, device=device)
            after = fn(before)
            if after is not before or after.is_shared():  # type: ignore[no-untyped-call]
                raise MoveRefusedError(
                    f"This model streams its weights and cannot be moved, cast or shared in place: {dtype} on {device} would "
                    f"become {after.dtype} on {after.device}. Call bigmodel.materialize(model, device) to have all weights in "
                    "one place, or load it again with another dtype= or device_map=."
                )
        return model

    def __deepcopy__(self, memo: dict[int, object]) -> _MoveGuard:
        raise StreamingError(COPY_REFUSED)

    def __reduce__(self) -> str:
        raise StreamingError(PICKLE_REFUSED)
