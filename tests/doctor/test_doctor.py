"""The doctor's verdicts: where a checkpoint loads, what is printed if not, and what mends it."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from common import GPT_NEOX, TESTS, convert, fixture, make_hf, neox_config, neox_files, step_of
from safetensors.torch import load_file, save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.architectures.base import Refusal
from neox_bridge.cli.app import app
from neox_bridge.doctor.compare import compare
from neox_bridge.doctor.diagnose import diagnose, judge, judge_all, own_target
from neox_bridge.doctor.verdict import Verdict
from neox_bridge.frameworks.eras import era_named
from neox_bridge.frameworks.targets import Target, target_named
from neox_bridge.layouts.checkpoint import Checkpoint
from neox_bridge.layouts.derived_values import inv_freq
from neox_bridge.layouts.gqa import unknown_order

ERA_NAMES = ("2024-03", "2024-09", "2024-10", "today")
MISSING = 'Missing key(s) in state_dict: "attention.rotary_emb.inv_freq". '
UNEXPECTED = 'Unexpected key(s) in state_dict: "attention.rotary_emb.inv_freq". '
LAYER = "RuntimeError: Error(s) in loading state_dict for ParallelTransformerLayerPipe:\n\t"
MLP = {
    "dense": '"mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.weight", '
    '"mlp.dense_4h_to_h.bias"',
    "linear": '"mlp.linear1.weight", "mlp.linear1.bias", "mlp.linear2.weight", "mlp.linear2.bias"',
}


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(str(path))


def judged(path: Path, target: str) -> Verdict:
    return judge(opened(path), target_named(target))


def subjects(verdict: Verdict) -> list[str]:
    return [case.finding.subject for case in verdict.cases]


def codes(verdict: Verdict, severity: str = "error") -> set[str]:
    return {c.finding.code for c in verdict.cases if c.finding.severity == severity}


def edit_yml(root: Path, **keys: Any) -> None:
    (path,) = (step_of(root) / "configs").glob("*.yml")
    settings = {**yaml.safe_load(path.read_text()), **keys}
    kept = {key: value for key, value in settings.items() if value is not None}
    path.write_text(yaml.safe_dump(kept))


def edit_config(folder: Path, drop: tuple[str, ...] = (), **keys: Any) -> None:
    raw = {**json.loads((folder / "config.json").read_text()), **keys}
    kept = {key: value for key, value in raw.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config.json has both spellings, with a tokenizer of 290 entries."""
    folder = tmp_path_factory.mktemp("doctor")
    source = make_hf(folder / "source", num_attention_heads=4)
    vocabulary = {"<|endoftext|>": 0, **{f"t{i}": i for i in range(1, 290)}}
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    convert(source, folder / "hf", to="hf")
    return folder / "hf"


def neox(hf: Path, folder: Path, era: str = "today", **options: Any) -> Path:
    convert(hf, folder / "neox", era=era_named(era), **options)
    return folder / "neox"


# ---- fixtures of the real GPT-NeoX, and trees


WRITTEN = {"2024_03": "2024-03", "2024_09": "2024-09"}


@pytest.mark.parametrize("era", ERA_NAMES)
@pytest.mark.parametrize("name", GPT_NEOX)
def test_every_fixture_in_every_tree(name: str, era: str, trees: Mapping[str, Path]) -> None:
    """Loads exactly where names and buffers are the tree's; the data and the tree agree."""
    checkpoint = opened(fixture(name))
    by_date = judge(checkpoint, target_named(f"neox@{era}"))
    by_tree = judge(checkpoint, target_named(f"neox:{trees[era]}"))
    wrote = next((e for part, e in WRITTEN.items() if part in name), "today")
    fits = {"2024-03": {"2024-03"}, "2024-09": {"2024-09"}, "today": {"2024-10", "today"}}
    assert by_date.answer == ("loads" if era in fits[wrote] else "fails")
    assert (by_tree.answer, by_tree.message) == (by_date.answer, by_date.message)
    assert codes(by_tree) == codes(by_date)


# as the real trees printed it, on CPU, for a model with TP 1: (written for, read by) to the words
SEEN = {
    ("2024-09", "2024-03"): f"{LAYER}{MISSING}",
    ("2024-03", "2024-09"): f"{LAYER}{UNEXPECTED}",
    ("today", "2024-03"): f'{LAYER}Missing key(s) in state_dict: "attention.rotary_emb.inv_freq", '
    f"{MLP['dense']}. \n\tUnexpected key(s) in state_dict: {MLP['linear']}. ",
    ("2024-03", "today"): f"{LAYER}Missing key(s) in state_dict: {MLP['linear']}. \n\tUnexpected "
    f'key(s) in state_dict: "attention.rotary_emb.inv_freq", {MLP["dense"]}. ',
    ("2024-09", "today"): f"{LAYER}Missing key(s) in state_dict: {MLP['linear']}. \n\tUnexpected "
    f"key(s) in state_dict: {MLP['dense']}. ",
    ("today", "2024-09"): f"{LAYER}Missing key(s) in state_dict: {MLP['dense']}. \n\tUnexpected "
    f"key(s) in state_dict: {MLP['linear']}. ",
}


@pytest.mark.parametrize(("wrote", "reads"), SEEN)
def test_the_message_is_the_one_that_gpt_neox_prints(
    hf: Path, tmp_path: Path, wrote: str, reads: str
) -> None:
    found = judged(neox(hf, tmp_path, wrote), f"neox@{reads}")
    assert found.answer == "fails"
    assert found.message == SEEN[wrote, reads]


def test_one_message_for_all_layers_where_a_rank_is_a_file(hf: Path, tmp_path: Path) -> None:
    root = neox(hf, tmp_path, "2024-09", pp=0)
    assert judged(root, "neox@2024-03").message == (
        "RuntimeError: Error(s) in loading state_dict for SequentialWrapper:\n\tMissing key(s) in "
        'state_dict: "sequential.2.attention.rotary_emb.inv_freq", '
        '"sequential.3.attention.rotary_emb.inv_freq". '
    )


@pytest.mark.parametrize("era", ERA_NAMES)
def test_what_is_converted_for_a_tree_loads_there(
    hf: Path, tmp_path: Path, era: str, trees: Mapping[str, Path]
) -> None:
    for tp, pp in ((1, 0), (2, 1), (4, 2)):
        root = neox(hf, tmp_path / f"{tp}{pp}", era, tp=tp, pp=pp)
        assert judged(root, f"neox:{trees[era]}").answer == "loads"


@pytest.mark.parametrize("era", ["2024-09", "2024-10", "today"])
def test_the_flag_of_the_yml_counts(hf: Path, tmp_path: Path, era: str) -> None:
    root = neox(hf, tmp_path, era, inv_freq="store")
    assert judged(root, f"neox@{era}").answer == "loads"
    edit_yml(root, rotary_save_freqs_buffer=None)
    without = judged(root, f"neox@{era}")
    assert without.message == f"{LAYER}{UNEXPECTED}"
    (case,) = [c for c in without.cases if c.finding.code == "inv-freq-unexpected"]
    assert "rotary_save_freqs_buffer: true" in case.finding.message
    other = neox(hf, tmp_path / "other", era)
    edit_yml(other, rotary_save_freqs_buffer=True)
    assert judged(other, f"neox@{era}").message == f"{LAYER}{MISSING}"


def test_a_patched_tree_takes_both(hf: Path, tmp_path: Path, trees: Mapping[str, Path]) -> None:
    pytest.importorskip("libcst")
    from neox_bridge.patch import patcher

    tree = Path(shutil.copytree(trees["2024-03"], tmp_path / "tree"))
    roots = [neox(hf, tmp_path / i, "2024-03", inv_freq=i) for i in ("omit", "store")]
    assert [judged(r, f"neox:{tree}").answer for r in roots] == ["fails", "loads"]
    patcher.apply(patcher.plan_patch(str(tree)))
    assert [judged(r, f"neox:{tree}").answer for r in roots] == ["loads", "loads"]


# ---- each rule of GPT-NeoX broken by itself


def test_a_key_in_two_ymls(hf: Path, tmp_path: Path) -> None:
    root = neox(hf, tmp_path)
    more = step_of(root) / "configs" / "zz.yml"
    more.write_text("num_layers: 2\n")
    found = judged(root, "today")
    assert found.message == (
        "ValueError: Conf file zz.yml has the following duplicate keys with previously loaded "
        "file: num_layers"
    )
    assert subjects(found).count("duplicate keys") == 1
    assert subjects(judged(root, "transformers")).count("duplicate keys") == 1
    more.write_text("num-layers: 2\n")  # GPT-NeoX compares before it replaces the dash
    assert judged(root, "today").answer == "loads"


def test_a_key_that_the_tree_doesn_t_know(
    hf: Path, tmp_path: Path, trees: Mapping[str, Path]
) -> None:
    root = neox(hf, tmp_path, "2024-03")
    edit_yml(root, rotary_save_freqs_buffer=True)
    found = judged(root, f"neox:{trees['2024-03']}")
    assert found.message == (
        "TypeError: NeoXArgs.__init__() got an unexpected keyword argument "
        "'rotary_save_freqs_buffer'"
    )
    assert codes(found) == {"yml-key-unknown"}


@pytest.mark.parametrize("pp", [0, 1])
def test_left_over_mp_rank_files(hf: Path, tmp_path: Path, pp: int) -> None:
    root = neox(hf, tmp_path, pp=pp)
    first = step_of(root) / "mp_rank_00_model_states.pt"
    larger = neox(hf, tmp_path / "larger", pp=pp, tp=2)
    shutil.copy(step_of(larger) / "mp_rank_01_model_states.pt", first.parent)
    done = CliRunner().invoke(app, ["doctor", str(root), "--json"])
    assert done.exit_code == 4, done.output
    (facts,) = json.loads(done.stdout)["checkpoints"]
    finding = next(f for f in facts["findings"] if f["code"] == "mp-rank-files")
    assert finding["prints"].startswith(
        "AssertionError: checkpoint count 2 is different from saved"
    )
    assert finding["remedy"] == f"rm {first.parent}/mp_rank_01_model_states.pt"
    (first.parent / "mp_rank_01_model_states.pt").unlink()
    assert judged(root, "today").answer == "loads"


@pytest.mark.parametrize(
    ("pp", "says", "prints"),
    [
        (1, 0, "TypeError: Expected state_dict to be dict-like, got <class 'NoneType'>."),
        (0, 1, "KeyError: 'module'"),
    ],
)
def test_the_other_kind_of_layout(
    hf: Path, tmp_path: Path, pp: int, says: int, prints: str
) -> None:
    root = neox(hf, tmp_path, pp=pp)
    edit_yml(root, pipe_parallel_size=says)
    found = judged(root, "today")
    assert (found.message, codes(found)) == (prints, {"layout-kind"})


def test_another_vocabulary_multiple(hf: Path, tmp_path: Path) -> None:
    root = neox(hf, tmp_path, vocab_multiple=128)
    edit_yml(root, make_vocab_size_divisible_by=512)
    assert judged(root, "today").message == (
        "RuntimeError: Error(s) in loading state_dict for EmbeddingPipe:\n\tsize mismatch for "
        "word_embeddings.weight: copying a param with shape torch.Size([384, 48]) from checkpoint, "
        "the shape in current model is torch.Size([512, 48])."
    )


@pytest.mark.parametrize(
    ("key", "value", "have"),
    [
        ("tokenizer_type", "GPT2BPETokenizer", "HFTokenizer"),
        ("make_vocab_size_divisible_by", 64, 128),
        ("model_parallel_size", 2, 1),
    ],
)
def test_args_that_differ(hf: Path, tmp_path: Path, key: str, value: Any, have: Any) -> None:
    root = neox(hf, tmp_path, vocab_multiple=128)
    edit_yml(root, **{key: value})
    found = judged(root, "today")
    message = f"AssertionError: {key} value from checkpoint ({have}) is not equal to the currently"
    assert any(c.prints.startswith(message) for c in found.cases)
    assert found.answer == "fails"


def test_a_plain_mlp_of_another_width(tmp_path: Path) -> None:
    source = make_hf(tmp_path / "hf", intermediate_size=200)
    root = neox(source, tmp_path)
    assert judged(root, "today").answer == "loads"
    edit_yml(root, intermediate_size=None)
    assert codes(judged(root, "today")) == {"mlp-width"}
    convert(source, tmp_path / "dense", era=era_named("today"), mlp_names="dense")
    found = judged(tmp_path / "dense", "neox@2024-09")
    assert found.message == f"{LAYER}" + "\n\t".join(
        f"size mismatch for mlp.{name}: copying a param with shape torch.Size({have}) from "
        f"checkpoint, the shape in current model is torch.Size({want})."
        for name, have, want in (
            ("dense_h_to_4h.weight", [200, 48], [192, 48]),
            ("dense_h_to_4h.bias", [200], [192]),
            ("dense_4h_to_h.weight", [48, 200], [48, 192]),
        )
    )


def test_without_biases_in_the_mlp(hf: Path, tmp_path: Path) -> None:
    root = neox(hf, tmp_path)
    whole = opened(root)
    config = replace(whole.config, mlp_bias=False)
    bare = replace(whole, config=config, raw={**whole.raw, "use_bias_in_mlp": False})
    assert codes(judge(bare, target_named("today"))) == {"mlp-biases"}
    assert "biases" in codes(judge(bare, target_named("neox@2024-09")))
    assert "biases" in codes(judge(replace(bare, raw=whole.raw), target_named("today")))


@pytest.mark.parametrize(
    ("mlp", "era", "severity", "code"),
    [
        ("dense", "today", "error", "gqa-order"),
        ("linear", "today", "warning", "gqa-order-unknown"),
        ("linear", "2024-10", "warning", "gqa-order-unknown"),
        ("dense", "2024-03", "error", ""),
    ],
)
def test_the_order_of_grouped_queries(
    hf: Path, tmp_path: Path, mlp: str, era: str, severity: str, code: str
) -> None:
    root = neox(hf, tmp_path, inv_freq="omit", mlp_names=mlp)
    whole = opened(root)
    told = () if mlp == "dense" else (unknown_order(),)
    grouped = replace(whole, raw={**whole.raw, "num_kv_heads": 2}, findings=told)
    found = codes(judge(grouped, target_named(f"neox@{era}")), severity)
    assert (code in found) if code else not any(c.startswith("gqa") for c in found)


def test_the_order_of_grouped_queries_can_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same shapes either way: unknown, until it is told; then told orders differ."""
    path = str(fixture("llama_gqa_fp32_2024_10_old_order_tp1"))
    cases = judge(open_checkpoint(path), target_named("today")).cases
    assert [c.finding.code for c in cases].count("gqa-order-unknown") == 1
    old = open_checkpoint(path, gqa_order="interleaved")
    assert "gqa-order" in codes(judge(old, target_named("today")), "error")
    assert not any(c.startswith("gqa") for c in codes(judge(old, target_named("neox@2024-10"))))
    words = ["diff", path, path, "--gqa-order", "interleaved", "-q"]
    with pytest.raises(SystemExit) as end:
        app(words, prog_name="neox-bridge")
    assert not end.value.code
    with pytest.raises(SystemExit) as end:
        app(
            ["doctor", path, "--for", "today", "--gqa-order", "interleaved"],
            prog_name="neox-bridge",
        )
    assert end.value.code == 4
    assert (
        "are by query head, and this GPT-NeoX reads them as all q, all k, all v"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("era", ERA_NAMES)
def test_the_epsilon_of_rmsnorm(hf: Path, tmp_path: Path, era: str) -> None:
    whole = opened(neox(hf, tmp_path, era))
    rms = replace(whole, raw={**whole.raw, "norm": "rmsnorm"})
    found = judge(rms, target_named(f"neox@{era}"))
    assert ("rms-epsilon" in codes(found, "warning")) == (era != "today")


def test_optimizer_states_and_finetune(hf: Path, tmp_path: Path) -> None:
    root = neox(hf, tmp_path)
    for written, remedy in ((True, ""), (False, "set finetune: true in the yml")):
        if not written:
            (root / "finetune.yml").unlink()
        cases = {case.finding.code: case.finding for case in judged(root, "today").cases}
        finding = cases["no-optimizer-states"]
        assert (finding.severity, finding.remedy) == ("info", remedy)
        assert ("finetune.yml beside it sets that" in finding.message) == written
    edit_yml(root, finetune=False)
    without = "TypeError: 'NoneType' object is not subscriptable"
    assert judged(root, "today").message == without
    states = step_of(root) / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states.write_bytes(b"")
    assert "optimizer-unreadable" in codes(judged(root, "today"), "warning")
    torch.save({"optimizer_state_dict": {"ds_version": "0.16.5"}}, states)
    assert "optimizer-states" in codes(judged(root, "today"), "info")
    edit_yml(root, finetune=True)
    assert not {"optimizer-states", "no-optimizer-states"} & codes(judged(root, "today"), "info")


def test_a_stored_inv_freq_that_deviates(hf: Path, tmp_path: Path) -> None:
    root = neox(hf, tmp_path, "2024-03")
    edit_yml(root, rotary_emb_base=20000)
    found = judged(root, "neox@2024-03")
    assert found.answer == "loads with warnings"
    assert codes(found, "warning") == {"inv-freq-differs"}


# ---- transformers


def test_both_spellings_load_everywhere(hf: Path) -> None:
    answers = {v.target: v.answer for v in judge_all(opened(hf))}
    assert answers.pop("transformers@5.4") == "loads with warnings"  # it saves another fraction
    assert set(answers.values()) == {"loads"}


@pytest.mark.parametrize(
    ("drop", "version", "answer"),
    [
        (("rotary_pct", "rotary_emb_base"), "4.48", "fails"),
        (("rotary_pct", "rotary_emb_base"), "5.5", "loads"),
        (("rope_parameters",), "4.48", "loads"),
        (("rope_parameters",), "5.5", "loads"),
    ],
)
def test_one_spelling_of_rope(
    hf: Path, tmp_path: Path, drop: tuple[str, ...], version: str, answer: str
) -> None:
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    edit_config(folder, drop)
    found = judged(folder, f"transformers@{version}")
    assert found.answer == answer
    if answer == "fails":
        assert "rotary_pct 0.25, and the model has 0.5" in found.message
        assert found.message.startswith("(nothing)")


def test_spellings_that_contradict(hf: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    edit_config(folder, rotary_emb_base=500)
    assert codes(judged(folder, "transformers@4.48")) == {"rope-spelling"}
    assert judged(folder, "transformers@5.24").answer == "loads"
    assert subjects(judged(folder, "transformers@4.48")).count("rotary settings") == 1
    assert subjects(judged(folder, "today")).count("rotary settings") == 1


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
def test_a_size_that_the_tensors_deny(hf: Path, tmp_path: Path, key: str) -> None:
    from transformers import GPTNeoXForCausalLM

    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    edit_config(folder, **{key: 400})
    found = judged(folder, "transformers")
    assert codes(found) == {"config-size"}
    assert "size mismatch for gpt_neox." in found.message
    with pytest.raises(RuntimeError):
        GPTNeoXForCausalLM.from_pretrained(folder)


def with_tensors(hf: Path, folder: Path, **more: torch.Tensor) -> Path:
    folder = Path(shutil.copytree(hf, folder))
    tensors = {**load_file(folder / "model.safetensors"), **more}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_mask_buffers(hf: Path, tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    name = "gpt_neox.layers.0.attention.bias"
    found = judged(with_tensors(hf, tmp_path / "hf", **{name: mask}), "transformers@4.48")
    assert "mask-buffers" in codes(found, "info")
    assert found.answer == "loads"


@pytest.mark.parametrize("version", ["4.34.1", "4.48"])
def test_a_stored_inv_freq_matters_until_4_34(hf: Path, tmp_path: Path, version: str) -> None:
    name = "gpt_neox.layers.0.attention.rotary_emb.inv_freq"
    folder = with_tensors(hf, tmp_path / "hf", **{name: torch.tensor([7.0, 1.0, 1.0])})
    found = judged(folder, f"transformers@{version}")
    assert ("inv-freq-stored" in codes(found, "warning")) == (version == "4.34.1")
    values = torch.from_numpy(inv_freq(opened(hf).config))
    right = with_tensors(hf, tmp_path / "right", **{name: values})
    assert judged(right, f"transformers@{version}").answer == "loads"


def test_the_head_under_its_new_name(hf: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = judged(folder, "transformers@4.48")
    assert codes(found) == {"head-name"}
    assert "are newly initialized: ['embed_out.weight']" in found.message
    assert judged(folder, "transformers@5.24").answer == "loads"


def test_no_biases_in_attention(tmp_path: Path) -> None:
    convert(make_hf(tmp_path / "a", attention_bias=False), tmp_path / "hf", to="hf")
    answers = [judged(tmp_path / "hf", f"transformers@{v}").answer for v in ("4.36", "4.37")]
    assert answers == ["fails", "loads"]
    edit_config(tmp_path / "hf", ("attention_bias",))
    assert codes(judged(tmp_path / "hf", "transformers@4.48")) == {"biases"}


def test_a_run_without_latest(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-NeoX does not look for steps: it trains from random weights."""
    run = neox(hf, tmp_path)
    assert judged(run, "neox@today").answer == "loads"
    (run / "latest").unlink()
    monkeypatch.chdir(tmp_path)
    for path in (run, run / "global_step0"):
        verdict = judged(path, "neox@today")
        assert verdict.answer == "loads with warnings"
        (one,) = [case for case in verdict.cases if case.finding.code == "latest-missing"]
        assert f"{run}/latest is missing" in one.finding.message
        assert one.prints.startswith(f"Unable to find latest file at {run}/latest, if trying")
    subprocess.run(str(one.finding.remedy), shell=True, check=True)
    assert judged(run, "neox@today").answer == "loads"


def test_dtypes_of_config(hf: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    edit_config(folder, ("torch_dtype",))
    assert "dtype-one-spelling" in codes(judged(folder, "transformers@4.48"), "info")
    assert "dtype-one-spelling" not in codes(judged(folder, "transformers@5.5"), "info")
    edit_config(folder, dtype="float16")
    assert codes(judged(folder, "transformers@5.5"), "warning") == {"config-dtype"}


def test_no_tokenizer_and_a_larger_one(hf: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    vocabulary = {f"t{i}": i for i in range(301)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    assert codes(judged(folder, "transformers"), "warning") == {"tokenizer-larger"}
    (folder / "tokenizer.json").unlink()
    assert "no-tokenizer" in codes(judged(folder, "transformers"), "info")
    (folder / "tokenizer.model").write_bytes(b"\x0a\x03\x0a\x01a" * 301)  # pieces of sentencepiece
    assert codes(judged(folder, "transformers"), "warning") == {"tokenizer-larger"}
    (folder / "tokenizer.model").write_bytes(b"\x0a\x03\x0a\x01a" * 299)
    assert "no-tokenizer" not in codes(judged(folder, "transformers"), "info")


# ---- the other framework, and what can't be


def test_the_other_kind_says_how_to_convert(hf: Path, tmp_path: Path) -> None:
    there = judged(hf, "neox@2024-03")
    assert there.answer == "fails"
    assert there.message.startswith("Unable to find latest file at ")
    assert f"convert {hf} {hf}-neox --for neox@2024-03" in there.cases[-1].finding.remedy
    back = judged(neox(hf, tmp_path), "transformers@4.48")
    assert back.message.startswith("OSError: ")
    edit_yml(tmp_path / "neox", pos_emb="none")
    assert "refused-pos_emb" in codes(judged(tmp_path / "neox", "transformers@4.48"))


def test_converted_by_the_command_that_it_names(hf: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hf, tmp_path / "model"))
    (case,) = [c for c in judged(source, "neox@2024-03").cases if c.finding.code == "other-kind"]
    done = CliRunner().invoke(app, shlex.split(case.finding.remedy)[1:])
    assert done.exit_code == 0, done.output
    assert judged(tmp_path / "model-neox", "neox@2024-03").answer == "loads"


REFUSED = [("pos_emb", "none"), ("activation", "softsign"), ("use_mup", True)]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_compare_can_t_be_exactly_where_convert_refuses(
    hf: Path, tmp_path: Path, key: str, value: Any
) -> None:
    root = neox(hf, tmp_path)
    assert not [row for row in compare(opened(root)) if row.answer == "cannot be"]
    edit_yml(root, **{key: value})
    checkpoint = opened(root)
    rows = [row for row in compare(checkpoint) if row.answer == "cannot be"]
    assert {row.note for row in rows} == {r.reason for r in checkpoint.refusals}
    assert rows
    done = CliRunner().invoke(app, ["convert", str(root), str(tmp_path / "out")])
    assert done.exit_code == 4


def test_compare_shows_a_refusal_of_any_key(hf: Path) -> None:
    refusal = Refusal("novelty", "nobody has it", "leave it out")
    rows = compare(replace(opened(hf), refusals=(refusal,)))
    assert [(r.feature, r.note) for r in rows if r.answer == "cannot be"] == [
        ("novelty", "nobody has it")
    ]


@pytest.mark.parametrize("name", [*GPT_NEOX, "hf"])
def test_compare_covers_every_feature(name: str, hf: Path) -> None:
    rows = compare(opened(hf if name == "hf" else fixture(name)))
    features = {row.feature for row in rows}
    assert {"RoPE base", "RoPE fraction", "RoPE tables", "norm", "norm epsilon"} <= features
    assert {"activation", "residual", "attention mask", "vocabulary", "dtype"} <= features
    tanh = [r for r in rows if r.feature == "activation" and r.answer == "translated"]
    assert bool(tanh) == ("fused_gelu" in name)


# ---- the command


def test_diagnose_is_for_the_target_that_it_was_made_for(hf: Path, tmp_path: Path) -> None:
    for era in ("2024-03", "2024-09", "today"):
        checkpoint = opened(neox(hf, tmp_path / era, era))
        assert own_target(checkpoint) == target_named(f"neox@{era}")
        assert not [f for f in diagnose(checkpoint) if f.severity == "error"]
    target: Target = target_named("neox@2024-03")
    assert [f for f in diagnose(checkpoint, target) if f.severity == "error"]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], 2),
        (["a", "--fix", "b", "--in-place"], 2),
        (["a", "b", "--in-place"], 2),
        (["a", "--recompute"], 2),
        (["a", "--for", "neox:/nowhere"], 2),
        (["/nowhere"], 1),
        (["HF"], 0),
        (["HF", "--for", "transformers"], 0),
        (["HF", "--for", "transformers@5.4"], 0),
        (["HF", "--for", "today"], 4),
        (["HF", "OLD"], 0),
        (["HF", "OLD", "--for", "today"], 4),
        (["OLD", "--for", "neox@2024-03", "--compare"], 0),
    ],
)
def test_exit_codes(hf: Path, tmp_path: Path, args: list[str], code: int) -> None:
    places = {"HF": str(hf), "OLD": str(neox(hf, tmp_path, "2024-03"))}
    words = [places.get(arg, arg) for arg in args]
    assert CliRunner().invoke(app, ["doctor", *words]).exit_code == code
    if code in (0, 4):
        done = CliRunner().invoke(app, ["doctor", *words, "--json"])
        assert done.exit_code == code
        facts = json.loads(done.stdout)
        assert facts["schema_version"] == 1
        assert all(c["findings"] and c["verdicts"] for c in facts["checkpoints"])
        assert done.stderr == ""


def test_the_page_is_for_people(hf: Path, tmp_path: Path) -> None:
    root = neox(hf, tmp_path, "2024-03")
    text = CliRunner().invoke(app, ["doctor", str(root), "--for", "today", "--compare"]).stdout
    assert "neox@today: fails\n    RuntimeError: Error(s) in loading state_dict" in text
    assert (
        f"\n  fix         neox-bridge doctor {root} --for neox@today --fix {root}-fixed\n" in text
    )
    assert "RoPE base" in text
    assert "written by neox-bridge" in text


def test_the_comparison_fits_80_columns(hf: Path, tmp_path: Path) -> None:
    checkpoint = opened(hf)
    words = ["doctor", str(hf), "--compare"]
    text = CliRunner(env={"COLUMNS": "80"}).invoke(app, words).stdout.split("\n\n")[-1]
    assert max(map(len, text.splitlines())) <= 80
    heads = [line for line in text.splitlines() if not line.startswith(" ")]
    assert heads == ["same in GPT-NeoX and transformers:", "translated by convert:"]
    flat = " ".join(text.split())
    for row in compare(checkpoint):
        for part in (row.feature, row.neox, row.transformers, row.note):
            assert part in flat
    facts = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    keys = {"feature", "neox", "transformers", "answer", "note"}
    assert {*facts["checkpoints"][0]["comparison"][0]} == keys


def test_mamba_is_compared_without_attention() -> None:
    checkpoint = open_checkpoint(str(TESTS / "data" / "mamba" / "checkpoints"))
    features = {row.feature: row for row in compare(checkpoint)}
    assert features["norm"].neox == "rmsnorm: x / sqrt(var + eps)"
    assert features["bias of the convolution"].neox == "yes"
    assert not features.keys() & {"RoPE base", "query, key, value", "activation", "inv_freq"}


def test_a_pasted_traceback() -> None:
    pytest.importorskip("neox_bridge.doctor.explain")
    text = f"Traceback (most recent call last):\n{LAYER}{MISSING}\n"
    done = CliRunner().invoke(app, ["doctor", "--error", "-"], input=text)
    assert done.exit_code == 0, done.output
    assert "  fix  " in done.stdout
    facts = CliRunner().invoke(app, ["doctor", "--error", "-", "--json"], input=text)
    assert json.loads(facts.stdout)["error"][0]["remedy"]
    assert CliRunner().invoke(app, ["doctor", "--error", "-"], input="all is well").exit_code == 1


# ---- convert --for


@pytest.mark.parametrize("era", ERA_NAMES)
def test_convert_for_a_tree_is_convert_for_its_time(
    hf: Path, tmp_path: Path, era: str, trees: Mapping[str, Path]
) -> None:
    places = {"date": f"neox@{era}", "tree": f"neox:{trees[era]}"}
    for name, target in places.items():
        done = CliRunner().invoke(app, ["convert", str(hf), str(tmp_path / name), "--for", target])
        assert done.exit_code == 0, done.output
    files = [neox_files(tmp_path / name) for name in places]
    assert sorted(files[0]) == sorted(files[1])
    layer = "layer_02-model_00-model_states.pt"
    assert list(files[0][layer]) == list(files[1][layer])
    assert neox_config(tmp_path / "date") == neox_config(tmp_path / "tree")


def test_convert_takes_a_tree_s_own_keys(
    hf: Path, tmp_path: Path, trees: Mapping[str, Path]
) -> None:
    tree = Path(shutil.copytree(trees["today"], tmp_path / "tree"))
    args = tree / "megatron/neox_arguments/neox_args.py"
    text = args.read_text()
    old = "    train_iters: int = None\n"
    assert old in text
    args.write_text(text.replace(old, ""))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["convert", str(hf), str(out), "--for", f"neox:{tree}"])
    assert done.exit_code == 0, done.output
    assert "train_iters" not in neox_config(out)
    assert judged(out, f"neox:{tree}").answer == "loads"


@pytest.mark.parametrize("tree", ["2024-03", "2024-09"])
def test_convert_refuses_what_a_tree_can_t_hold(
    tmp_path: Path, tree: str, trees: Mapping[str, Path]
) -> None:
    wide = make_hf(tmp_path / "wide", intermediate_size=200)
    target = f"neox:{trees[tree]}"
    done = CliRunner().invoke(app, ["convert", str(wide), str(tmp_path / "o"), "--for", target])
    assert done.exit_code == 4
    assert "four times" in done.stderr


def test_convert_refuses_a_plain_mlp_without_biases(hf: Path, tmp_path: Path) -> None:
    from neox_bridge.api import plan as make_plan
    from neox_bridge.errors import Refused
    from neox_bridge.planning.options import Options

    whole = opened(neox(hf, tmp_path))
    kept = {k: v for k, v in whole.tensors.items() if ".mlp." not in k or "weight" in k}
    config = replace(whole.config, mlp_bias=False)
    raw = {**whole.raw, "use_bias_in_mlp": False}
    bare = replace(whole, config=config, tensors=kept, raw=raw)
    for era in (None, era_named("2024-09")):
        with pytest.raises(Refused, match=r"use_bias_in_mlp.*every GPT-NeoX"):
            make_plan(bare, Options(to="neox", era=era), "out")


def test_convert_for_transformers(hf: Path, tmp_path: Path) -> None:
    root, out = neox(hf, tmp_path), tmp_path / "out"
    args = ["convert", str(root), str(out), "--for", "transformers@4.48"]
    assert CliRunner().invoke(app, args).exit_code == 0
    assert judged(out, "transformers@4.48").answer == "loads"
    assert CliRunner().invoke(app, [*args, "--to", "neox"]).exit_code == 2
    bare = make_hf(tmp_path / "bare", attention_bias=False)
    args = ["convert", str(bare), str(tmp_path / "b"), "--for", "transformers@4.30"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 4
    assert "4.37" in done.stderr


def test_the_gelu_of_pythia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both verbs say that the result is right. The text suits doctor too, which writes nothing."""
    from neox_bridge.architectures import shapes

    model = make_hf(tmp_path / "hf", hidden_act="gelu")
    config = opened(model).config
    size = shapes.ModelSize(config.layers, config.hidden, config.heads, config.dims["vocab"])
    monkeypatch.setitem(shapes.PYTHIA, "pythia-tiny", size)
    words = {
        "doctor": ["doctor", str(model)],
        "convert": ["convert", str(model), str(tmp_path / "neox"), "--to", "neox", "--dry-run"],
    }
    for name, command in words.items():
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, name
        assert "computes the same as this Hugging Face model" in done.output, name
        assert "logits of the two forms differ by about 1e-3" in done.output, name
        assert "is written" not in done.output, name
