"""The audit's judgements on both sides of each threshold, from made-up fingerprints."""

import math
from dataclasses import replace
from typing import Any

import pytest
from audit_steps import step, tensor

from neox_bridge.frameworks.unknown_keys import UnknownKey
from neox_bridge.verification.audit import judge, verdict
from neox_bridge.verification.audit_identity import across_runs, identity_faults
from neox_bridge.verification.audit_norms import broken_faults, jump_faults, jumps_of
from neox_bridge.verification.audit_settings import init_faults, missing_faults, setting_faults
from neox_bridge.verification.audit_states import state_faults
from neox_bridge.verification.hashes import Fingerprint, Shard
from neox_bridge.verification.runs import Fault
from neox_bridge.verification.steps import Step

BOTH = (1.0 - 1e-4, 1.0 + 1e-4)  # just below a threshold, and just above


def codes(faults: Any) -> list[str]:
    return [fault.code for fault in faults]


# --- norms


def course(*norms: float) -> list[tuple[float, float]]:
    """Norms at evenly spaced steps. FLOOR adds a thousandth of the largest to each."""
    return [(1000.0 * number, norm) for number, norm in enumerate(norms)]


def with_floor(logs: list[float]) -> list[tuple[float, float]]:
    """A course whose logarithms, after the floor is added, differ as these do.

    It lies so late that even distances are nearly even doublings too.
    """
    scaled = [math.exp(y - max(logs)) * 1.001 - 0.001 for y in logs]
    return [(1e9 + 1000 * number, norm) for number, norm in enumerate(scaled)]


@pytest.mark.parametrize(("factor", "jumps"), [(BOTH[0], False), (BOTH[1], True)])
def test_a_spike_is_four_times_what_is_beside_it(factor: float, jumps: bool) -> None:
    slope = 0.1
    logs = [slope * n for n in range(8)]
    logs[4] = logs[3] + 4 * 2 * slope * factor + 2 * slope  # the way back is the smaller one
    assert jumps_of(with_floor(logs)) == ([(4, True)] if jumps else [])


@pytest.mark.parametrize(("factor", "jumps"), [(BOTH[0], False), (BOTH[1], True)])
def test_a_step_is_eight_times_what_is_beside_it(factor: float, jumps: bool) -> None:
    slope = 0.1
    logs = [slope * n for n in range(12)]
    rise = 8 * slope * factor
    logs = [y + (rise - slope if n >= 8 else 0) for n, y in enumerate(logs)]
    assert jumps_of(with_floor(logs)) == ([(8, False)] if jumps else [])


@pytest.mark.parametrize(("factor", "jumps"), [(BOTH[0], False), (BOTH[1], True)])
@pytest.mark.parametrize("comes_back", [True, False], ids=["spike", "step"])
def test_a_jump_is_at_least_a_twentieth(factor: float, jumps: bool, comes_back: bool) -> None:
    logs = [0.0] * 8
    logs[5:] = [0.05 * factor] + [0.0 if comes_back else 0.05 * factor] * 2
    assert jumps_of(with_floor(logs)) == ([(5, comes_back)] if jumps else [])


def test_what_is_smaller_than_a_thousandth_counts_as_nothing() -> None:
    tiny = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    small = [1e-6, 2e-5, 1e-6, 1e-6, 1e-6, 1e-6]  # a factor of 20, and 2 % with the floor
    assert jumps_of(course(*small, *tiny)[:6]) == [(1, True)]
    assert [at for at, _ in jumps_of(course(1.0, *small))] == []


def test_a_jump_at_the_last_point_is_a_step_and_the_first_is_never_one() -> None:
    assert jumps_of(course(1.0, 1.0, 1.0, 1.0, 9.0)) == [(4, False)]
    assert jumps_of(course(9.0, 1.0, 1.0, 1.0, 1.0)) == []


def test_a_step_needs_three_points_before_it() -> None:
    assert jumps_of(course(1.0, 1.0, 9.0, 9.0, 9.0, 9.0)) == []
    assert jumps_of(course(1.0, 1.0, 1.0, 9.0, 9.0, 9.0)) == [(3, False)]


def test_a_course_needs_four_points() -> None:
    assert jumps_of(course(1.0, 9.0, 1.0)) == []
    assert jumps_of(course(1.0, 9.0, 1.0, 1.0)) == [(1, True)]


def test_norms_that_are_zero_or_not_finite_have_no_course() -> None:
    assert jumps_of([]) == []
    assert jumps_of(course(0.0, 0.0, 0.0, 0.0)) == []
    assert jumps_of(course(1.0, math.inf, 1.0, 1.0)) == []


def test_leaving_on_one_side_and_coming_back_past_it_is_no_spike() -> None:
    """The point lies between its neighbours: a fast rise."""
    assert (2, True) not in jumps_of(course(1.0, 1.0, 3.0, 9.0, 9.0, 9.0))


def test_after_a_spike_the_next_point_is_not_judged() -> None:
    assert jumps_of(course(1.0, 1.0, 9.0, 1.0, 1.0, 1.0)) == [(2, True)]


def test_changes_may_be_per_doubling() -> None:
    """Steps at powers of two: equal changes per doubling are no jumps, however unlike per step."""
    points = [(float(2**n), math.exp(0.2 * n)) for n in range(12)]
    assert jumps_of(points) == []


def norms(*values: float, **more: Any) -> list[Step]:
    return [
        step(1000 * n, {"a": tensor(f"a{n}", value), "b": tensor(f"b{n}")}, **more)
        for n, value in enumerate(values)
    ]


def test_a_jump_names_the_step_the_tensor_and_both_norms() -> None:
    (fault,) = jump_faults(norms(1.0, 1.0, 9.0, 1.0, 1.0))
    assert (fault.code, fault.severity) == ("norm-jump", "warning")
    assert (fault.run, fault.steps, fault.tensors) == ("run", ("2000",), ("a",))
    assert "1 tensor jump" in fault.message
    assert "a (1 to 9)" in fault.message
    assert "returns to normal at the next step" in fault.message
    (rise,) = jump_faults(norms(1.0, 1.0, 1.0, 9.0, 9.0))
    assert rise.steps == ("3000",)
    assert "back" not in rise.message


def test_the_largest_jump_is_named_first() -> None:
    steps = [
        step(1000 * n, {"a": tensor(f"a{n}", a), "b": tensor(f"b{n}", b)})
        for n, (a, b) in enumerate([(1, 1), (1, 1), (4, 9), (1, 1), (1, 1)])
    ]
    (fault,) = jump_faults(steps)
    assert fault.tensors == ("b", "a")
    assert "2 tensors jump" in fault.message


@pytest.mark.parametrize(("distance", "hidden"), [(3, True), (4, False)])
@pytest.mark.parametrize("side", [-1, 1], ids=["before", "after"])
def test_three_changes_on_each_side_are_what_is_usual(
    distance: int, hidden: bool, side: int
) -> None:
    """A change of 0.3 as near as that hides a jump of 1; one that is further away does not."""
    changes = [0.01] * 16
    changes[8] = 1.0
    changes[8 + side * distance] = 0.3
    logs = [sum(changes[:n]) for n in range(17)]
    at = 9  # the point after the ninth change
    assert ((at, False) in jumps_of(with_floor(logs))) == (not hidden)


def test_a_long_way_between_steps_may_change_more() -> None:
    """Eight times as far, and a change nine times as large: no more than usual for the distance."""
    even = [(1e9 + 1000 * n, math.exp(0.02 * n)) for n in range(6)]
    late = [(1e9 + 5000 + 8000 + 1000 * n, math.exp(0.28 + 0.02 * n)) for n in range(5)]
    assert jumps_of(even + late) == []
    early = [(1e9 + 5000 + 1000 + 1000 * n, norm) for n, (_, norm) in enumerate(late)]
    assert jumps_of(even + early) == [(6, False)]


def test_a_step_that_is_there_twice_divides_by_no_zero() -> None:
    points = course(1.0, 1.01, 1.02, 1.03, 1.04)
    assert jumps_of([*points[:3], points[2], *points[3:]]) == []


def test_a_spike_right_before_the_last_point() -> None:
    assert jumps_of(course(1.0, 1.0, 1.0, 9.0, 1.0)) == [(3, True)]
    assert jumps_of(course(1.0, 1.0, 1.0, 1 / 9, 1.0)) == [(3, True)]


def test_a_spike_must_come_back_near_where_it_left() -> None:
    """The way from one neighbour to the other counts as much as what is usual."""
    assert (3, True) in jumps_of(course(1.0, 1.0, 1.0, 9.0, 1.5, 1.5, 1.5))
    assert (3, True) not in jumps_of(course(1.0, 1.0, 1.0, 9.0, 3.0, 3.0, 3.0))


def test_the_label_is_that_of_the_step_where_steps_are_left_out() -> None:
    steps = norms(1.0, 1.0, 1.0, 1.0, 9.0, 1.0)
    steps[0] = replace(steps[0], number=None)
    without = {"b": steps[1].tensors["b"]}
    steps[1] = replace(steps[1], tensors=without)
    (fault,) = jump_faults(steps)
    assert fault.steps == ("4000",)
    assert fault.message == (
        "run: at step 4000 the norm of 1 tensor jumps, and returns to normal at the next step: a "
        "(1 to 9)"
    )


def test_the_size_of_a_jump_is_the_ratio_of_both_norms() -> None:
    """The larger product of norms is not the larger jump, and a fall is one as well."""
    courses = {"a": [8.0, 8.0, 64.0, 8.0], "b": [0.5, 0.5, 8.0, 0.5], "c": [64.0, 64.0, 0.5, 64.0]}
    steps = [
        step(1000 * n, {name: tensor(f"{name}{n}", course[n]) for name, course in courses.items()})
        for n in range(4)
    ]
    (fault,) = jump_faults(steps)
    assert fault.tensors == ("c", "b", "a")
    assert (
        "3 tensors jump, and return to normal at the next step: c (64 to 0.5), b (0.5 to 8)"
    ) in fault.message
    zero = [step(n, {"a": tensor(f"a{n}", 0.0 if n == 2 else 1.0)}) for n in range(5)]
    (gone,) = jump_faults(zero)
    assert "a (1 to 0)" in gone.message


def test_a_jump_of_tensors_that_do_not_all_come_back_says_nothing_of_it() -> None:
    stays, returns = [1, 1, 1, 9, 9, 9], [1, 1, 1, 9, 1, 1]
    steps = [
        step(n, {"a": tensor(f"a{n}", stays[n]), "b": tensor(f"b{n}", returns[n])})
        for n in range(6)
    ]
    (fault,) = jump_faults(steps)
    assert fault.steps == ("3",)
    assert "of 2 tensors jump: " in fault.message


def test_what_is_explained_is_no_jump() -> None:
    steps = norms(1.0, 1.0, 9.0, 1.0, 1.0, 1.0)
    assert list(jump_faults(steps, frozenset({("2000", "a")}))) == []
    assert len(list(jump_faults(steps, frozenset({("2000", "b"), ("1000", "a")})))) == 1


def test_steps_without_a_number_have_no_course() -> None:
    steps = [replace(one, number=None) for one in norms(1.0, 1.0, 9.0, 1.0, 1.0)]
    assert list(jump_faults(steps)) == []


def test_values_that_are_not_finite_are_named_and_not_judged_as_jumps() -> None:
    steps = norms(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    broken = replace(steps[2], tensors={**steps[2].tensors, "a": tensor("x", 99.0, bad=3)})
    steps[2] = broken
    (fault,) = broken_faults(steps)
    assert (fault.code, fault.severity, fault.steps) == ("not-finite", "error", ("2000",))
    assert fault.tensors == ("a",)
    assert "a (3)" in fault.message
    assert list(jump_faults(steps)) == []


def test_a_matrix_that_becomes_one_value_is_blank_and_one_that_began_so_is_not() -> None:
    blank = Fingerprint("0", "float32", (4, 4), 0.0, 0, True)
    vector = Fingerprint("0", "float32", (4,), 0.0, 0, True)
    steps = [step(0, {"a": tensor("1"), "v": tensor("2", shape=(4,))}), step(1, {"a": blank})]
    (fault,) = broken_faults(steps)
    assert (fault.code, fault.severity) == ("blank-tensor", "error")
    assert (fault.steps, fault.tensors) == (("1",), ("a",))
    assert list(broken_faults([step(0, {"a": blank}), step(1, {"a": tensor("1")})])) == []
    assert list(broken_faults([steps[0], step(1, {"v": vector})])) == []


# --- missing steps


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        ([0, 10, 20, 40, 50, 60], ("30",)),
        ([0, 10, 20, 50, 60, 70], ("30", "40")),
        ([0, 10, 20, 45, 55, 65], ()),  # not a multiple
        ([0, 10, 30, 40, 50], ()),  # one regular gap before it only
        ([0, 10, 20, 40, 50], ()),  # one after it only
        ([0, 10, 20, 40, 50, 61], ()),  # what follows is not regular
        ([0, 10, 20, 30, 40, 50], ()),
        ([0, 20, 40, 50, 70, 90], ()),  # a smaller gap
        ([1, 2, 4, 8, 16, 32], ()),
        ([], ()),
    ],
)
def test_steps_are_missing_among_equal_distances(
    numbers: list[int], missing: tuple[str, ...]
) -> None:
    faults = list(missing_faults("run", numbers))
    assert [fault.steps for fault in faults] == ([missing] if missing else [])
    assert all(fault.code == "missing-steps" and fault.run == "run" for fault in faults)


# --- identity


def same(*numbers: int, **more: Any) -> list[Step]:
    """A run of steps 0 to 5 of which some have the same bits."""
    first = {"a": tensor("same"), "b": tensor("too")}
    return [step(n, first if n in numbers else None, **more) for n in range(6)]


def test_identical_steps_are_an_error() -> None:
    (fault,) = identity_faults(same(2, 4))
    assert (fault.code, fault.severity, fault.steps) == ("identical-steps", "error", ("2", "4"))


def test_the_first_two_steps_may_be_the_same() -> None:
    (fault,) = identity_faults(same(0, 1))
    assert (fault.code, fault.severity) == ("unchanged-at-first", "info")
    (three,) = identity_faults(same(0, 1, 2))
    assert three.severity == "error"
    (later,) = identity_faults(same(1, 2))
    assert later.severity == "error"


@pytest.mark.parametrize(("last", "severity"), [(32, "info"), (33, "error")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_loss_scale_may_skip_32_updates(last: int, severity: str, dtype: str) -> None:
    alike = {
        name: replace(found, dtype=dtype)
        for name, found in {"a": tensor("same"), "b": tensor("too")}.items()
    }
    steps = [step(n, alike, dtype=dtype) for n in (0, 16, last)] + [step(64)]
    (fault,) = identity_faults(steps)
    assert fault.severity == (severity if dtype == "float16" else "error")


def test_only_the_beginning_may_stay() -> None:
    steps = [step(n, dtype="float16") for n in (0, 1)]
    alike = {"a": tensor("same"), "b": tensor("too")}
    steps += [step(n, alike, dtype="float16") for n in (2, 3)]
    (fault,) = identity_faults(steps)
    assert fault.severity == "error"


def sharded(number: int, a: tuple[str, str], b: tuple[str, str], **more: Any) -> Step:
    """Two tensors over two ranks, each rank's in a file of its own."""
    made = {
        name: tensor(f"{name}{bits}", shards=tuple(Shard(f"{name}{one}", False) for one in bits))
        for name, bits in (("a", a), ("b", b))
    }
    files = dict.fromkeys(made, ("rank0.pt", "rank1.pt"))
    return step(number, made, files=files, tp=2, **more)


def test_one_rank_that_is_another_steps_is_named_with_its_file() -> None:
    steps = [sharded(n, (f"0{n}", f"1{n}"), (f"0{n}", f"1{n}")) for n in range(4)]
    steps[3] = sharded(3, ("03", "11"), ("03", "11"))
    (fault,) = identity_faults(steps)
    assert (fault.code, fault.severity, fault.steps) == ("shared-shard", "error", ("1", "3"))
    assert fault.tensors == ("a", "b")
    assert "tensor-parallel rank 1" in fault.message
    assert "rank1.pt" in fault.message
    assert "rank0.pt" not in fault.message


def test_tensors_that_never_change_are_worth_knowing_only() -> None:
    steps = [step(n, {"a": tensor("same"), "b": tensor(f"b{n}")}) for n in range(4)]
    (fault,) = identity_faults(steps)
    assert (fault.code, fault.severity, fault.tensors) == ("frozen", "info", ("a",))


def test_a_vector_may_stay_for_a_step_and_a_matrix_that_comes_back_may_not() -> None:
    stays = [step(n, {"a": tensor(f"a{n}"), "v": tensor(f"v{n // 2}", shape=(4,))}) for n in (0, 1)]
    stays += [step(n, {"a": tensor(f"a{n}"), "v": tensor(f"v{n}", shape=(4,))}) for n in (2, 3)]
    assert list(identity_faults(stays)) == []
    back = [step(n, {"a": tensor(f"a{n % 3}"), "b": tensor(f"b{n}")}) for n in range(4)]
    (fault,) = identity_faults(back)
    assert (fault.code, fault.steps) == ("shared-shard", ("0", "3"))
    assert "of tensor-parallel rank" not in fault.message


@pytest.mark.parametrize(
    ("own", "other", "told"),
    [
        (2.0, 3.0, True),  # fits step 2, and far from its neighbours at step 4
        (2.0, 2.0, False),  # fits both
        (2.6, 2.9, False),  # fits neither much better
    ],
)
def test_norms_beside_it_tell_whose_bits_they_are(own: float, other: float, told: bool) -> None:
    alike = {"a": tensor("same", own)}
    course = {0: 1.0, 1: 1.9, 3: 2.1, 5: other, 6: other + 0.1}
    steps = [step(n, alike if n in (2, 4) else {"a": tensor(f"a{n}", course[n])}) for n in range(7)]
    steps[3] = step(3, {"a": tensor("a3", 2.1)})
    (fault,) = identity_faults(steps)
    said = "they belong to step 2, so 4 has wrong weights" in fault.remedy
    assert said == told, fault.remedy


@pytest.mark.parametrize(("right", "wrong"), [(5, 2), (2, 5)])
def test_norms_that_grow_show_whose_bits_they_are_at_the_end_of_a_run(
    right: int, wrong: int
) -> None:
    """The last step has neighbors on one side only, and its norms are beyond theirs."""
    norms = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    steps = [step(n, {"a": tensor(f"a{n}", norms[n]), "b": tensor(f"b{n}")}) for n in range(6)]
    shard = {"a": steps[right].tensors["a"], "b": steps[wrong].tensors["b"]}
    steps[wrong] = step(wrong, shard)
    (fault,) = identity_faults(steps)
    assert f"they belong to step {right}, so {wrong} has wrong weights" in fault.remedy


def test_runs_that_share_a_step_are_named_unless_one_begins_with_the_other() -> None:
    one = [step(n, run="one") for n in range(6)]
    other = [step(n, {"a": tensor(f"o{n}")}, run="other") for n in range(6)]
    other[3] = replace(one[3], run="other")
    (fault,) = across_runs({"one": one, "other": other})
    assert (fault.code, fault.severity, fault.steps) == ("shared-step", "error", ("3",))
    begins = [replace(s, run="other") for s in one[:3]] + other[4:]
    assert list(across_runs({"one": one, "other": begins})) == []
    starts = [replace(s, run="other") for s in one[:2]] + other[2:3] + other[4:]
    assert list(across_runs({"one": one, "other": starts})) == []


def test_what_stays_in_half_precision_must_begin_with_step_0_and_have_numbers() -> None:
    alike = {"a": tensor("same"), "b": tensor("too")}
    for numbers in ((1, 2, 3), (0, 2, None)):
        steps = [step(n, alike, dtype="float16") for n in numbers] + [step(64)]
        (fault,) = identity_faults(steps)
        assert fault.severity == "error", numbers


def test_all_steps_alike() -> None:
    alike = {"a": tensor("same"), "b": tensor("too")}
    (fault,) = identity_faults([step(n, alike) for n in (4, 5, 6)])
    assert fault.message == "run: steps 4, 5 and 6 are identical in every tensor"
    assert fault.remedy == "all steps are equal; copy or convert the wrong ones again"
    assert list(identity_faults([step(4, alike)])) == []
    assert list(identity_faults([])) == []


def test_neighbours_that_are_the_same_tell_nothing() -> None:
    (fault,) = identity_faults(same(2, 3))
    assert fault.remedy.startswith("neighboring steps do not show which step they belong to; ")
    (apart,) = identity_faults(same(2, 4))
    assert apart.remedy.startswith("the norms do not show which step they belong to; ")


def whose(norms_: list[float], *shared: int) -> str:
    """The advice where these steps, of a run with these norms, have the same bits of one tensor."""
    steps = [
        step(n, {"a": tensor("same" if n in shared else f"a{n}", norm), "b": tensor(f"b{n}")})
        for n, norm in enumerate(norms_)
    ]
    (fault,) = identity_faults(steps)
    return fault.remedy.partition(";")[0]


STEP_2 = "the norms of neighboring steps suggest that they belong to step 2, so 4 has wrong weights"
NOBODYS = "the norms do not show which step they belong to"


@pytest.mark.parametrize(("factor", "told"), [(BOTH[0], False), (BOTH[1], True)])
@pytest.mark.parametrize("side", [1, -1], ids=["below", "above"])
def test_norms_tell_whose_bits_from_a_hundredth_on(factor: float, told: bool, side: int) -> None:
    """Step 2 lies between its neighbours, and step 4 below or above both of its own."""
    away = math.exp(side * 0.01 * factor)
    remedy = whose([1.0, 1.0, 1.0, away, 1.0, away, away], 2, 4)
    assert remedy == (STEP_2 if told else NOBODYS)


@pytest.mark.parametrize(
    ("near", "told"), [(2.0 * BOTH[0], True), (2.0, False), (2.0 * BOTH[1], False)]
)
def test_the_right_step_must_fit_four_times_as_well(near: float, told: bool) -> None:
    """The logarithms of 2 and 16 are in exactly the ratio of 1 to 4."""
    assert 0.25 * math.log(16.0) == math.log(2.0)
    remedy = whose([1.0, near, 1.0, 16.0, 1.0, 16.0, 16.0], 2, 4)
    assert remedy == (STEP_2 if told else NOBODYS)


def test_norms_tell_which_of_three_steps_is_right() -> None:
    remedy = whose([5.0, 5.0, 1.0, 5.0, 1.0, 1.0, 5.0, 5.0, 1.0, 5.0], 2, 4, 8)
    assert remedy == STEP_2.replace("step 2, so 4 has", "step 4, so 2 and 8 have")
    assert whose([1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 1.0, 5.0], 2, 4, 6) == NOBODYS


def test_norms_of_several_tensors_count_on_average() -> None:
    """One tensor fits nowhere, and one has no norm to compare with; the others tell."""
    steps = []
    for n in range(7):
        bits = "same" if n in (2, 4) else str(n)
        far = 1.0 if n < 4 or n == 4 else 9.0
        tensors = {"a": tensor(f"a{bits}", far), "z": tensor(f"z{bits}", 0.0)}
        steps.append(step(n, {**tensors, "b": tensor(f"b{n}")}))
    steps[3] = step(3, {**steps[3].tensors, "a": tensor("a3", 9.0)})
    (fault,) = identity_faults(steps)
    assert fault.remedy.partition(";")[0] == STEP_2


def layered(number: int, *bits: tuple[str, str, tuple[int, ...], str]) -> Step:
    """Tensors by name, bits, shape and file."""
    given = {name: tensor(one, shape=shape) for name, one, shape, _ in bits}
    return step(number, given, files={name: (file,) for name, _, _, file in bits})


def test_a_matrix_may_stay_for_a_step_unless_it_is_all_that_its_file_holds() -> None:
    def run(file: str) -> list[Step]:
        return [
            layered(
                n,
                ("a", f"a{max(n, 2)}", (4, 4), "one"),
                ("b", f"b{n}", (4, 4), file),
            )
            for n in range(1, 5)
        ]

    assert list(identity_faults(run("one"))) == []
    (fault,) = identity_faults(run("two"))
    assert (fault.code, fault.steps, fault.tensors) == ("shared-shard", ("1", "2"), ("a",))
    assert fault.message == (
        "run: steps 1 and 2 differ, but share 1 tensor bit for bit (everything in one): a"
    )
    assert fault.remedy == (
        "neighboring steps do not show which step they belong to; copy or convert that file again"
    )


def test_vectors_alone_are_a_file_of_another_step_only_where_they_change_at_other_steps() -> None:
    def run(*bits: int) -> list[Step]:
        return [
            layered(
                n,
                ("v", f"v{one}", (4,), "one"),
                ("w", f"w{one}", (4,), "one"),
                ("b", f"b{n}", (4, 4), "two"),
            )
            for n, one in enumerate(bits)
        ]

    (fault,) = identity_faults(run(0, 1, 2, 2, 4))
    assert (fault.steps, fault.tensors) == (("2", "3"), ("v", "w"))
    assert "differ, but share 2 tensors bit for bit (everything in one)" in fault.message
    assert list(identity_faults(run(0, 1, 1))) == [], "two values do not tell"
    assert list(identity_faults(run(0, 1, 1, 2, 2, 4))) == [], "they stay at other steps too"


def test_ranks_are_told_apart_only_where_all_steps_have_as_many() -> None:
    steps = [sharded(n, (f"0{n}", f"1{n}"), (f"0{n}", f"1{n}")) for n in range(4)]
    steps[3] = sharded(3, ("03", "11"), ("03", "11"))
    steps[0] = replace(steps[0], tp=1)
    assert list(identity_faults(steps)) == []


def test_tensors_of_every_rank_are_no_part() -> None:
    """Tensor a is step 1's on both ranks, and only there."""
    steps = [sharded(n, (f"0{n}", f"1{n}"), (f"0{n}", f"1{n}")) for n in range(4)]
    steps[3] = sharded(3, ("01", "11"), ("03", "13"))
    (fault,) = identity_faults(steps)
    assert (fault.steps, fault.tensors) == (("1", "3"), ("a",))
    assert "tensor-parallel" not in fault.message
    assert "everything" not in fault.message, "both files hold another tensor, which differs"
    assert fault.message.startswith("run: steps 1 and 3 differ, but share 1 tensor bit for bit: a")


def test_files_are_named_where_they_hold_nothing_else() -> None:
    steps = [sharded(n, (f"0{n}", f"1{n}"), (f"0{n}", f"1{n}")) for n in range(4)]
    more = {"c": tensor("c")}
    steps[3] = sharded(3, ("01", "11"), ("01", "11"))
    steps = [
        replace(
            one,
            tensors={**one.tensors, "c": replace(more["c"], hash=f"c{one.number}")},
            files={**one.files, "c": ("rank2.pt",)},
        )
        for one in steps
    ]
    (fault,) = identity_faults(steps)
    assert "differ, but share 2 tensors bit for bit (rank0.pt, rank1.pt): a, b" in (fault.message)


def test_constant_tensors_are_nobodys() -> None:
    """Norms begin as one value throughout, at every step."""
    ones = Fingerprint("ones", "float32", (4, 4), 1.0, 0, True)
    steps = [step(n, {"a": tensor(f"a{n}"), "n": ones}) for n in range(3)]
    steps += [step(3, {"a": tensor("a3"), "n": tensor("n3")})]
    assert list(identity_faults(steps)) == []
    rank = tensor("x", shards=(Shard("0", True), Shard("1", True)))
    held = [step(n, {"a": tensor(f"a{n}"), "x": rank}, tp=2) for n in range(3)]
    held = [replace(one, files=dict.fromkeys(one.tensors, ("0", "1"))) for one in held]
    assert list(identity_faults(held)) == []


def test_frozen_tensors_are_counted() -> None:
    steps = [
        step(n, {"a": tensor("same"), "c": tensor("too"), "b": tensor(f"b{n}")}) for n in range(3)
    ]
    (fault,) = identity_faults(steps)
    assert fault.message == "run: 2 of 3 tensors are equal in every step: a, c"
    assert fault.steps == ("0", "1", "2")


@pytest.mark.parametrize(
    ("count", "words"),
    [(12, "3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 13"), (13, "9, 10, 11 and 3 more")],
)
def test_a_dozen_steps_are_named(count: int, words: str) -> None:
    alike = {"a": tensor("same")}
    (fault,) = identity_faults([step(n, alike) for n in range(2, 2 + count)])
    assert f"{words} are identical" in fault.message


def test_steps_that_a_run_has_twice_are_no_other_runs() -> None:
    assert list(across_runs({"run": same(2, 4)})) == []
    one = [replace(s, run="one") for s in same(2, 4)]
    other = [step(n, {"a": tensor(f"o{n}")}, run="other") for n in range(6)]
    other[3] = replace(one[2], run="other", label="3", number=3)
    (fault,) = across_runs({"one": one, "other": other})
    assert fault.message == "one and other have identical steps: 2 is 3"


@pytest.mark.parametrize(("number", "wrong"), [(0, False), (1, False), (2, True), (None, True)])
def test_runs_may_share_their_first_step(number: int | None, wrong: bool) -> None:
    one, other = (step(number, run=run) for run in ("one", "other"))
    assert codes(across_runs({"one": [one], "other": [other]})) == ["shared-step"] * wrong


def test_a_run_that_goes_on_from_anothers_step_begins_with_it() -> None:
    one = [step(n, run="one") for n in range(2, 6)]
    goes_on = [replace(one[2], run="other", number=0), step(9, {"a": tensor("o")}, run="other")]
    assert list(across_runs({"one": one, "other": goes_on})) == []
    later = [replace(one[2], run="other", number=3), step(9, {"a": tensor("o")}, run="other")]
    assert list(across_runs({"one": one, "other": later})) == []
    within = [step(8, {"a": tensor("p")}, run="other"), replace(one[2], run="other", number=3)]
    assert codes(across_runs({"one": one, "other": within})) == ["shared-step"]
    everything = [replace(s, run="other") for s in one]
    assert codes(across_runs({"one": one, "other": everything})) == ["shared-step"]


# --- settings


def test_the_value_that_most_steps_do_not_have_is_named() -> None:
    steps = [step(n, meaning={"heads": 4 if n == 2 else 8}) for n in range(4)]
    (fault,) = setting_faults(steps)
    assert (fault.code, fault.severity, fault.steps) == ("config-differs", "warning", ("2",))
    assert "heads is 4" in fault.message


def test_another_dtype_is_named() -> None:
    steps = [step(n, dtype="float16" if n == 1 else "float32") for n in range(4)]
    assert [(f.code, f.steps) for f in setting_faults(steps)] == [("dtype-differs", ("1",))]


@pytest.mark.parametrize(("name", "wrong"), [("x.weight", True), ("embed_in.weight", False)])
def test_only_rows_of_the_vocabulary_may_differ(name: str, wrong: bool) -> None:
    steps = [step(n, {name: tensor(f"{n}", shape=(5 if n == 1 else 4, 4))}) for n in range(4)]
    assert codes(setting_faults(steps)) == (["shapes-differ"] if wrong else [])
    steps = [step(n, {name: tensor(f"{n}", shape=(4, 5 if n == 1 else 4))}) for n in range(4)]
    assert codes(setting_faults(steps)) == ["shapes-differ"]


def test_a_number_inside_that_is_another_and_a_step_that_is_there_twice() -> None:
    steps = [step(1), step(2, iteration=3), step(4), replace(step(4), path="run/copy")]
    faults = list(setting_faults(steps))
    assert [(f.code, f.steps) for f in faults] == [
        ("other-iteration", ("2",)),
        ("step-twice", ("4",)),
    ]
    assert "run/step4, run/copy" in faults[1].message
    assert "run/step1" not in faults[1].message


def test_the_value_of_most_steps_is_usual_and_the_first_where_they_tie() -> None:
    steps = [step(n, meaning={"heads": 4 if n in (1, 2) else 8}) for n in range(5)]
    (fault,) = setting_faults(steps)
    assert fault.message == "run: heads is 4 at step 1, 2, and 8 at most"
    tied = [step(n, meaning={"heads": 4 + n}) for n in range(2)]
    (second,) = setting_faults(tied)
    assert second.steps == ("1",)
    absent = [step(n, meaning={} if n == 1 else {"heads": 8}) for n in range(3)]
    (lost,) = setting_faults(absent)
    assert lost.message == "run: heads is None at step 1, and 8 at most"


def unknown(value: Any = 2.0, effect: Any = "model") -> UnknownKey:
    return UnknownKey("neox", "attention-scale", value, effect)


def test_an_unknown_setting_is_a_warning_where_it_may_change_the_model() -> None:
    steps = [step(n, unknown_keys=(unknown(),)) for n in range(2)]
    (fault,) = setting_faults(steps)
    assert (fault.code, fault.severity, fault.steps) == ("unknown-key", "warning", ("0", "1"))
    assert fault.message.startswith("run: 0, 1: attention-scale: 2.0, which no GPT-NeoX ")
    assert "check it if a fork" not in fault.remedy
    harmless = [step(n, unknown_keys=(unknown("x", "none"),)) for n in range(2)]
    (fault,) = setting_faults(harmless)
    assert (fault.code, fault.severity) == ("unknown-key", "info")
    assert fault.message == "run: 0, 1: unknown setting: attention-scale: 'x'"
    assert fault.remedy == "check it if a fork of GPT-NeoX trained the run"


def test_an_unknown_setting_that_only_some_steps_have_is_another_config() -> None:
    steps = [step(n, unknown_keys=(unknown(3.0 if n == 1 else 2.0),) * (n != 2)) for n in range(5)]
    faults = list(setting_faults(steps))
    assert [(f.code, f.steps) for f in faults] == [
        ("unknown-key", ("0", "1", "3", "4")),
        ("config-differs", ("1",)),
        ("config-differs", ("2",)),
    ]
    assert "attention-scale is missing at step 2, and 2.0 at most" in faults[2].message


def test_a_tensor_that_one_step_lacks_or_has_alone_is_of_another_shape() -> None:
    steps = [step(n) for n in range(4)]
    steps[2] = step(2, {"a": tensor("a2"), "c": tensor("c")})
    (fault,) = setting_faults(steps)
    assert (fault.code, fault.steps) == ("shapes-differ", ("2",))
    assert fault.tensors == ("b", "c")
    assert "step 2 has 2 tensors of other shapes" in fault.message


# --- initial weights


def starting(run: str, bits: str, seed: int | None, **more: Any) -> Step:
    return step(0, {"a": tensor(bits)}, run=run, seed=seed, kind="neox", **more)


def test_runs_of_one_seed_must_begin_alike() -> None:
    runs = {
        name: [starting(name, bits, 1)]
        for name, bits in (("one", "x"), ("two", "x"), ("three", "y"))
    }
    (fault,) = init_faults(runs)
    assert (fault.code, fault.severity, fault.run) == ("init-differs", "error", "three")
    assert fault.tensors == ("a",)
    assert list(init_faults({name: runs[name] for name in ("one", "two")})) == []
    other = {"one": runs["one"], "three": [replace(runs["three"][0], making=("tp=2",))]}
    assert list(init_faults(other)) == []
    hugging_face = {name: [replace(runs[name][0], kind="hf")] for name in ("one", "three")}
    assert list(init_faults(hugging_face)) == []


def test_runs_of_two_seeds_must_not_begin_alike() -> None:
    runs = {"one": [starting("one", "x", 1)], "two": [starting("two", "x", 2)]}
    (fault,) = init_faults(runs)
    assert (fault.code, fault.severity) == ("init-same", "error")
    untold = {"one": runs["one"], "two": [starting("two", "x", None)]}
    assert list(init_faults(untold)) == []


def test_the_user_may_say_that_runs_begin_alike() -> None:
    runs = {"one": [starting("one", "x", 1)], "two": [starting("two", "y", 2)]}
    assert codes(init_faults(runs, same_init=True)) == ["init-differs"]
    assert codes(init_faults({"one": runs["one"]}, same_init=True)) == ["no-step-0"]
    later = {name: [replace(steps[0], number=1)] for name, steps in runs.items()}
    assert codes(init_faults(later, same_init=True)) == ["no-step-0"]
    shapes = {"one": runs["one"], "two": [step(0, {"a": tensor("y", shape=(8, 4))}, run="two")]}
    assert codes(init_faults(shapes, same_init=True)) == ["no-step-0"]


@pytest.mark.parametrize("bits", ["xxy", "yyx", "xyx", "yxx", "xyy"])
def test_the_run_that_begins_otherwise_is_the_one_of_the_fewest(bits: str) -> None:
    runs = {f"r{n}": [starting(f"r{n}", one, 1)] for n, one in enumerate(bits)}
    (fault,) = init_faults(runs)
    odd = next(n for n, one in enumerate(bits) if bits.count(one) == 1)
    usual = next(n for n, one in enumerate(bits) if bits.count(one) == 2)
    assert fault.message == (
        f"r{odd}: step 0 differs from that of r{usual} (the same seed): 1 of 1 tensor differs: a"
    )


def test_all_runs_that_begin_otherwise_are_named() -> None:
    runs = {f"r{n}": [starting(f"r{n}", one, 1)] for n, one in enumerate("yxxz")}
    assert [fault.run for fault in init_faults(runs)] == ["r0", "r3"]
    told = [fault.message for fault in init_faults(runs, same_init=True)]
    assert ["(requested with `same_init=`)" in message for message in told] == [True, True]


def test_runs_of_other_seeds_that_begin_alike_are_named_once() -> None:
    runs = {f"r{n}": [starting(f"r{n}", "x", seed)] for n, seed in enumerate((1, 2, 3))}
    (fault,) = init_faults(runs)
    assert fault.run == "r1"
    assert fault.message == ("step 0 is identical in r0 (seed 1), r1 (seed 2), r2 (seed 3)")


def test_two_runs_are_needed_to_begin_alike() -> None:
    pair = {"one": [starting("one", "x", 1)], "two": [starting("two", "x", 1)]}
    assert list(init_faults(pair, same_init=True)) == []
    assert list(init_faults({"one": pair["one"], "none": []})) == []
    dtypes = {"one": pair["one"], "two": [step(0, {"a": replace(tensor("x"), dtype="float16")})]}
    assert codes(init_faults(dtypes, same_init=True)) == ["no-step-0"]


# --- optimizer states

MASTER = "master: a"


def with_states(number: int, norm: float, dtype: str = "float16", **more: Any) -> Step:
    weights = {"a": replace(tensor(f"w{number}", 1.0), dtype=dtype)}
    states = {MASTER: tensor(f"m{number}", norm)}
    files = dict.fromkeys(("a", MASTER), ("model.safetensors",))
    return step(number, weights, states=states, files=files, updates=(number,), **more)


def test_the_name_of_a_master_is_the_one_that_the_audit_looks_for() -> None:
    from neox_bridge.verification.audit_states import _MASTERS

    assert MASTER.startswith(_MASTERS)


@pytest.mark.parametrize(("factor", "other"), [(BOTH[0], False), (BOTH[1], True)])
@pytest.mark.parametrize("side", [1, -1])
def test_masters_are_the_weights_within_a_hundredth(factor: float, other: bool, side: int) -> None:
    # |m - 1| = 0.01 m where m = 1 / (1 - 0.01 side)
    steps = [with_states(n, 1 / (1 - side * 0.01 * factor)) for n in range(1, 4)]
    expected = ["other-masters"] * 3 if other else []
    assert codes(state_faults(steps, [])) == expected


def test_masters_of_the_same_dtype_must_have_the_same_bits() -> None:
    faults = list(state_faults([with_states(1, 1.0, "float32")], []))
    assert codes(faults) == ["other-masters"]
    assert faults[0].severity == "error"
    assert faults[0].tensors == ("a",)


def test_an_optimizer_that_counts_otherwise_than_its_run() -> None:
    steps = [with_states(n, 1.0) for n in range(1, 5)]
    assert codes(state_faults(steps, [])) == []
    steps[2] = replace(steps[2], updates=(1,))
    (fault,) = state_faults(steps, [])
    assert (fault.code, fault.steps) == ("other-count", ("3",))
    assert "it counts 1 step," in fault.message
    assert "by the other steps of the run it should be 3" in fault.message
    steps[2] = replace(steps[2], updates=(3, 2))
    (apart,) = state_faults(steps, [])
    assert "3 and 2 steps" in apart.message


def test_masters_that_are_not_finite_or_of_no_weight_are_not_compared() -> None:
    other = with_states(1, 9.0)
    assert codes(state_faults([other], [])) == ["other-masters"]
    bad = replace(other, states={MASTER: tensor("m", 9.0, bad=1)})
    assert codes(state_faults([bad], [])) == ["not-finite"]
    bad = replace(other, tensors={"a": replace(other.tensors["a"], bad=1)})
    assert codes(state_faults([bad], [])) == []
    gone = replace(other, tensors={"b": other.tensors["a"]})
    assert codes(state_faults([gone], [])) == []
    moment = replace(other, states={"exp_avg: a": tensor("m", 9.0)}, files={"exp_avg: a": ("x",)})
    assert codes(state_faults([moment], [])) == []


def test_masters_may_jump_where_the_weights_do_and_moments_anywhere() -> None:
    def run(name: str, late: float) -> list[Step]:
        one = [with_states(n, 1.0) for n in range(1, 7)]
        return [
            replace(
                s,
                tensors={},
                states={name: tensor(f"m{s.number}", late if s.number == 4 else 1.0)},
                files={name: ("x",)},
            )
            for s in one
        ]

    (fault,) = state_faults(run(MASTER, 9.0), [])
    assert (fault.code, fault.run, fault.steps) == ("norm-jump", "run", ("4",))
    assert fault.message.startswith("run: the optimizer: at step 4 ")
    known = Fault("norm-jump", "warning", "m", "", "run", ("4",), ("a",))
    assert list(state_faults(run(MASTER, 9.0), [known])) == []
    elsewhere = replace(known, steps=("3",))
    assert codes(state_faults(run(MASTER, 9.0), [elsewhere])) == ["norm-jump"]
    assert list(state_faults(run("exp_avg: a", 9.0), [])) == []


def test_states_of_another_step_are_named() -> None:
    steps = [with_states(n, 1.0) for n in range(1, 6)]
    steps[3] = replace(steps[3], states=steps[1].states)
    said = [(f.code, f.run, f.steps) for f in state_faults(steps, [])]
    assert ("identical-steps", "run", ("2", "4")) in said


def test_an_optimizer_that_began_anew_is_always_behind() -> None:
    steps = [replace(with_states(n, 1.0), updates=(n - 2,)) for n in range(3, 7)]
    assert list(state_faults(steps, [])) == []
    steps[1] = replace(steps[1], updates=(4,))
    (fault,) = state_faults(steps, [])
    assert fault.message.endswith(
        "it counts 4 steps, but by the other steps of the run it should be 2"
    )
    unnumbered = [replace(s, number=None) for s in steps]
    assert list(state_faults(unnumbered, [])) == []
    assert list(state_faults([], [])) == []


# --- together


def test_a_fault_of_the_weights_explains_a_jump_of_their_norms() -> None:
    steps = norms(1.0, 1.0, 9.0, 1.0, 1.0, 1.0)
    assert codes(judge(steps)) == ["norm-jump"]
    alike = {"a": steps[2].tensors["a"], "b": steps[2].tensors["b"]}
    steps.append(replace(steps[2], label="6000", number=6000, tensors=alike))
    assert codes(judge(steps)) == ["identical-steps"]


def test_identical_steps_explain_all_of_their_norms() -> None:
    """The jump at the later one is the identity's; one of another step or tensor stays."""
    steps = norms(1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    steps[6] = replace(steps[2], label="6000", number=6000)
    steps.append(step(8000, {"a": tensor("a8", 9.0), "b": tensor("b8")}))
    found = judge(steps)
    assert [(f.code, f.steps) for f in found] == [
        ("identical-steps", ("2000", "6000")),
        ("norm-jump", ("8000",)),
    ]
    assert judge([]) == []


def test_the_verdict_is_the_worst_that_is_said_of_a_step() -> None:
    def fault(severity: Any, *steps: str, run: str = "run") -> Fault:
        return Fault("code", severity, "message", "", run, steps)

    faults = [fault("warning", "1", "2"), fault("error", "2"), fault("info", "3")]
    faults.append(fault("error", "4", run="another"))
    said = [verdict(step(n), faults) for n in range(1, 5)]
    assert said == ["warning", "error", "ok", "ok"]
