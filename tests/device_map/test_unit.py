"""Units: every parameter in one, hooks where every use is bracketed, no two brackets that need slots at once."""

from collections.abc import Iterator

import pytest
import torch
from families import _configs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigmodel.device_map.unit import Unit, find_units
from bigmodel.errors import InvalidArgumentError

WIDTH = 4


class Box(nn.Module):
    """A module with children, some under names and some in lists, and parameters of its own."""

    def __init__(self, children: list[nn.Module], *, own: bool) -> None:
        super().__init__()
        for number, child in enumerate(children):
            self.add_module(f"part{number}", child)
        if own:
            self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        for child in self.children():
            x = child(x) if type(child).forward is not nn.Module.forward else x
        return x


class Shelf(Box):
    """The same, of another class."""


def leaves() -> st.SearchStrategy[nn.Module]:
    return st.builds(
        lambda kind, width: kind(width),
        st.sampled_from(
            [
                lambda width: nn.Linear(WIDTH, width),
                lambda width: nn.Linear(WIDTH, width, bias=False),
                lambda width: nn.Embedding(7, width),
                lambda width: nn.LayerNorm(width),
                lambda width: nn.ReLU(),
                lambda width: nn.ParameterList([nn.Parameter(torch.ones(width))]),
            ]
        ),
        st.integers(1, 3),
    )


def parents(children: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    several = st.lists(children, min_size=1, max_size=4)
    return st.one_of(
        st.builds(nn.ModuleList, several),
        st.builds(lambda parts: nn.Sequential(*parts), several),
        st.builds(lambda parts: nn.ModuleDict({str(n): part for n, part in enumerate(parts)}), several),
        st.builds(lambda parts, own: Box(parts, own=own), several, st.booleans()),
        st.builds(lambda parts, own: Shelf(parts, own=own), several, st.booleans()),
    )


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Random trees in which some modules stand at two places and some parameters are tied."""
    model = draw(st.recursive(leaves(), parents, max_leaves=12))
    boxes = [each for each in model.modules() if isinstance(each, (Box, nn.ModuleList))]
    everything = list(model.modules())
    for _ in range(draw(st.integers(0, 2)) if boxes else 0):
        box, guest = draw(st.sampled_from(boxes)), draw(st.sampled_from(everything))
        if box not in set(guest.modules()):
            if isinstance(box, nn.ModuleList):
                box.append(guest)
            else:
                box.add_module(f"guest{len(list(box.children()))}", guest)
    owners = [
        (each, name) for each in model.modules() for name in each._parameters if each._parameters[name] is not None
    ]
    for _ in range(draw(st.integers(0, 3)) if owners else 0):
        (giver, given_name), (taker, taken_name) = draw(st.sampled_from(owners)), draw(st.sampled_from(owners))
        taker._parameters[taken_name] = giver._parameters[given_name]
    return model


def is_callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def paths(model: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """Every module by every name, as the modules on the way to it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in modules:
        parts = name.split(".") if name else []
        yield tuple(modules[".".join(parts[:length])] for length in range(len(parts) + 1))


def check(model: nn.Module, units: tuple[Unit, ...]) -> None:
    names = [name for name, _ in model.named_parameters()]
    placed = [name for unit in units for name in unit.parameters]
    assert sorted(placed) == sorted(names)
    assert all(unit.parameters and unit.sites for unit in units)
    assert len({unit.name for unit in units}) == len(units)
    modules = dict(model.named_modules(remove_duplicate=False))
    unit_of = {name: unit for unit in units for name in unit.parameters}
    first_name = {parameter: name for name, parameter in model.named_parameters()}
    sites = {unit.name: [modules[site] for site in unit.sites] for unit in units}
    for unit in units:
        assert all(is_callable(site) or site is model for site in sites[unit.name])
        assert unit.gathers == all(isinstance(site, nn.Embedding) for site in sites[unit.name])
    # Every use by a forward is bracketed; a lookup in a table that is also used otherwise is right where it rests.
    for path in paths(model):
        for parameter in path[-1]._parameters.values():
            if parameter is None or isinstance(path[-1], nn.Embedding):
                continue
            user = next((module for module in reversed(path) if is_callable(module)), model)
            allowed = set(path[: path.index(user) + 1])
            assert allowed & set(sites[unit_of[first_name[parameter]].name])
    # Brackets of units that may stream never meet.
    inside = {name: set().union(*(site.modules() for site in found)) for name, found in sites.items()}
    streaming = [unit.name for unit in units if not unit.encloses]
    for name in streaming:
        for other in streaming:
            if name != other:
                assert not inside[name] & set(sites[other])


@given(models())
def test_random_trees(model):
    units = find_units(model)
    check(model, units)
    assert find_units(model) == units


@given(models(), st.integers(1, 400))
def test_random_trees_with_a_largest_unit(model, max_unit_bytes):
    units = find_units(model, max_unit_bytes=max_unit_bytes)
    check(model, units)
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    for unit in units:
        is_shared = unit.name in sizes  # one parameter, which nothing divides
        if sum(sizes[name] for name in unit.parameters) > max_unit_bytes and not unit.encloses and not is_shared:
            for site in unit.sites:
                assert not any(next(child.parameters(), None) is not None for child in modules[site].children())


def on_meta(family: str) -> nn.Module:
    import transformers

    config = _configs()[family]()
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    model.tie_weights()
    return model


def names(units) -> list[str]:
    return [unit.name for unit in units]


def by_name(units) -> dict[str, Unit]:
    return {unit.name: unit for unit in units}


BLOCKS = {
    "llama": ["model.layers.{}"],
    "llama_tied": ["model.layers.{}"],
    "gpt2": ["transformer.h.{}"],
    "mixtral": ["model.layers.{}"],
    "deepseek_v3": ["model.layers.{}"],
    "mamba": ["backbone.layers.{}"],
    "bert": ["bert.encoder.layer.{}"],
    "t5": ["encoder.block.{}", "decoder.block.{}"],
}


@pytest.mark.parametrize("family", BLOCKS)
def test_a_block_is_a_unit(family):
    model = on_meta(family)
    units = find_units(model)
    check(model, units)
    modules = dict(model.named_modules())
    for pattern in BLOCKS[family]:
        blocks = len(modules[pattern.removesuffix(".{}")])
        assert blocks >= 3
        for number in range(blocks):
            unit = by_name(units)[pattern.format(number)]
            own = [name for name, _ in modules[unit.name].named_parameters()]
            assert len(unit.parameters) == len(own)
            assert unit.sites == (unit.name,)
            assert not unit.encloses


def test_vision_and_text_models_have_blocks_on_both_sides():
    model = on_meta("llava")
    units = by_name(find_units(model))
    check(model, tuple(units.values()))
    vision = [name for name in units if "vision_tower" in name and ".layers." in name]
    text = [name for name in units if "language_model.layers." in name]
    assert len(vision) == 3
    assert len(text) == 4
    assert "model.multi_modal_projector" in units
    # The class embedding is used by a module whose other weights are units of their own.
    own = [unit for unit in units.values() if unit.encloses]
    assert [unit.parameters[0].rpartition(".")[2] for unit in own] == ["class_embedding"]


def test_stages_of_unlike_width_are_divided_into_their_blocks():
    import transformers

    config = transformers.SwinConfig(
        embed_dim=8, depths=[2, 2, 4], num_heads=[1, 2, 2], image_size=32, patch_size=4, window_size=2
    )
    with torch.device("meta"):
        model = transformers.SwinForImageClassification(config)
    units = find_units(model)
    check(model, units)
    blocks = [name for name in names(units) if ".blocks." in name]
    assert len(blocks) == 8
    assert all(by_name(units)[name].sites == (name,) for name in blocks)


def test_a_diffusion_transformer_has_two_lists_of_blocks():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            in_channels=4,
            axes_dims_rope=(4, 4, 8),
        )
    units = find_units(model)
    check(model, units)
    assert [name for name in names(units) if "transformer_blocks" in name] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
        "single_transformer_blocks.2",
    ]


def test_experts_in_a_list_belong_to_their_layer():
    class Expert(Box):
        def __init__(self) -> None:
            super().__init__([nn.Linear(WIDTH, WIDTH)], own=False)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(WIDTH, WIDTH)
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x):
            return self.experts[0](self.attention(x))

    model = Box([nn.ModuleList(Layer() for _ in range(2))], own=False)
    assert names(find_units(model)) == ["part0.0", "part0.1"]


def test_small_roots():
    sequence = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    assert [(unit.name, unit.sites) for unit in find_units(sequence)] == [("0", ("0",)), ("2", ("2",))]
    (unit,) = find_units(nn.Linear(4, 8))
    assert unit == Unit("(root)", ("weight", "bias"), ("",), False, False)
    assert find_units(nn.ReLU()) == ()


def test_a_table_that_is_tied_to_the_head_moves_with_the_head():
    units = by_name(find_units(on_meta("llama_tied")))
    tied = units["model.embed_tokens.weight"]
    assert tied.sites == ("lm_head",)
    assert not tied.gathers
    assert not tied.encloses


def test_tables_that_are_only_looked_up_gather():
    units = find_units(on_meta("llama"))
    assert [unit.name for unit in units if unit.gathers] == ["model.embed_tokens"]
    table = nn.Embedding(5, WIDTH)
    pair = Box([nn.Embedding(5, WIDTH), nn.Embedding(5, WIDTH), nn.Linear(WIDTH, WIDTH)], own=False)
    pair.part0.weight = pair.part1.weight = table.weight
    (tied,) = [unit for unit in find_units(pair) if unit.gathers]
    assert tied.sites == ("part0", "part1")
    renormalising = nn.Embedding(5, WIDTH, max_norm=1.0)
    assert not find_units(renormalising)[0].gathers


def test_a_head_with_a_bias_is_opened_around_its_tied_weight():
    units = by_name(find_units(on_meta("bert")))
    tied = units["bert.embeddings.word_embeddings.weight"]
    assert tied.sites == ("cls.predictions.decoder",)
    assert not tied.encloses
    # The bias has two owners, one of which calls the other.
    assert units["cls.predictions.bias"].encloses


def test_weights_that_blocks_share_stay_and_the_blocks_stream():
    blocks = nn.ModuleList(Box([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)], own=False) for _ in range(3))
    for block in blocks:
        block.part1.weight = blocks[0].part1.weight
    units = find_units(blocks)
    check(blocks, units)
    shared = by_name(units)["0.part1.weight"]
    assert shared.sites == ("0.part1", "1.part1", "2.part1")
    assert shared.encloses
    assert [unit.name for unit in units if not unit.encloses] == ["0", "1", "2"]


def test_a_module_at_two_names_appears_once():
    shared = nn.Linear(WIDTH, WIDTH)
    blocks = nn.ModuleList(Box([nn.Linear(WIDTH, WIDTH), shared], own=False) for _ in range(2))
    units = find_units(blocks)
    check(blocks, units)
    assert [(unit.name, unit.sites, unit.encloses) for unit in units] == [
        ("0", ("0",), False),
        ("0.part1", ("0.part1",), True),
        ("1", ("1",), False),
    ]


def test_a_list_of_parameters_belongs_to_who_uses_it():
    model = Box(
        [nn.ParameterList([nn.Parameter(torch.ones(2))]), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])], own=False
    )
    units = find_units(model)
    assert by_name(units)["part0"] == Unit("part0", ("part0.0",), ("",), True, False)


def test_large_units_are_divided_and_named_classes_are_not():
    model = on_meta("llama")
    sizes = {name: 100 for name, _ in model.named_parameters()}
    whole = find_units(model, sizes=sizes)
    divided = find_units(model, sizes=sizes, max_unit_bytes=400)
    check(model, divided)
    assert "model.layers.0.self_attn" in names(divided)  # four weights of 100
    assert "model.layers.0.mlp" in names(divided)
    assert find_units(model, sizes=sizes, max_unit_bytes=400, no_split={"LlamaDecoderLayer"}) == whole
    with pytest.raises(InvalidArgumentError, match="max_unit_bytes is 0"):
        find_units(model, max_unit_bytes=0)


def test_units_stand_in_the_order_of_their_first_site():
    model = on_meta("t5")
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    first_sites = [order[unit.sites[0]] for unit in find_units(model)]
    assert first_sites == sorted(first_sites)
