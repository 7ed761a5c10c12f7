"""A model's divisions into units, coarse to fine, and what each of them takes."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from bigmodel.checkpoint.spec import Source
from bigmodel.device_map.cost import ModelCosts, UnitWork, measure, work_of_units
from bigmodel.device_map.demand import Costs, Demand, UnitCost
from bigmodel.device_map.maps import divide_by_home
from bigmodel.device_map.plan import Plan, Workload
from bigmodel.device_map.rates import NOTHING, Work
from bigmodel.device_map.trial import Trial
from bigmodel.device_map.unit import Unit, find_units
from bigmodel.errors import DeviceMapError
from bigmodel.hooks.caches import cache_layer_of
from bigmodel.loading.recorded import Recorded
from bigmodel.models import Skeleton, example_inputs
from bigmodel.offload.arena import ALIGN_BYTES
from bigmodel.offload.link import RING_BYTES
from bigmodel.offload.reader import layout_of
from bigmodel.offload.resident import NUM_READERS

__all__ = ["Divisions"]


class Divisions:
    """Iterates over the divisions of one model, each finer than the one before; tells their costs.

    Args:
        skeleton: the model, where its bytes are, and which modules it wants kept whole: only `last_resorts` divides those.
        fingerprint: of the checkpoint; None where a module is planned for by itself, and its parameters' sizes count.
        no_split: class names of modules that are never divided, whatever the model says.
        baseline_bytes: what the interpreter holds, outside the budget.

    Attributes:
        trial: of the model.
        fingerprint: of the checkpoint; empty for a module alone.
    """

    def __init__(
        self, skeleton: Skeleton, *, fingerprint: str | None, no_split: Collection[str], baseline_bytes: int
    ) -> None:
        self.trial = Trial(skeleton.model)
        self._model = weakref.ref(skeleton.model)  # with what it is given later
        # Its twin's shape is what is decided about, also when the model has its weights, its hooks and its adapters.
        self._skeleton = replace(skeleton, model=self.trial.twin)
        self.fingerprint = fingerprint or ""
        self._has_checkpoint = fingerprint is not None
        self._no_split = frozenset(no_split)
        self._baseline_bytes = baseline_bytes
        self._parameters = dict(self._skeleton.model.named_parameters())
        self._sizes = {name: parameter.nbytes for name, parameter in self._parameters.items()}

    def __iter__(self) -> Iterator[tuple[Unit, ...]]:
        """The model's units; then finer and finer ones, as far as there are any."""
        no_split = self._no_split | self._skeleton.no_split
        units = find_units(self._skeleton.model, sizes=self._sizes, no_split=no_split)
        yield units
        yield from self._finer(units, no_split)

    def last_resorts(self) -> Iterator[tuple[Unit, ...]]:
        """Finer ones still, for where nothing fits otherwise: they divide what the model wants kept whole."""
        if self._skeleton.no_split - self._no_split:
            *_, units = iter(self)
            yield from self._finer(units, self._no_split)

    def _finer(self, units: tuple[Unit, ...], no_split: Collection[str]) -> Iterator[tuple[Unit, ...]]:
        while True:
            largest = max(
                (sum(self._sizes[name] for name in unit.parameters) for unit in units if not unit.encloses), default=0
            )
            finer = find_units(
                self._skeleton.model, sizes=self._sizes, max_unit_bytes=max(1, largest // 2), no_split=no_split
            )
            if len(finer) <= len(units) or largest <= 1:
                return
            units = finer
            yield units

    def of_plan(self, plan: Plan) -> tuple[tuple[Unit, ...], set[str]]:
        """The division that a plan was made for, and the names of the units that are whole in it."""
        homes_of_units = {placement.unit: placement.home for placement in plan.placements}
        # A part's name says which tier the map gave it, also where it had to stay elsewhere.
        parts = {
            name: placement.unit.rpartition(" (")[2].removesuffix(")")
            for placement in plan.placements
            for name in placement.parameters
        }
        for whole in itertools.chain(self, self.last_resorts()):
            by_parameter = {
                name: parts.get(name) or homes_of_units.get(unit.name, "") for unit in whole for name in unit.parameters
            }
            units, _ = divide_by_home(whole, by_parameter)
            if {unit.name for unit in units} == homes_of_units.keys():
                return units, {unit.name for unit in whole}
        raise DeviceMapError(
            f"The plan names {len(homes_of_units)} units that this model is not divided into. Make it again with make_plan."
        )

    def _cost_of(self, unit: Unit, whole_units: Collection[str]) -> UnitCost:
        """What a unit takes in memory."""
        weight_bytes = sum(self._parameters[name].nbytes for name in unit.parameters)
        is_part = unit.name not in whole_units
        if not self._has_checkpoint:
            return UnitCost(
                unit=unit,
                weight_bytes=weight_bytes,
                resident_bytes=weight_bytes,
                slot_bytes=weight_bytes,
                can_gather=unit.gathers,
                must_stay=unit.encloses,
                is_part=is_part,
            )
        sources = [self._skeleton.sources[name] for name in unit.parameters if name in self._skeleton.sources]
        layout, across = layout_of(sources), layout_of(sources, for_accelerator=True)
        # What the checkpoint does not have was initialised, and stays.
        initialised_bytes = sum(
            self._parameters[name].nbytes for name in unit.parameters if name not in self._skeleton.sources
        )
        converted = [source for source in sources if source.conversion is not None]
        # Converted weights stream from a cache file, where each begins within a page of where the last one ends.
        converted_bytes = sum(source.nbytes + ALIGN_BYTES for source in converted)
        return UnitCost(
            unit=unit,
            weight_bytes=weight_bytes,
            # All that stays is read as one, where a run of reads may begin in the gap before it.
            resident_bytes=layout.nbytes + 2 * ALIGN_BYTES * layout.num_runs + converted_bytes + initialised_bytes,
            slot_bytes=max(layout.nbytes, across.nbytes)
            + converted_bytes
            + ALIGN_BYTES * bool(converted)
            + initialised_bytes,
            read_bytes=layout.read_bytes + converted_bytes,
            staging_bytes=layout.staging_bytes,
            conversion_bytes=max((_conversion_bytes(source) for source in converted), default=0),
            converted_bytes=converted_bytes,
            can_gather=unit.gathers
            and all(source.is_view for source in sources)
            and len(sources) == len(unit.parameters),
            must_stay=unit.encloses or len(sources) < len(unit.parameters) or not sources,
            is_part=is_part,
        )

    def measure(self, workload: Workload) -> ModelCosts:
        """Memory and work of the workload's passes; with what training takes, where it trains."""
        measured = measure(self.trial, self._skeleton.model, self._example_inputs, workload)
        if not workload.trains:
            return measured
        nbytes, work = self.recorded.tried(workload.num_sequences, workload.prompt_tokens, adapts=True)
        return replace(
            measured,
            prefill_bytes=max(measured.prefill_bytes, nbytes),
            device_bytes=max(measured.device_bytes, nbytes),
            recorded=work,
        )

    @functools.cached_property
    def recorded(self) -> Recorded:
        """What passes of the model take that are recorded."""
        units = next(iter(self))
        sites = tuple(site for unit in units for site in unit.sites if site and not unit.encloses)
        return Recorded(self._model, sites)

    def costs_of(
        self, units: Sequence[Unit], whole_units: Collection[str], measured: ModelCosts, workload: Workload
    ) -> Costs:
        """What is to be placed: the units of a division, and what is beside them."""
        model = self._skeleton.model
        modules = dict(model.named_modules(remove_duplicate=False))
        names = list(modules)
        keeping = [name for name, module in modules.items() if cache_layer_of(module) is not None]
        # Parts of a unit that a map divides run together: the first one's work is all of it.
        at_sites = {unit.sites: unit for unit in reversed(units)}
        works, beside = work_of_units(measured, list(at_sites.values()), names)
        work_at = dict(zip(at_sites, works, strict=True))
        nothing = UnitWork(NOTHING, NOTHING, 0)
        costs = []
        for unit in units:
            work = work_at[unit.sites]
            if at_sites[unit.sites] is not unit:
                work = UnitWork(work.prefill and nothing.prefill, work.decode and nothing.decode, 0)
            experts = [
                measured.experts[name] for name in names if name in measured.experts and _is_in(name, unit.sites)
            ]
            costs.append(
                replace(
                    self._cost_of(unit, whole_units),
                    prefill=work.prefill,
                    decode=work.decode,
                    kv_bytes=work.kv_bytes,
                    can_move_cache=any(_is_in(name, unit.sites) for name in keeping),
                    experts=(experts[0].num_experts, experts[0].num_routed, round(experts[0].expert_bytes))
                    if experts
                    else None,
                )
            )
        prompt_kv_bytes = measured.kv_bytes(workload.num_sequences, workload.prompt_tokens)
        demand = Demand(
            kv_bytes=measured.kv_bytes(workload.num_sequences, workload.total_tokens),
            activation_bytes=measured.workload_activation_bytes,
            buffer_bytes=sum(0 if buffer.is_meta else buffer.nbytes for buffer in model.buffers()),
            baseline_bytes=self._baseline_bytes,
            device_activation_bytes=measured.device_bytes,
            prompt_kv_bytes=prompt_kv_bytes,
            prefill_activation_bytes=measured.prefill_bytes,
            decode_activation_bytes=measured.decode_bytes,
        )
        return Costs(
            units=tuple(costs),
            demand=demand,
            workload=workload,
            # In the first pass all that it holds is touched for the first time.
            prefill=(beside.prefill or NOTHING).plus(Work(fresh_bytes=demand.activation_bytes + prompt_kv_bytes)),
            decode=beside.decode or NOTHING,
            recorded=measured.recorded,
            hidden_bytes=_hidden_bytes(model),
            num_readers=NUM_READERS,
            ring_bytes=RING_BYTES,
        )

    def used_together(self, units: Sequence[Unit]) -> list[tuple[str, ...]]:
        """Names of units that one module uses at once.

        Such are the parts of a block that a map divides, and a head whose weight is an embedding's, and whose bias is not.
        """
        unit_of = {name: unit.name for unit in units for name in unit.parameters}
        first_names = {parameter: name for name, parameter in self._parameters.items()}
        parts: dict[tuple[str, ...], list[str]] = {}
        for unit in units:
            parts.setdefault(tuple(unit.sites), []).append(unit.name)
        groups = {tuple(names) for names in parts.values()}
        for module in self._skeleton.model.modules():
            own = [first_names[each] for each in module._parameters.values() if each is not None]
            groups.add(tuple(dict.fromkeys(unit_of[name] for name in own if name in unit_of)))
        return sorted(group for group in groups if len(group) > 1)

    def known_names(self) -> list[str]:
        """What a map may name: modules, parameters under all their names, and buffers."""
        model = self._skeleton.model
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
        return names + [name for name, _ in model.named_buffers(remove_duplicate=False)]

    def _example_inputs(self, batch_size: int, num_tokens: int) -> dict[str, torch.Tensor] | None:
        return example_inputs(self._skeleton.model, batch_size, num_tokens)

    def planned_shapes(self, workload: Workload) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs that the workload's passes were tried with."""
        with torch.device("meta"):
            inputs = self._example_inputs(workload.num_sequences, workload.prompt_tokens) or {}
        return {name: tuple(tensor.shape) for name, tensor in inputs.items()}


def _hidden_bytes(model: nn.Module) -> int:
    """Of what one token hands from layer to layer: as wide as its embedding, where there is one."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return tables[0].shape[1] * tables[0].element_size() if tables else 0


def _is_in(name: str, sites: Collection[str]) -> bool:
    return any(name == site or name.startswith(f"{site}.") for site in sites)


def _conversion_bytes(source: Source) -> int:
    """What goes in, what comes out, and a copy of that, while a conversion runs."""
    assert source.conversion is not None
    return sum(spec.nbytes for spec in source.conversion.inputs) + 2 * len(source.conversion.outputs) * source.nbytes
