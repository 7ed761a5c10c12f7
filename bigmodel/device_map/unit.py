"""Units: the pieces that a model's weights are planned, read and moved in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from bigmodel.errors import InvalidArgumentError

__all__ = ["Unit", "find_units"]

ROOT_NAME = "(root)"


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that move as one.

    Attributes:
        name: the fully qualified name of its module, of its parameter where it is one tied parameter, or ``"(root)"``.
        parameters: first names of distinct parameters, in the model's own order.
        sites: fully qualified names of the modules whose forward brackets every use (``""`` is the root).
        encloses: its bracket contains other units' brackets, or lies inside them: kept resident by planners, because
            while it is in use another unit needs a slot too.
        gathers: every use is a row lookup: all sites are embeddings.
    """

    name: str
    parameters: tuple[str, ...]
    sites: tuple[str, ...]
    encloses: bool
    gathers: bool


def find_units(
    model: nn.Module,
    *,
    sizes: Mapping[str, int] | None = None,
    max_unit_bytes: int | None = None,
    no_split: Collection[str] = (),
) -> tuple[Unit, ...]:
    """Divide a model's parameters into units, by the shape of its module tree alone.

    The outermost repeated blocks are one unit each: the children of a ModuleList, Sequential or ModuleDict that has at
    least two of one class or structure, and of any ModuleList. Where no two children are alike and a child holds such a
    container itself (stages of blocks), the blocks inside it count. Elsewhere the largest subtree without such a
    container and without an embedding below its top is one unit; embeddings are units of their own, since a lookup of
    rows need not move them. What a parent uses directly beside those is the parent's own unit, and a parameter that two
    units share is one too. A module whose class defines no forward is never a site: hooks would not fire.

    Args:
        model: parameters may be on meta.
        sizes: parameter name -> bytes in the model; as the parameter is, where left out.
        max_unit_bytes: a larger unit is divided into its children, as far as there are any.
        no_split: class names of modules that are never divided.

    Returns:
        The units, ordered by the definition of their first site; every parameter is in exactly one.

    Raises:
        InvalidArgumentError: if `max_unit_bytes` is not positive.
    """
    if max_unit_bytes is not None and max_unit_bytes < 1:
        raise InvalidArgumentError(f"max_unit_bytes is {max_unit_bytes}. Give at least 1.")
    tree = _Tree(model, dict(sizes or {}))
    division = _Division(tree, max_unit_bytes, frozenset(no_split))
    # Each round gives shared modules a piece of their own, or opens a subtree around the site of a shared parameter; both
    # sets only grow and are bounded by the modules.
    while not division.settle():
        pass
    return division.units()


class _Tree:
    """The module graph: modules may be reached by several names, and parameters owned by several modules."""

    def __init__(self, model: nn.Module, sizes: dict[str, int]) -> None:
        self.root = model
        self.names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self.order = {module: number for number, module in enumerate(self.names)}
        self.children = {
            module: list(dict.fromkeys(child for child in module._modules.values() if child is not None))
            for module in self.names
        }
        self.parents: dict[nn.Module, list[nn.Module]] = {module: [] for module in self.names}
        for module, children in self.children.items():
            for child in children:
                self.parents[child].append(module)
        self.parameter_names = {parameter: name for name, parameter in model.named_parameters()}
        self.owners: dict[nn.Parameter, list[nn.Module]] = {parameter: [] for parameter in self.parameter_names}
        self.own = {
            module: list(dict.fromkeys(each for each in module._parameters.values() if each is not None))
            for module in self.names
        }
        for module, parameters in self.own.items():
            for parameter in parameters:
                self.owners[parameter].append(module)
        self.bytes = {
            parameter: sizes.get(name, parameter.numel() * parameter.element_size())
            for parameter, name in self.parameter_names.items()
        }
        self.holding = {module for module in self.names if self.own[module]}
        self.holding |= self.above(self.holding)

    def above(self, modules: Iterable[nn.Module]) -> set[nn.Module]:
        """All ancestors of the modules, by any name."""
        found: set[nn.Module] = set()
        pending = list(modules)
        while pending:
            for parent in self.parents[pending.pop()]:
                if parent not in found:
                    found.add(parent)
                    pending.append(parent)
        return found

    def reach(self, top: nn.Module, stops: Collection[nn.Module] = ()) -> dict[nn.Module, None]:
        """The module and all below it, not entering `stops`, in definition order."""
        found: dict[nn.Module, None] = {}
        pending = [top]
        while pending:
            module = pending.pop()
            if module in found or (module in stops and module is not top):
                continue
            found[module] = None
            pending += reversed(self.children[module])
        return found

    def callers(self, module: nn.Module) -> list[nn.Module]:
        """The module where it can be called, else the nearest modules above it that can be (the root at least)."""
        found: dict[nn.Module, None] = {}
        seen: set[nn.Module] = set()
        pending = [module]
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            if _is_callable(current) or current is self.root:
                found[current] = None
            else:
                pending += self.parents[current]
        return sorted(found, key=self.order.__getitem__)


@dataclass(eq=False)
class _Piece:
    """A subtree that is one unit (`whole`), or only what its top uses directly."""

    top: nn.Module
    whole: bool
    in_block: bool
    number: int
    parameters: list[nn.Parameter] = field(default_factory=list)


class _Division:
    """A division of the tree into pieces, refined until no parameter's use escapes the piece that it is in."""

    def __init__(self, tree: _Tree, max_unit_bytes: int | None, no_split: frozenset[str]) -> None:
        self._tree = tree
        self._max_unit_bytes = max_unit_bytes
        self._no_split = no_split
        self._apart: dict[nn.Module, None] = {}  # shared modules that stand on their own
        self._opened: set[nn.Module] = set()  # sites of shared parameters: no larger unit around them
        self._containers = {module for module in tree.names if self._repeats(module)}
        dividing = self._containers | {
            module for module in tree.holding if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        }
        self._around_container = tree.above(self._containers) | self._containers
        self._around_dividing = tree.above(dividing) | self._containers
        self._pieces: list[_Piece] = []
        self._shared: dict[tuple[nn.Module, ...], list[nn.Parameter]] = {}

    def settle(self) -> bool:
        """Divide once; whether the division is sound, or modules were set apart for the next try."""
        tree = self._tree
        self._pieces, self._seen = [], set[nn.Module]()
        self._around_opened = tree.above(self._opened) | self._opened
        self._visit(tree.root, in_block=False)
        for module in self._apart:
            self._visit(module, in_block=True)
        cover = self._cover()
        escaping = {module for module, numbers in cover.items() if len(numbers) > 1 and module in tree.holding}
        tops = [
            module
            for module in sorted(escaping, key=tree.order.__getitem__)
            if module not in self._apart and any(cover.get(parent) != cover[module] for parent in tree.parents[module])
        ]
        if tops:
            self._apart |= dict.fromkeys(tops)
            return False
        return self._assign(cover)

    def units(self) -> tuple[Unit, ...]:
        """The units of the settled division."""
        tree = self._tree
        pieces = [piece for piece in self._pieces if piece.parameters]
        found: list[tuple[tuple[nn.Module, ...], list[nn.Parameter], bool, str]] = []
        for piece in pieces:
            sites = (piece.top,) if piece.whole else tuple(tree.callers(piece.top))
            found.append((sites, piece.parameters, not piece.whole, tree.names[piece.top] or ROOT_NAME))
        for sites, parameters in self._shared.items():
            found.append((sites, parameters, False, tree.parameter_names[parameters[0]]))
        # Brackets of units that may stream must not overlap. Blocks come first; what is shared and meets one of them, or
        # a larger shared one, stays.
        first_shared = len(pieces)
        apart = {number for number, piece in enumerate(pieces) if piece.top in self._apart}
        ranked = sorted(
            range(len(found)),
            key=lambda n: (
                n >= first_shared or n in apart,
                -sum(tree.bytes[each] for each in found[n][1]) if n >= first_shared else 0,
                n,
            ),
        )
        taken: set[nn.Module] = set()  # sites of units that may stream
        above_taken: set[nn.Module] = set()
        below_taken: set[nn.Module] = set()
        staying = {number for number, each in enumerate(found) if each[2]}
        for number in ranked:
            sites = found[number][0]
            if number in staying:
                continue
            if any(site in above_taken or site in below_taken or site in taken for site in sites):
                staying.add(number)
                continue
            taken |= set(sites)
            above_taken |= tree.above(sites)
            for site in sites:
                below_taken |= tree.reach(site).keys()
        position = {parameter: number for number, parameter in enumerate(tree.parameter_names)}
        order = sorted(
            range(len(found)), key=lambda n: (min(tree.order[site] for site in found[n][0]), n not in staying, n)
        )
        return tuple(
            Unit(
                name=found[number][3],
                parameters=tuple(
                    tree.parameter_names[each] for each in sorted(found[number][1], key=position.__getitem__)
                ),
                sites=tuple(tree.names[site] for site in found[number][0]),
                encloses=number in staying,
                gathers=all(_gathers(site) for site in found[number][0]),
            )
            for number in order
        )

    def _visit(self, module: nn.Module, in_block: bool) -> None:
        """Take the subtree as one piece where that is sound, else what its top uses itself and its children in turn."""
        if module in self._seen or module not in self._tree.holding:
            return
        self._seen.add(module)
        if self._is_whole(module, in_block):
            self._pieces.append(_Piece(module, True, in_block, len(self._pieces)))
            return
        self._pieces.append(_Piece(module, False, in_block, len(self._pieces)))
        children = [child for child in self._tree.children[module] if child in self._tree.holding]
        blocks = set(children) if in_block else self._blocks(module, children)
        for child in children:
            self._visit(child, in_block or child in blocks)

    def _is_whole(self, module: nn.Module, in_block: bool) -> bool:
        if not _is_callable(module):
            return False
        if type(module).__name__ in self._no_split:
            return True
        if not in_block:
            if module in self._around_opened:
                return False
            # An embedding on its own is a unit; one below the top divides what is around it.
            if module in self._around_dividing:
                return False
        if self._max_unit_bytes is None:
            return True
        if not any(child in self._tree.holding for child in self._tree.children[module]):
            return True
        inside = self._tree.reach(module, self._apart)
        distinct = dict.fromkeys(parameter for each in inside for parameter in self._tree.own[each])
        return sum(self._tree.bytes[parameter] for parameter in distinct) <= self._max_unit_bytes

    def _repeats(self, module: nn.Module) -> bool:
        """Whether it is a container of repeated blocks."""
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            return False
        children = [child for child in self._tree.children[module] if child in self._tree.holding]
        if not children:
            return False
        if isinstance(module, nn.ModuleList) or max(Counter(map(type, children)).values()) > 1:
            return True
        return len(children) > 1 and max(Counter(map(_structure, children)).values()) > 1

    def _blocks(self, module: nn.Module, children: Sequence[nn.Module]) -> set[nn.Module]:
        """The children that are one block each: all of them, or, where no two are alike, those without blocks inside."""
        if module not in self._containers:
            return set()
        nested = {child for child in children if child in self._around_container}
        if nested and max(Counter(map(_structure, children)).values()) < 2:
            return set(children) - nested
        return set(children)

    def _cover(self) -> dict[nn.Module, frozenset[int]]:
        """Which pieces use each module's own parameters."""
        cover: dict[nn.Module, set[int]] = {}
        for piece in self._pieces:
            inside = self._tree.reach(piece.top, self._apart) if piece.whole else (piece.top,)
            for module in inside:
                cover.setdefault(module, set()).add(piece.number)
        return {module: frozenset(numbers) for module, numbers in cover.items()}

    def _assign(self, cover: Mapping[nn.Module, frozenset[int]]) -> bool:
        """Give each parameter to its piece, or to a unit of its own; whether no piece had to be opened for that."""
        tree = self._tree
        self._shared = {}
        for parameter, owners in tree.owners.items():
            numbers = frozenset[int]().union(*(cover[owner] for owner in owners))
            if len(numbers) == 1:
                self._pieces[next(iter(numbers))].parameters.append(parameter)
                continue
            users = [owner for owner in owners if not _gathers(owner)] or owners
            sites = dict.fromkeys(site for user in users for site in tree.callers(user))
            self._shared.setdefault(tuple(sites), []).append(parameter)
        to_open = {
            site
            for sites in self._shared
            for site in sites
            for number in cover.get(site, ())
            if self._pieces[number].whole and not self._pieces[number].in_block and self._pieces[number].parameters
        }
        if to_open <= self._opened:
            return True
        self._opened |= to_open
        return False


def _is_callable(module: nn.Module) -> bool:
    """Whether its class defines a forward: ModuleList, ModuleDict and ParameterList do not."""
    return type(module).forward is not nn.Module.forward


def _gathers(module: nn.Module) -> bool:
    """Whether it only looks rows up (one that renormalises rows writes to them, so it does not count)."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is None


def _structure(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What two copies of one block have in common: names and shapes of their parameters."""
    return tuple((name, tuple(each.shape)) for name, each in module.named_parameters(remove_duplicate=False))
