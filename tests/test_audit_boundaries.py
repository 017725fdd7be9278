"""The audit's judgements on both sides of each threshold, from made-up fingerprints."""

import math
from dataclasses import replace
from typing import Any

import pytest

from neox_bridge.verification.audit import judge, verdict
from neox_bridge.verification.audit_identity import across_runs, identity_faults
from neox_bridge.verification.audit_norms import broken_faults, jump_faults, jumps_of
from neox_bridge.verification.audit_settings import init_faults, missing_faults, setting_faults
from neox_bridge.verification.audit_states import state_faults
from neox_bridge.verification.hashes import Fingerprint, Shard
from neox_bridge.verification.runs import Fault
from neox_bridge.verification.steps import Step

BOTH = (1.0 - 1e-4, 1.0 + 1e-4)  # just below a threshold, and just above


def tensor(bits: str, norm: float = 1.0, shape: tuple[int, ...] = (4, 4), **more: Any) -> Any:
    return Fingerprint(bits, "float32", shape, norm, more.pop("bad", 0), False, **more)


def step(number: int | None, tensors: dict[str, Fingerprint] | None = None, **more: Any) -> Step:
    given = {"a": tensor(f"a{number}"), "b": tensor(f"b{number}")} if tensors is None else tensors
    files = dict.fromkeys(given, ("model.safetensors",))
    fields: dict[str, Any] = {
        "run": "run",
        "label": str(number),
        "number": number,
        "path": f"run/step{number}",
        "kind": "hf",
        "tp": 1,
        "dtype": "float32",
        "meaning": {},
        "seed": None,
        "making": (),
        "tensors": given,
        "files": files,
        "size": 64,
        "read": 0,
    }
    return Step(**{**fields, **more})


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
    assert "back at the next" in fault.message
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
    said = "they are step 2's, and 4 has the wrong ones" in fault.remedy
    assert said == told, fault.remedy


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
    assert "has made 1 steps" in fault.message
    assert "by the run's others 3" in fault.message
    steps[2] = replace(steps[2], updates=(3, 2))
    (apart,) = state_faults(steps, [])
    assert "3 and 2 steps" in apart.message


# --- together


def test_a_fault_of_the_weights_explains_a_jump_of_their_norms() -> None:
    steps = norms(1.0, 1.0, 9.0, 1.0, 1.0, 1.0)
    assert codes(judge(steps)) == ["norm-jump"]
    alike = {"a": steps[2].tensors["a"], "b": steps[2].tensors["b"]}
    steps.append(replace(steps[2], label="6000", number=6000, tensors=alike))
    assert codes(judge(steps)) == ["identical-steps"]


def test_the_verdict_is_the_worst_that_is_said_of_a_step() -> None:
    def fault(severity: Any, *steps: str, run: str = "run") -> Fault:
        return Fault("code", severity, "message", "", run, steps)

    faults = [fault("warning", "1", "2"), fault("error", "2"), fault("info", "3")]
    faults.append(fault("error", "4", run="another"))
    said = [verdict(step(n), faults) for n in range(1, 5)]
    assert said == ["warning", "error", "ok", "ok"]
