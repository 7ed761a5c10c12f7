"""Work is counted as it is, and takes what a roofline says."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from bigmodel.device_map.rates import ATTENTION, COPIED, NOTHING, Rates, Work
from bigmodel.device_map.tally import tallied
from bigmodel.errors import InvalidArgumentError


def test_a_roofline():
    rates = Rates.roofline(1e9, {"bfloat16": 1e12}, 1e-3)
    assert rates.seconds(NOTHING) == 0
    assert rates.seconds(Work.of_product("bfloat16", 1e9, 1e9)) == pytest.approx(
        1 + 1e-3
    )  # one FLOP a byte: memory binds
    assert rates.seconds(Work.of_product("bfloat16", 1e13, 1e9)) == pytest.approx(10 + 1e-3)  # arithmetic binds
    assert rates.seconds(Work({}, 5e8, 3)) == pytest.approx(0.5 + 3e-3)
    slow, fast = Work.of_product("bfloat16", 1e9, 1e9), Work.of_product("bfloat16", 1e13, 1e9)
    shares = rates.shares(slow.plus(fast))
    assert shares == {"memory": pytest.approx(1.0), "arithmetic": pytest.approx(10.0), "operators": pytest.approx(2e-3)}


def test_measured_points_are_met_and_between_them_it_is_a_power_law():
    rates = Rates(memory_bytes_per_s=1e9, products={"float32": ((1.0, 1e9), (100.0, 1e10))}, op_s=0.0)
    for intensity, rate in ((0.5, 5e8), (1.0, 1e9), (10.0, 1e9 * 10**0.5), (100.0, 1e10), (1e4, 1e10)):
        work = Work({("float32", 0): (1e9, 1e9 / intensity)}, 0.0, 0.0)
        assert rates.seconds(work) == pytest.approx(1e9 / rate)
    # A dtype that nobody measured takes what float32 takes.
    assert rates.seconds(Work({("float8_e5m2", 0): (1e9, 1e9)}, 0.0, 0.0)) == pytest.approx(1.0)


def test_works_add_up():
    one = Work.of_product("bfloat16", 100.0, 10.0)
    both = one.plus(one).plus(Work({}, 7.0, 2.0), 3)
    assert (both.flops, both.touched_bytes, both.num_ops) == (200.0, 20.0 + 21.0, 8.0)
    assert both.plus(both, -1) == Work(dict.fromkeys(both.products, (0.0, 0.0)), 0.0, 0.0)


def test_points_of_a_curve_have_an_intensity_and_a_rate():
    for point in ((0.0, 1e9), (1.0, 0.0), (-1.0, 1e9)):
        with pytest.raises(InvalidArgumentError):
            Rates(memory_bytes_per_s=1e9, products={"float32": (point,)}, op_s=0.0)


@pytest.mark.parametrize("memory", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_mean_nothing(memory):
    with pytest.raises(InvalidArgumentError):
        Rates.roofline(memory, {"bfloat16": 1e12}, 0.0)


def test_products_are_counted_as_twice_their_multiplications():
    x, layer = torch.ones(2, 5, 16), nn.Linear(16, 24)
    work = tallied(lambda: layer(x))
    assert work.flops == 2 * 10 * 16 * 24
    assert work.touched_bytes == 4 * (10 * 16 + 16 * 24 + 24 + 10 * 24)
    q = torch.ones(1, 4, 6, 8)
    work = tallied(lambda: functional.scaled_dot_product_attention(q, q, q))
    assert work.flops == 2 * (4 * 6 * 6 * 8) * 2
    image, filters = torch.ones(1, 3, 10, 10), nn.Conv2d(3, 7, 3, bias=False)
    assert tallied(lambda: filters(image)).flops == 2 * 7 * 8 * 8 * 3 * 9


def test_products_of_attention_and_those_that_copy_an_operand_have_rates_of_their_own():
    head, hidden = (
        nn.Linear(16, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False),
        torch.ones(1, 5, 16, dtype=torch.bfloat16),
    )
    (kind,) = tallied(lambda: head(hidden)).products
    assert kind[0] == "bfloat16"
    (kind,) = tallied(lambda: head(hidden[:, -1:])).products
    assert kind[0] == f"bfloat16{COPIED}"
    q = torch.ones(1, 4, 6, 8)
    (kind,) = tallied(lambda: functional.scaled_dot_product_attention(q, q, q)).products
    assert kind[0] == f"float32{ATTENTION}"
    slow = Rates(
        memory_bytes_per_s=1e9,
        products={"bfloat16": ((1.0, 1e9), (100.0, 1e12)), f"bfloat16{COPIED}": ((1.0, 1e7),)},
        op_s=0.0,
    )
    work = Work({(f"bfloat16{COPIED}", 0): (1e9, 1e9)})
    assert slow.seconds(work) == pytest.approx(100.0)
    assert slow.shares(work) == {"memory": pytest.approx(100.0), "arithmetic": 0.0, "operators": 0.0}
    stated = Rates.roofline(1e9, {"bfloat16": 1e12}, 0.0)  # of a machine whose file says nothing about it
    assert stated.seconds(work) == pytest.approx(1.0)


def test_views_are_free_and_lookups_touch_their_rows():
    table, x = nn.Embedding(1000, 16), torch.ones(4, 4)
    assert tallied(lambda: x.view(16).view(2, 8).transpose(0, 1)[1:]).num_ops == 0
    work = tallied(lambda: table(torch.tensor([1, 5, 7])))
    assert work.flops == 0
    assert work.touched_bytes < 1000
    assert tallied(lambda: x.add_(1)).num_ops == 1
    assert tallied(lambda: x + x.expand(4, 4)).touched_bytes == 3 * 64
