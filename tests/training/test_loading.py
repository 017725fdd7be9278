"""What a run starts from, how its yml is checked, and what each rank reads."""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from hub_stub import Stub, serving, use

from neox_bridge import Refused, open_checkpoint
from neox_bridge.errors import BridgeError
from neox_bridge.execution import movers
from neox_bridge.findings import Finding
from neox_bridge.training import loading
from neox_bridge.training.loading import Part, Run, load_into, open_for_run, plan_for, start_of


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """Two layers."""
    second = {
        name.replace("layers.0", "layers.1"): values
        for name, values in tiny.tensors(seed=1).items()
        if "layers.0" in name
    }
    return tiny.write_hf(tmp_path / "hf", changed=second, num_hidden_layers=2)


@pytest.fixture
def tree(trees: Mapping[str, Path]) -> str:
    return str(trees["today"])


# of GPT-NeoX (megatron/neox_arguments/neox_args.py)
DEFAULTS = {
    "rotary_emb_base": 10000,
    "layernorm_epsilon": 1e-5,
    "rms_norm_epsilon": 1e-8,
    "attention_config": None,
    "num_kv_heads": None,
    "sliding_window_width": None,
    "use_qk_layernorm": False,
    "gpt_j_tied": False,
    "rmsnorm_fusion": False,
}


def run_of(hf: Path, tree: str, tp: int = 1, pp: int = 0, **changed: Any) -> Run:
    """A run with the yml that a conversion would write, and with changed keys."""
    plan = tiny.plan_of(hf, Path("/neox"), tp=tp, pp=pp, layout="layers" if pp else "ranks")
    (text,) = (f.literals[0][1] for f in plan.files if f.path.endswith("neox_bridge.yml"))
    settings = {key.replace("-", "_"): value for key, value in yaml.safe_load(text).items()}
    rows = plan.target["vocab_rows"]
    settings |= {"padded_vocab_size": rows, "train_impl": "normal"}
    return Run({**DEFAULTS, **settings, **changed}, DEFAULTS, tree)


# load


def test_a_local_folder_wins_over_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert start_of("org/model", None).source == "hf://org/model"
    folder = tiny.write_hf(tmp_path / "org" / "model")
    start = start_of("org/model", None)
    assert start.source == str(folder)
    assert start.note == f"load: the local folder {folder} is used, not hf://org/model on the Hub"
    assert start_of(str(folder), None).note == ""
    assert start_of("hf://org/model@step3", None).source == "hf://org/model@step3"


def test_what_gpt_neox_loads_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "latest").write_text("global_step5")
    for load, save in [
        (None, "saved"),
        ("runs/old", None),
        ("runs/new", "runs/new"),  # both keys name the run's folder, which does not exist yet
        ("runs/new/", f"{tmp_path}/runs/new"),
    ]:
        assert start_of(load, save) == loading.Start(), load
    assert start_of("/missing/folder", None, 5).source == ""  # GPT-NeoX refuses this itself


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            "/missing/folder",
            "load: /missing/folder is no folder, so GPT-NeoX would start from rand",
        ),
        ("org/name/more", r"is no folder.*Correct the path, or remove `load` to start from random"),
        ("~/runs", r"load: ~/runs is not expanded by GPT-NeoX.*Write {home}/runs, or remove"),
        ("runs", r"contains global_step5 but no file `latest`.*name of a step into runs/latest"),
        ("other", "contains neither a Hugging Face model nor a file `latest`"),
    ],
)
def test_a_load_that_gpt_neox_would_ignore_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str, message: str
) -> None:
    """GPT-NeoX would train random weights without an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "global_step5").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(BridgeError, match=message.format(home=tmp_path)):
        start_of(load, "saved")


def test_forms_of_a_folder(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    other = tiny.write_hf(tmp_path / "my models" / "pythia ü")
    (tmp_path / "link").symlink_to(hf)
    for load in ("hf/", "./hf", "~/hf", str(hf)):
        assert start_of(load, None).source == str(hf), load
    assert start_of("link", None).source == str(tmp_path / "link")
    assert start_of("my models/pythia ü", None).source == str(other)
    assert start_of("org/name/", None).source == "hf://org/name"


def test_a_checkpoint_wins_over_a_model_in_the_same_folder(hf: Path) -> None:
    (hf / "latest").write_text("global_step5")
    start = start_of(str(hf), None)
    assert start.source == ""
    assert start.note.startswith(f"load: {hf} contains a Hugging Face model too, which is not used")


def test_the_iteration_of_the_yml_is_one_of_the_run(hf: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    with pytest.raises(BridgeError, match=r"iteration: 5 names a step of GPT-NeoX, but load: "):
        start_of(str(hf), str(save), 5)
    (save / "global_step9").mkdir(parents=True)
    (save / "latest").write_text("global_step9")
    assert start_of(str(hf), str(save), 5).note.startswith("resuming from global_step5 in ")


def test_a_run_resumes_from_its_own_checkpoints(hf: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    assert start_of(str(hf), str(save)).resumed == ""
    (save / "global_step5").mkdir(parents=True)
    (save / "latest").write_text("global_step5")
    start = start_of(str(hf), str(save))
    assert start.resumed == str(save)
    assert start.note == f"resuming from global_step5 in {save}, not starting from {hf}"


def test_steps_are_not_replaced_by_a_run_that_starts_again(hf: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    (save / "global_step5").mkdir(parents=True)
    with pytest.raises(BridgeError, match=r"contains global_step5 but no file `latest`"):
        start_of(str(hf), str(save))
    (save / "latest").write_text("global_step10")
    with pytest.raises(BridgeError, match=r"latest names global_step10, which is missing"):
        start_of(str(hf), str(save))
    for broken in (b"", b"\n", b"\xff"):  # a crash on a full disk
        (save / "latest").write_bytes(broken)
        with pytest.raises(BridgeError, match=r"latest .* so the run cannot resume"):
            start_of(str(hf), str(save))


# the yml against config.json


@pytest.mark.parametrize(
    ("name", "value", "in_model"),
    [
        ("num_layers", 3, "2"),
        ("hidden_size", 16, "8"),
        ("num_attention_heads", 4, "2"),
        ("rotary_pct", 1.0, "0.5"),
        ("rotary_emb_base", 500000, "10000"),
        ("layernorm_epsilon", 1e-6, "1e-05"),
        ("gpt_j_residual", False, "True"),
        ("no_weight_tying", False, "True"),
        ("norm", "rmsnorm", "'layernorm'"),
        ("activation", "silu", "'gelu'"),
        ("pos_emb", "alibi", "'rotary'"),
        ("attention_config", ["local", "global"], "None"),
        ("sliding_window_width", 4, "None"),
        ("num_kv_heads", 1, "None"),
        ("use_qk_layernorm", True, "False"),
        ("gpt_j_tied", True, "False"),
    ],
)
def test_a_mismatch_names_the_key_and_both_values(
    hf: Path, tree: str, name: str, value: Any, in_model: str
) -> None:
    checkpoint = open_checkpoint(str(hf))
    plan_for(checkpoint, run_of(hf, tree))
    with pytest.raises(Refused) as refusal:
        plan_for(checkpoint, run_of(hf, tree, **{name: value}))
    assert f"{name}: {value!r} in the yml, {in_model}" in str(refusal.value)
    assert f"{hf}/config.json" in str(refusal.value)


def test_what_the_model_does_not_fix_may_differ(hf: Path, tree: str) -> None:
    changed = {"seq_length": 4, "hidden_dropout": 0.5, "precision": "fp16", "lr": 1}
    changed |= {"attention_config": [[["flash", "global"], 2]], "num_kv_heads": 2}
    changed |= {"rmsnorm_fusion": True, "rms_norm_epsilon": 1e-6, "intermediate_size": None}
    plan_for(open_checkpoint(str(hf)), run_of(hf, tree, **changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"padded_vocab_size": 8}, r"has 16 rows.* make 8\."),
        ({"zero_optimization": {"stage": 3}}, "Use stage 0, 1 or 2"),
        ({"soft_prompt_tuning": {"enabled": True}}, "adds a layer that .* does not have"),
        ({"no_load_optim": True, "do_train": True}, "its weights would not change"),
        ({"train_impl": "rm"}, "is a language model, but the yml says train_impl: rm"),
    ],
)
def test_trainings_that_cannot_start_are_refused(
    hf: Path, tree: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        plan_for(open_checkpoint(str(hf)), run_of(hf, tree, **changed))


# the weights


def parts_of(folder: Path, rank: int, dtype: torch.dtype) -> tuple[list[Part], list[Any]]:
    """Parameters of one tensor-parallel rank, random, and the values that they must get."""
    parts, expected = [], []
    for path in sorted(folder.glob(f"global_step*/layer_*-model_{rank:02}-model_states.pt")):
        values = torch.load(path, weights_only=True)
        number = int(path.name.partition("-")[0].removeprefix("layer_"))
        parts.append(Part(number, {k: torch.rand(v.shape).to(dtype) for k, v in values.items()}))
        expected.append(values)
    if not parts:
        (path,) = folder.glob(f"global_step*/mp_rank_{rank:02}_model_states.pt")
        values = torch.load(path, weights_only=False)["module"]
        values = {k: v for k, v in values.items() if k.startswith("sequential.")}
        parts.append(Part(None, {k: torch.rand(v.shape).to(dtype) for k, v in values.items()}))
        expected.append(values)
    return parts, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tp", "pp"), [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2)])
def test_each_rank_reads_its_part(
    hf: Path,
    tree: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tp: int,
    pp: int,
    dtype: torch.dtype,
) -> None:
    read = movers.read
    sizes: list[int] = []

    def counted(fd: Any, path: str, buffer: Any, start: int) -> None:
        sizes.append(len(buffer))
        read(fd, path, buffer, start)

    monkeypatch.setattr(movers, "read", counted)
    layout = "layers" if pp else "ranks"
    neox = tiny.convert(hf, tmp_path / "neox", tp=tp, pp=pp, layout=layout)
    checkpoint = open_checkpoint(str(hf))
    for rank in range(tp):
        parts, expected = parts_of(neox, rank, dtype)
        sizes.clear()
        size = load_into(checkpoint, run_of(hf, tree, tp, pp), parts, rank).size
        for part, values in zip(parts, expected, strict=True):
            for name, parameter in part.parameters.items():
                assert torch.equal(parameter, values[name].to(dtype)), name
        elements = sum(p.numel() for part in parts for p in part.parameters.values())
        assert size == elements * 4
        if tp == 1:
            assert sum(sizes) == size
        else:  # columns of a matrix are mapped, without the gaps between them
            columns = sum(
                p.numel() * 4
                for part in parts
                for name, p in part.parameters.items()
                if name.endswith(("dense.weight", "linear2.weight"))
            )
            zeros = sum(
                value.numel() * 4 for of in expected for value in of.values() if not value.any()
            )  # the biases that rank 0 has
            assert columns
            assert sum(sizes) == size - columns - zeros


def test_one_stage_reads_only_its_layers(hf: Path, tree: str, tmp_path: Path) -> None:
    neox = tiny.convert(hf, tmp_path / "neox", pp=2)
    parts, _ = parts_of(neox, 0, torch.float32)
    checkpoint, run = open_checkpoint(str(hf)), run_of(hf, tree, 1, 2)
    sizes = [load_into(checkpoint, run, [part], 0).size for part in parts]
    assert sizes == [sum(v.numel() * 4 for v in part.parameters.values()) for part in parts]


def test_what_gpt_neox_computes_otherwise_is_a_warning(
    hf: Path, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = (
        Finding("rms-epsilon", "warning", "another formula"),
        Finding("x", "info", "a note"),
    )
    plan = replace(plan_for(open_checkpoint(str(hf)), run_of(hf, tree)), findings=findings)
    monkeypatch.setattr(loading, "plan_for", lambda *_args: plan)
    loaded = load_into(open_checkpoint(str(hf)), run_of(hf, tree), [], 0)
    assert loaded.warnings == ("another formula",)


def test_rows_that_only_gpt_neox_has_are_a_warning(hf: Path, tree: str, tmp_path: Path) -> None:
    neox = tiny.convert(hf, tmp_path / "neox", vocab_multiple=64, tp=1, pp=0, layout="ranks")
    parts, _ = parts_of(neox, 0, torch.float32)
    run = run_of(hf, tree, padded_vocab_size=64)
    (warning,) = load_into(open_checkpoint(str(hf)), run, parts, 0).warnings
    assert "make 64 rows of the embedding, but the model has 16." in warning
    assert warning.endswith("set make_vocab_size_divisible_by: 16")
    embedding = parts[0].parameters["sequential.0.word_embeddings.weight"]
    assert embedding[:16].any(1).all()
    assert not embedding[16:].any()


def test_other_names_and_shapes_are_refused(hf: Path, tree: str) -> None:
    checkpoint, run = open_checkpoint(str(hf)), run_of(hf, tree)
    part = Part(None, {"sequential.0.word_embeddings.weight": torch.zeros(2, 2)})
    with pytest.raises(BridgeError, match=r"mp_rank_00_model_states.pt. unexpected: sequential\.2"):
        load_into(checkpoint, run, [part], 0)
    plan = plan_for(checkpoint, run)
    (file,) = (f for f in plan.files if f.path.endswith("mp_rank_00_model_states.pt"))
    names = [t.name for t in file.tensors if t.name.startswith("sequential.")]
    part = Part(None, {name: torch.zeros(2, 2) for name in names})
    with pytest.raises(BridgeError, match=r"\[16, 8\] in the model, but \[2, 2\] in GPT-NeoX"):
        load_into(checkpoint, run, [part], 0)


def test_values_that_are_too_large_for_the_precision_are_refused(tree: str, tmp_path: Path) -> None:
    values = tiny.tensors()["gpt_neox.embed_in.weight"]
    values[1, 2:4] = 1e5, -1e5
    hf = tiny.write_hf(tmp_path / "large", changed={"gpt_neox.embed_in.weight": values})
    neox = tiny.convert(hf, tmp_path / "neox", layout="ranks")
    checkpoint, run = open_checkpoint(str(hf)), run_of(hf, tree)
    load_into(checkpoint, run, parts_of(neox, 0, torch.bfloat16)[0], 0)
    with pytest.raises(BridgeError, match=r"embeddings\.weight has 2 values too large for float16"):
        load_into(checkpoint, run, parts_of(neox, 0, torch.float16)[0], 0)


# several ranks


def on_ranks(count: int, call: Callable[..., Any]) -> list[Any]:
    """Call on several threads that exchange texts as ranks do. Returns values or errors."""
    barrier = threading.Barrier(count, timeout=60)
    texts, results = [""] * count, [None] * count

    def rank_of(rank: int) -> None:
        def exchange(text: str) -> list[str]:
            texts[rank] = text
            barrier.wait()
            gathered = list(texts)
            barrier.wait()
            return gathered

        try:
            results[rank] = call(rank, exchange)
        except BridgeError as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_model_is_downloaded_once_per_node(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Stub()) as hub:
        use(hub, monkeypatch, tmp_path)
        commit = hub.put_files("org/model", "step3", hf)

        def call(rank: int, exchange: Any) -> Any:
            def moving(text: str) -> Any:
                if rank == 0 and text == commit:  # somebody commits after the first rank looked
                    hub.put("org/model", "step3", **{"config.json": b"{}"})
                return exchange(text)

            return open_for_run("hf://org/model@step3", moving, rank=rank, local_rank=rank)

        checkpoints = on_ranks(3, call)
        assert {os.path.basename(c.path) for c in checkpoints} == {commit}
        assert hub.count("GET /lfs/") == 1


def test_an_error_of_one_rank_ends_all(tmp_path: Path) -> None:
    def call(rank: int, exchange: Any) -> Any:
        folder = tiny.write_hf(tmp_path / f"node{rank}") if rank == 0 else tmp_path / "missing"
        return open_for_run(str(folder), exchange, rank=rank, local_rank=0)

    errors = on_ranks(2, call)
    assert [type(error) for error in errors] == [BridgeError, BridgeError]
    assert f"{tmp_path}/missing: no such folder" in str(errors[0])


def test_a_name_that_is_nowhere_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(Stub()) as hub:
        use(hub, monkeypatch, tmp_path)
        source = start_of("org/model", None).source
        with pytest.raises(BridgeError, match="there is no folder org/model, and the model cannot"):
            open_for_run(source, lambda text: [text], rank=0, local_rank=0)


def test_checkpoints_of_gpt_neox_on_the_hub_are_refused(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.convert(hf, tmp_path / "neox")
    with serving(Stub()) as hub:
        use(hub, monkeypatch, tmp_path)
        hub.put_files("org/run", "main", tmp_path / "neox")
        with pytest.raises(BridgeError, match=r"hf download org/run --revision main"):
            open_for_run("hf://org/run", lambda text: [text], rank=0, local_rank=0)
