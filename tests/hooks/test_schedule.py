"""The order of units, learned from what was seen."""

from itertools import islice

from bigmodel.hooks.schedule import Schedule


def play(schedule, entries):
    for unit in entries:
        schedule.entered(unit)


def test_before_anything_was_seen_it_is_the_order_of_definition():
    assert list(Schedule(range(4)).upcoming(6)) == [0, 1, 2, 3, 0, 1]


def test_the_first_pass_is_followed_from_where_it_is():
    schedule = Schedule(range(4))
    play(schedule, [0, 1])
    assert (schedule.upcoming(3)) == [2, 3, 0]


def test_the_end_of_a_pass_leads_to_the_beginning_of_the_next():
    schedule = Schedule(range(4))
    play(schedule, [2, 0, 3, 1, 2])
    assert (schedule.upcoming(5)) == [0, 3, 1, 2, 0]


def test_a_unit_used_twice_is_followed_by_what_its_context_says():
    schedule = Schedule(range(3))
    play(schedule, [0, 2, 1, 2, 0, 2])
    assert (schedule.upcoming(3)) == [1, 2, 0]
    schedule.entered(1)
    schedule.entered(2)
    assert schedule.upcoming(1) == [0]


def test_a_branch_is_followed_as_it_was_taken_last():
    schedule = Schedule(range(4))
    play(schedule, [0, 1, 3, 0, 1, 3, 0, 2, 3, 0])
    assert (schedule.upcoming(2)) == [2, 3]


def test_an_encoder_leads_to_its_decoder_and_the_decoder_to_itself():
    schedule = Schedule(range(4))
    play(schedule, [0, 1, 2, 3, 2, 3, 2, 3])
    assert (schedule.upcoming(4)) == [2, 3, 2, 3]
    play(schedule, [0, 1])
    assert list(islice(schedule.upcoming(9), 2)) == [2, 3]


def test_it_forgets_what_is_old_and_stays_right():
    schedule = Schedule(range(5))
    for _ in range(200):
        play(schedule, [4, 2, 0, 1, 3])
    assert (schedule.upcoming(5)) == [4, 2, 0, 1, 3]
    assert len(schedule._history) < 400
