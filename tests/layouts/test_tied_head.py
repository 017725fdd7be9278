"""An output head in the files of a model whose config ties it to the embeddings."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from common import (
    convert,
    fixture,
    hf_logits,
    hf_tensors,
    make_hf,
    neox_config,
    plan_of,
    same_bits,
    step_of,
)
from mamba_ssm_model import save as save_mamba_ssm
from safetensors.torch import save_file

from neox_bridge.api import open_checkpoint
from neox_bridge.architectures import ARCHITECTURES, complete
from neox_bridge.cli.app import app
from neox_bridge.errors import ChoiceNeeded, UsageError
from neox_bridge.layouts import same_values
from neox_bridge.layouts.head import decide_head, head_relation
from neox_bridge.verification.diff import diff
from neox_bridge.verification.verify import verify

RUNNER = CliRunner()
FAMILIES = (
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "mamba",
    "olmo",
    "gpt_bigcode",
    "stablelm",
    "phi3",
    "starcoder2",
    "glm",
)
HEADS = {
    "gpt_neox": ("embed_out.weight", "gpt_neox.embed_in.weight"),
    "gpt_bigcode": ("lm_head.weight", "transformer.wte.weight"),
    "mamba": ("lm_head.weight", "backbone.embeddings.weight"),
}
TOKENS = torch.arange(1, 17)[None]


def names(family: str) -> tuple[str, str]:
    return HEADS.get(family, ("lm_head.weight", "model.embed_tokens.weight"))


def two_heads(folder: Path, family: str = "gpt_neox", **config: Any) -> Path:
    """A tied config beside an untied model's weights, as LoRA merges leave them."""
    make_hf(folder, family=family, tie_word_embeddings=False, **config)
    return edit(folder, tie_word_embeddings=True)


def edit(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def run(*args: object) -> Any:
    return RUNNER.invoke(app, [str(arg) for arg in args])


def commands(text: str) -> list[list[str]]:
    """The words of each command that a message names, without the program."""
    return [shlex.split(found)[1:] for found in re.findall(r"`(neox-bridge .*?)`", text)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", ["neox", "hf"])
def test_a_head_that_differs_is_refused_and_both_ways_out_work(
    family: str, to: str, tmp_path: Path
) -> None:
    source = two_heads(tmp_path / "my model", family)
    refused = run("convert", source, tmp_path / "out", "--to", to, "--dtype", "float32")
    assert refused.exit_code == 4
    assert not (tmp_path / "out").exists()
    head, embeddings = names(family)
    assert head in refused.stderr
    assert "tie_word_embeddings" in refused.stderr
    keep, tie = commands(refused.stderr)
    assert (keep[-2:], tie[-2:]) == (["--head", "keep"], ["--head", "tie"])

    kept = run(*keep)
    assert kept.exit_code == 0, kept.stderr
    written = tmp_path / "out"
    if to == "neox":
        assert neox_config(written)["no_weight_tying"] is True
        assert run("convert", written, tmp_path / "back").exit_code == 0
        written = tmp_path / "back"
    config = json.loads((written / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert torch.equal(hf_logits(source, TOKENS), hf_logits(written, TOKENS))
    checked = run("verify", source, tmp_path / "out", *(["--logits"] if family != "mamba" else []))
    assert checked.exit_code == 0, checked.output

    tie[2] = str(tmp_path / "tied")
    tied = run(*tie)
    assert tied.exit_code == 0, tied.stderr
    assert "warning" in tied.stderr
    assert head in tied.stderr
    found = open_checkpoint(str(tmp_path / "tied"))
    assert found.config.tied_embeddings
    assert head not in found.tensors
    assert embeddings in found.tensors
    assert found.record["head"] == "tie"
    checked = run("verify", source, tmp_path / "tied")
    assert checked.exit_code == 0, checked.output
    assert "--head tie" in checked.stderr
    # without the record nobody knows that this was asked for
    record = next((tmp_path / "tied").rglob("neox_bridge.json"))
    record.write_text(json.dumps({**json.loads(record.read_text()), "head": "keep"}))
    checked = run("verify", source, tmp_path / "tied")
    assert checked.exit_code == 3
    assert head in checked.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_classes_tie_by_default_as_we_read_them(family: str) -> None:
    from transformers import AutoConfig

    architecture = next(a for a in ARCHITECTURES if a.name == family)
    told = complete({"model_type": family})
    default = AutoConfig.for_model(family).tie_word_embeddings
    assert bool(told.get("tie_word_embeddings")) is default, architecture.name


def test_a_config_that_says_nothing_ties_where_the_class_does(tmp_path: Path) -> None:
    folder = two_heads(tmp_path / "hf", "mamba")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    with pytest.raises(ChoiceNeeded):
        plan_of(folder, tmp_path / "neox")


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_head_that_equals_the_embeddings_is_dropped(family: str, tmp_path: Path) -> None:
    source = two_heads(tmp_path / "hf", family)
    head, embeddings = names(family)
    tensors = hf_tensors(source)
    store(source, {**tensors, head: tensors[embeddings].clone()})
    plan = convert(source, tmp_path / "neox", tp=2)
    assert [drop.name for drop in plan.dropped] == [head]
    assert not any(finding.severity == "warning" for finding in plan.findings)
    target = open_checkpoint(str(tmp_path / "neox"))
    assert target.config.tied_embeddings
    assert verify(open_checkpoint(str(source)), target).holds
    # who asks for it gets both
    convert(source, tmp_path / "untied", head="keep")
    untied = open_checkpoint(str(tmp_path / "untied"))
    assert not untied.config.tied_embeddings
    assert verify(open_checkpoint(str(source)), untied).holds


@pytest.mark.parametrize("place", ["first", "last"])
def test_one_value_of_one_row_is_a_difference(place: str, tmp_path: Path) -> None:
    """Also where the matrices are larger than the blocks in which they are compared."""
    source = two_heads(tmp_path / "hf", "llama", vocab_size=9000)
    tensors = hf_tensors(source)
    head = tensors["model.embed_tokens.weight"].clone()
    assert head.nbytes > 2 * same_values.BLOCK_BYTES
    head.view(-1)[0 if place == "first" else -1] += 1e-6
    store(source, {**tensors, "lm_head.weight": head})
    assert head_relation(open_checkpoint(str(source))) == "differs"
    partly = head_relation(open_checkpoint(str(source)), same_values.BLOCK_BYTES)
    assert partly == ("differs" if place == "first" else "unknown")


def test_rows_that_only_one_of_them_has_do_not_count(tmp_path: Path) -> None:
    source = two_heads(tmp_path / "hf")
    tensors = hf_tensors(source)
    embeddings = tensors["gpt_neox.embed_in.weight"]
    padded = torch.cat([embeddings, torch.randn(20, embeddings.shape[1])])
    store(source, {**tensors, "embed_out.weight": padded})
    plan = convert(source, tmp_path / "neox")
    assert [drop.name for drop in plan.dropped] == ["embed_out.weight"]
    store(source, {**tensors, "embed_out.weight": padded + 1})
    with pytest.raises(UsageError, match="shape"):
        plan_of(source, tmp_path / "untied", head="keep")


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_dtypes_are_widened_before_they_are_compared(
    dtypes: tuple[str, str], tmp_path: Path
) -> None:
    source = two_heads(tmp_path / "hf")
    tensors = hf_tensors(source)
    first, second = (getattr(torch, name) for name in dtypes)
    # powers of two are the same in every dtype
    rows = torch.randint(-3, 3, tensors["embed_out.weight"].shape).float().exp2()
    tensors |= {"gpt_neox.embed_in.weight": rows.to(first), "embed_out.weight": rows.to(second)}
    store(source, tensors)
    assert head_relation(open_checkpoint(str(source))) == "equal"
    more = rows + 2**-8  # more digits than bfloat16 has
    tensors |= {"gpt_neox.embed_in.weight": more.to(first), "embed_out.weight": more.to(second)}
    store(source, tensors)
    assert head_relation(open_checkpoint(str(source))) == "differs"


def test_shared_storages_of_a_bin_are_equal_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = two_heads(tmp_path / "hf")
    tensors = hf_tensors(source)
    (source / "model.safetensors").unlink()
    shared = {**tensors, "embed_out.weight": tensors["gpt_neox.embed_in.weight"]}
    torch.save(shared, source / "pytorch_model.bin")
    monkeypatch.setattr(same_values, "relation", None)  # nothing may be read
    assert [drop.name for drop in plan_of(source, tmp_path / "neox").dropped] == [
        "embed_out.weight"
    ]


def test_a_strided_head_of_a_bin_is_compared(tmp_path: Path) -> None:
    source = two_heads(tmp_path / "hf")
    tensors = hf_tensors(source)
    (source / "model.safetensors").unlink()
    head = tensors["gpt_neox.embed_in.weight"].t().contiguous().t()
    torch.save({**tensors, "embed_out.weight": head}, source / "pytorch_model.bin")
    assert head_relation(open_checkpoint(str(source))) == "equal"
    other = head.clone(memory_format=torch.preserve_format)
    other[-1, -1] += 1
    assert not other.is_contiguous()
    torch.save({**tensors, "embed_out.weight": other}, source / "pytorch_model.bin")
    assert head_relation(open_checkpoint(str(source))) == "differs"


def test_a_head_alone_stands_for_both(tmp_path: Path) -> None:
    """safetensors saves shared tensors under one name; transformers ties to the one it finds."""
    source = two_heads(tmp_path / "hf", "llama")
    tensors = hf_tensors(source)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "neox", tp=2)
    convert(tmp_path / "neox", tmp_path / "back")
    assert torch.equal(hf_logits(source, TOKENS), hf_logits(tmp_path / "back", TOKENS))


def test_the_head_of_a_shard_is_found(tmp_path: Path) -> None:
    source = two_heads(tmp_path / "hf")
    convert(source, tmp_path / "sharded", to="hf", head="keep", shard_size=100_000)
    edit(tmp_path / "sharded", tie_word_embeddings=True)
    with pytest.raises(ChoiceNeeded):
        plan_of(tmp_path / "sharded", tmp_path / "neox")


@pytest.mark.parametrize("choice", ["keep", "tie"])
def test_a_choice_that_does_not_apply_is_a_usage_error(choice: str, tmp_path: Path) -> None:
    untied = make_hf(tmp_path / "untied")
    tied = make_hf(tmp_path / "tied", tie_word_embeddings=True)
    for source in (untied, tied, fixture("pythia_fp32_pp1_tp2")):
        done = run("convert", source, tmp_path / "out", "--head", choice)
        assert done.exit_code == 2, done.output
        assert not (tmp_path / "out").exists()


def test_batch_takes_the_choice(tmp_path: Path) -> None:
    two_heads(tmp_path / "run" / "step1")
    two_heads(tmp_path / "run" / "step2", seed=1)
    refused = run("batch", tmp_path / "run", tmp_path / "out", "--retries", "0")
    assert refused.exit_code == 1
    assert "--head keep" in refused.stderr
    done = run("batch", tmp_path / "run", tmp_path / "out", "--head", "keep")
    assert done.exit_code == 0, done.output
    for step in ("step1", "step2"):
        assert not open_checkpoint(str(tmp_path / "out" / step)).config.tied_embeddings


def test_inspect_diff_and_audit_say_it(tmp_path: Path) -> None:
    two_heads(tmp_path / "run" / "step1")
    inspected = run("inspect", tmp_path / "run" / "step1")
    assert "a different output head" in inspected.stdout
    facts = json.loads(run("inspect", tmp_path / "run" / "step1", "--json").stdout)
    assert facts["stored_head"] == "differs"
    tied = make_hf(tmp_path / "tied", tie_word_embeddings=True)
    first, second = (open_checkpoint(str(p)) for p in (tmp_path / "run" / "step1", tied))
    kinds = {found.name: found.kind for found in diff(first, second)}
    assert kinds["embed_out.weight"] == "only-first"
    audited = run("audit", tmp_path / "run", "--json")
    assert "head-differs" in audited.stdout
    assert audited.exit_code == 3


def test_doctor_says_which_version_computes_what(tmp_path: Path) -> None:
    source = two_heads(tmp_path / "hf")
    texts, ways = {}, []
    for version in ("4.48", "5.0", "5.24"):
        done = run("doctor", source, "--json", "--for", f"transformers@{version}")
        told = json.loads(done.stdout)
        (case,) = (f for f in told["checkpoints"][0]["findings"] if f["code"] == "head-differs")
        texts[version] = case["message"]
        (way,) = re.findall(r"neox-bridge (convert \S+ \S+ --to hf --head keep)", case["remedy"])
        assert "--head tie the tied one" in case["message"]
        ways = [way, way.replace("--head keep", "--head tie")]
    for command in ways:
        words = shlex.split(command)
        words[2] += words[-1]
        assert run(*words).exit_code == 0
    assert len(ways) == 2
    assert "alone" in texts["4.48"]
    assert "both, as an untied model" in texts["5.0"]
    assert "both, as an untied model" in texts["5.24"]


def test_doctor_fix_names_a_command_that_works(tmp_path: Path) -> None:
    source = two_heads(tmp_path / "hf")
    refused = run("doctor", source, "--fix", tmp_path / "fixed")
    assert refused.exit_code == 4
    for words in commands(refused.stderr):
        words[2] += words[-1]
        assert run(*words).exit_code == 0


def test_mamba_ssm_has_its_own_word_for_it(tmp_path: Path) -> None:
    words: dict[str, Any] = {"d_model": 40, "n_layer": 2, "vocab_size": 300}
    source = save_mamba_ssm(tmp_path / "ssm", **words, tie_embeddings=False)
    edit(source, tie_embeddings=True)
    with pytest.raises(ChoiceNeeded, match="one matrix"):
        plan_of(source, tmp_path / "hf", to="hf")
    convert(source, tmp_path / "same", format="mamba_ssm", head="keep")
    assert json.loads((tmp_path / "same" / "config.json").read_text())["tie_embeddings"] is False
    for other in ("hf", "neox"):
        convert(source, tmp_path / other, to=other, head="keep")
        assert verify(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / other))).holds


def test_a_gpt_neox_yml_that_denies_a_stored_head(tmp_path: Path) -> None:
    """GPT-NeoX skips the file of the head when no_weight_tying is false, which is its default."""
    root = tmp_path / "neox"
    convert(make_hf(tmp_path / "hf"), root, tp=2)
    (path,) = (step_of(root) / "configs").glob("*.yml")
    told = yaml.safe_load(path.read_text())
    del told["no_weight_tying"]
    path.write_text(yaml.safe_dump(told))
    refused = run("convert", root, tmp_path / "back")
    assert refused.exit_code == 4
    assert "no_weight_tying" in refused.stderr
    keep, tie = commands(refused.stderr)
    assert run(*keep).exit_code == 0
    back = hf_tensors(tmp_path / "back")
    assert same_bits(back["embed_out.weight"], hf_tensors(tmp_path / "hf")["embed_out.weight"])
    tie[2] = str(tmp_path / "tied")
    assert run(*tie).exit_code == 0
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["tie_word_embeddings"]
    for target in ("back", "tied"):
        assert run("verify", root, tmp_path / target, "--logits").exit_code == 0


def test_deciding_is_left_to_the_user(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(two_heads(tmp_path / "hf")))
    with pytest.raises(ChoiceNeeded) as raised:
        decide_head(checkpoint, None)
    assert raised.value.parameter == "head"
    assert set(raised.value.effects) == {"keep", "tie"}
    assert raised.value.source == checkpoint.path
