"""Options that do not apply, and patterns that match nothing: one usage error, exit code 2."""

import os
import pickle
from pathlib import Path

import pytest
from click.testing import CliRunner
from common import fixture, make_hf

import neox_bridge
from neox_bridge.cli.app import app
from neox_bridge.cli.convert import convert
from neox_bridge.cli.errors import flag
from neox_bridge.errors import UsageError
from neox_bridge.planning.options import SIDES, Options

NEOX = str(fixture("pythia_fp32_pp1_tp2"))
VALUES = {
    "tp": "2",
    "pp": "1",
    "layout": "layers",
    "inv_freq": "omit",
    "mlp_names": "linear",
    "era": "today",
    "row_bias": "whole",
    "vocab_multiple": "128",
    "te": None,
    "optimizer": "fresh",
    "dp": "2",
    "iteration": "3",
    "shard_size": "5GB",
    "shards": "size",
    "format": "transformers",
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_hf(tmp_path_factory.mktemp("usage") / "hf"))


def fails(args: list[str], *words: str) -> str:
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2, (args, done.output)
    assert done.stdout == ""
    line = done.stderr
    assert line.startswith("error: "), line
    assert line.count("\n") == 1, line
    for word in words:
        assert word in line, line
    return line


@pytest.mark.parametrize("command", ["convert", "batch"])
@pytest.mark.parametrize("source", ["hf", "neox"])
@pytest.mark.parametrize("name", SIDES)
def test_every_option_of_the_other_side(
    command: str, source: str, name: str, hf: str, tmp_path: Path
) -> None:
    """Also where its value is the default, and where the target's kind is chosen by default."""
    kind = "hf" if SIDES[name] == "neox" else "neox"
    path = {"hf": hf, "neox": NEOX}[source]
    words = [flag(name), *([VALUES[name]] if VALUES[name] else [])]
    args = [command, path, str(tmp_path / "out"), *map(str, words)]
    if name == "format" and source == "hf":
        args += ["--to", kind]  # alone it chooses Hugging Face
    if source == kind:
        args += ["--to", kind]
    fails(args, f"error: {flag(name)}: only for ", f"--to {SIDES[name]}")
    assert not (tmp_path / "out").exists()


def test_the_sides_name_options() -> None:
    assert set(SIDES) == set(VALUES)
    known = {param.name for param in convert.params}
    assert set(SIDES) <= known & set(Options.__dataclass_fields__)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["convert", "HF", "OUT", "--step", "0"], "--step: only for GPT-NeoX sources"),
        (["convert", "HF", "OUT", "--config", "a.yml"], "--config: only for GPT-NeoX sources"),
        (["convert", "HF", "OUT", "--revision", "main"], "--revision: only for models on the Hub"),
        (["convert", "org/name", "OUT", "--step", "3"], "--revision"),
        (["convert", "NEOX/global_step2", "OUT", "--step", "3"], "--step: "),
        (["convert", "HF", "OUT", "--layout", "ranks", "--pp", "2"], "--layout, --pp: "),
        (["convert", "HF", "OUT", "--layout", "layers", "--pp", "0"], "--layout, --pp: "),
        (["convert", "HF", "OUT", "--dp", "1"], "--dp: "),
        (["convert", "HF", "OUT", "--private", "--work", "."], "--private, --work: "),
        (["convert", "NEOX", "OUT", "--create-pr"], "--create-pr: "),
        (["convert", "HF", "OUT", "--gqa-order", "grouped"], "--gqa-order: "),
        (["convert", "HF", "OUT", "--to", "hf", "--gqa-order", "grouped"], "--gqa-order: "),
        (["convert", "HF", "OUT", "--weights", "masters"], "--weights: "),
        (["convert", "HF", "OUT", "--to", "hf", "--weights", "masters"], "--weights: "),
        (["convert", "NEOX", "OUT", "--to", "neox", "--weights", "masters"], "--weights: "),
        (["convert", "NEOX", "OUT", "--crc"], "--crc: "),
        (["convert", "MAMBA", "OUT", "--inv-freq", "store"], "--inv-freq: "),
        (["convert", "HF", "OUT", "--for", "transformers@4.48", "--to", "neox"], "--for: "),
        (["batch", "NEOX", "OUT", "--steps", "5"], "--steps: no step 5. Available steps: 2"),
        (["batch", "NEOX", "OUT", "--steps", "2,5-9"], "--steps: 5-9 matches no step"),
        (["batch", "NEOX", "OUT", "--steps", "few"], "--steps: 'few'"),
        (["batch", "NEOX", "OUT", "--steps", "2,all"], "--steps: 'all'"),
        (["batch", "NEOX", "OUT", "--steps", "few", "--watch"], "--steps: 'few'"),
        (["batch", "NEOX", "OUT", "--interval", "5"], "--interval: "),
        (["batch", "NEOX", "OUT", "--address", "auto"], "--address: "),
        (["batch", "NEOX", "OUT", "--private"], "--private: "),
        (["batch", "HF", "OUT", "--config", "a.yml"], "--config: "),
        (["reshard", "NEOX", "OUT", "--gqa-order", "grouped"], "--gqa-order: "),
        (["reshard", "NEOX", "OUT", "--layout", "ranks", "--pp", "2"], "--layout, --pp: "),
        (["export-optimizer", "NEOX", "OUT", "--gqa-order", "grouped"], "--gqa-order: "),
        (["verify", "HF", "--optimizer"], "--optimizer: "),
        (["verify", "HF", "--logits"], "--logits: "),
        (["verify", "HF", "NEOX", "--device", "cpu"], "--device: only for --logits"),
        (["verify", "HF", "NEOX", "--tokens", "a"], "--tokens: only for --logits"),
        (["verify", "HF", "NEOX", "--optimizer"], "--optimizer: "),
        (["verify", "HF", "NEOX", "--gqa-order", "grouped"], "--gqa-order: "),
        (["diff", "HF", "NEOX", "--optimizer"], "--optimizer: "),
        (["diff", "HF", "HF", "--stat", "--all"], "--stat, --all: "),
        (["diff", "HF", "HF", "--gqa-order", "grouped"], "--gqa-order: "),
        (["inspect", "HF", "--step", "3"], "--step: "),
        (["inspect", "HF", "--optimizer"], "--optimizer: "),
        (["inspect", "HF", "--max-workers", "2"], "--max-workers: "),
        (["inspect", "HF", "--security", "--optimizer"], "--optimizer: "),
        (["inspect", "HF", "--security", "--step", "0"], "--step: "),
        (["doctor", "HF", "--step", "3"], "--step: "),
        (["doctor", "HF", "--gqa-order", "grouped"], "--gqa-order: "),
        (["doctor", "HF", "--recompute"], "--recompute: only for --fix and --in-place"),
        (["doctor", "HF", "--fix", "OUT", "--compare"], "--compare: "),
        (["doctor", "HF", "HF", "--in-place"], "--in-place: "),
        (["doctor", "--error", "-", "--compare"], "--compare: only for a checkpoint"),
    ],
)
def test_other_options_that_do_not_apply(
    args: list[str], words: str, hf: str, tmp_path: Path
) -> None:
    if "MAMBA" in args:
        make_hf(tmp_path / "mamba", family="mamba")
    places = {
        "HF": hf,
        "NEOX": NEOX,
        "OUT": str(tmp_path / "out"),
        "MAMBA": str(tmp_path / "mamba"),
    }
    given = [
        os.path.join(places.get(arg.split("/")[0], arg.split("/")[0]), *arg.split("/")[1:])
        for arg in args
    ]
    fails(given, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["layers.1", "nothing*", "*.Bias"])
@pytest.mark.parametrize("command", ["diff", "inspect", "plot"])
def test_a_pattern_that_matches_nothing(
    command: str, pattern: str, hf: str, tmp_path: Path
) -> None:
    args = {
        "diff": ["diff", hf, NEOX, "--stat"],
        "inspect": ["inspect", hf, "--json"],
        "plot": ["inspect", hf, "--stats"],
    }[command]
    line = fails([*args, "--tensor", pattern], "--tensor", repr(pattern))
    if pattern == "layers.1":
        assert "'*layers.1*'" in line
        done = CliRunner().invoke(app, [*args, "--tensor", "*layers.1*"])
        assert done.exit_code in (0, 3)


ORDERS = [
    ["--fix", "--in-place", "DIR"],
    ["DIR", "--fix", "--in-place"],
    ["--in-place", "DIR", "--fix", "--recompute"],
    ["--for", "--fix", "DIR"],
    ["DIR", "--in-place", "--fix", "OUT"],
    ["--fix", "OUT", "--in-place", "DIR"],
    ["--fix", "OUT", "DIR", "--in-place"],
    ["--in-place", "--fix", "OUT", "DIR"],
    ["--in-place", "--fix", "DIR"],
    ["--fix", "DIR"],
    ["--fix"],
]


@pytest.mark.parametrize("order", ORDERS)
def test_no_option_is_taken_for_a_folder(
    order: list[str], hf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["doctor", *({"DIR": hf}.get(word, word) for word in order)])
    assert done.exit_code == 2, done.output
    assert os.listdir(tmp_path) == []


def test_a_folder_named_like_an_option(
    hf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["convert", hf, "out", "--tokenizer", "--overwrite"])
    assert done.exit_code == 2
    assert "--tokenizer: needs a value, and --overwrite is another option" in done.stderr
    done = CliRunner().invoke(app, ["toy", "pythia-70m", "--as=hf", "--layers=1", "--", "--as"])
    assert done.exit_code == 0, done.output
    assert os.listdir(tmp_path) == ["--as"]


def test_in_python() -> None:
    error = UsageError(["shard_size", "era"], "they do not apply", "Leave them out.")
    assert str(error) == "shard_size, era: they do not apply. Leave them out."
    assert error.spelled(flag) == "--shard-size, --for: they do not apply. Leave them out."
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.parameters) == (str(error), error.parameters)
    checkpoint = neox_bridge.open_checkpoint(NEOX)
    with pytest.raises(UsageError) as raised:
        neox_bridge.plan(checkpoint, Options(tp=2), "out")
    assert raised.value.parameters == ("tp",)
    assert isinstance(raised.value, neox_bridge.BridgeError)
