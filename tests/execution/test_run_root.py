"""What stands beside the steps of a run fits the step that `latest` names, or it is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from click.testing import CliRunner
from common import convert, fixture, make_hf, plan_of

from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError, Refused
from neox_bridge.execution.execute import execute

OTHER = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 96}


def tokenizer(folder: Path, mark: str, words: int = 200) -> None:
    vocab = {"<|endoftext|>": 0, **{f"{mark}{number}": number for number in range(1, words)}}
    value = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(value))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    tokenizer(make_hf(tmp_path / "one", num_hidden_layers=1), "w")
    tokenizer(make_hf(tmp_path / "two", num_hidden_layers=1, **OTHER), "z")
    return tmp_path


def run(source: Path, target: object, overwrite: bool = False, **options: Any) -> list[str]:
    """The codes of what was noticed."""
    plan = plan_of(source, Path(str(target)), to="neox", **options)
    return [f.code for f in execute(plan, str(target), overwrite=overwrite).findings]


def yml(root: Path, name: str = "finetune.yml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((root / name).read_text())
    return found


def consistent(root: Path) -> bool:
    step = root / (root / "latest").read_text()
    told = yml(step / "configs", "neox_bridge.yml")
    start = yml(root)
    return all(start[key] == value for key, value in told.items())


@pytest.mark.parametrize("hashes", ["xxh3_128", "sha256", None])
@pytest.mark.parametrize(
    "options", [{"tp": 1}, {"tp": 4}, {"layout": "ranks", "tp": 2}, {"dtype": "bfloat16"}]
)
def test_another_layout_gets_another_start_up_yml(
    options: dict[str, Any], hashes: Any, home: Path
) -> None:
    plan = plan_of(home / "one", home / "run", tp=2)
    execute(plan, str(home / "run"), hash_name=hashes)
    assert run(home / "one", home / "run", overwrite=True, **options) == []
    assert consistent(home / "run")
    assert run(home / "one", home / "run", tp=2, iteration=5) == []
    assert consistent(home / "run")
    assert yml(home / "run")["model_parallel_size"] == 2
    assert sorted(path.name for path in home.iterdir()) == ["one", "run", "two"]


def test_without_verification_too(home: Path) -> None:
    """Blocks are shared then, and no hash is taken of most files."""
    command = ["convert", str(home / "one"), str(home / "run"), "--to", "neox", "--no-verify", "-q"]
    assert CliRunner().invoke(app, [*command, "--tp", "2"]).exit_code == 0
    tokenizer(home / "one", "w", 190)
    done = CliRunner().invoke(app, [*command, "--overwrite"])
    assert done.exit_code == 0
    assert consistent(home / "run")
    new = (home / "one" / "tokenizer.json").read_bytes()
    assert (home / "run" / "tokenizer" / "tokenizer.json").read_bytes() == new


def test_an_edited_yml_stays_and_the_new_one_stands_beside_it(home: Path) -> None:
    run(home / "one", home / "run", tp=2)
    path = home / "run" / "finetune.yml"
    path.write_text(path.read_text().replace("train_iters: 1000", "train_iters: 7"))
    edited = path.read_text()
    assert run(home / "one", home / "run", tp=2, iteration=3) == []
    assert not (home / "run" / "finetune.new.yml").exists(), "nothing contradicts"
    command = ["convert", str(home / "one"), str(home / "run"), "--to", "neox", "--overwrite"]
    done = CliRunner().invoke(app, [*command, "--pp", "0"])
    assert done.exit_code == 0
    assert "finetune.yml was edited" in done.stderr
    assert "model_parallel_size: 2 there, 1 here" in done.stderr
    assert "pipe_parallel_size: 1 there, 0 here" in done.stderr
    assert "train_iters" not in done.stderr
    assert path.read_text() == edited
    assert yml(home / "run", "finetune.new.yml")["model_parallel_size"] == 1
    # that one is ours: it is replaced by the next; an edited one isn't either
    assert run(home / "one", home / "run", tp=4, iteration=9) == ["start-yml-edited"]
    new = home / "run" / "finetune.new.yml"
    assert yml(home / "run", "finetune.new.yml")["model_parallel_size"] == 4
    new.write_text(f"{new.read_text()}# mine\n")
    assert run(home / "one", home / "run", tp=3, iteration=10) == ["start-yml-edited"]
    assert yml(home / "run", "finetune.new.yml")["model_parallel_size"] == 4
    assert yml(home / "run", "finetune.new-2.yml")["model_parallel_size"] == 3


@pytest.mark.parametrize("broken", ["a: [", "model_parallel_size: '2'\n", ""])
def test_an_edited_yml_that_lacks_keys_or_is_broken(broken: str, home: Path) -> None:
    run(home / "one", home / "run")
    (home / "run" / "finetune.yml").write_text(broken)
    assert run(home / "one", home / "run", iteration=3) == ["start-yml-edited"]
    assert (home / "run" / "finetune.yml").read_text() == broken
    assert yml(home / "run", "finetune.new.yml")["model_parallel_size"] == 1


def test_another_model_does_not_belong_into_a_run(home: Path) -> None:
    run(home / "one", home / "run")
    before = {path: path.stat().st_mtime_ns for path in (home / "run").rglob("*")}
    with pytest.raises(Refused, match=r"hidden size: 48 there, 24 here.*`overwrite=True`"):
        run(home / "two", home / "run", iteration=5)
    assert {path: path.stat().st_mtime_ns for path in (home / "run").rglob("*")} == before
    assert run(home / "two", home / "run", iteration=5, overwrite=True) == ["other-model"]
    assert consistent(home / "run")
    words = (home / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    assert words == (home / "two" / "tokenizer.json").read_bytes()
    assert (home / "run" / "global_step0").is_dir()
    run(home / "two", home / "alone")
    run(home / "one", home / "alone", overwrite=True)
    convert(home / "alone", home / "back")
    words = (home / "back" / "tokenizer.json").read_bytes()
    assert words == (home / "one" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_pct": 0.25},
        {"use_parallel_residual": False},
        {"layer_norm_eps": 1e-6},
        {"num_hidden_layers": 2},
        {"max_position_embeddings": 64},
        {"vocab_size": 600},
        {"tie_word_embeddings": True},
    ],
)
def test_one_key_makes_another_model(change: dict[str, Any], home: Path) -> None:
    (home / "one" / "tokenizer.json").unlink()
    run(home / "one", home / "run")
    make_hf(home / "other", **{"num_hidden_layers": 1, **change})
    with pytest.raises(Refused, match="another model"):
        run(home / "other", home / "run", iteration=5)


def test_another_tokenizer_makes_another_model(home: Path) -> None:
    run(home / "one", home / "run")
    old = (home / "one" / "tokenizer.json").read_text()
    tokenizer(home / "one", "z")
    with pytest.raises(Refused, match="another tokenizer"):
        run(home / "one", home / "run", iteration=5)
    (home / "one" / "tokenizer.json").write_text(json.dumps(json.loads(old), indent=4))
    assert run(home / "one", home / "run", iteration=5) == [], "formatted otherwise"


def test_another_seed_or_dtype_is_a_step_of_the_same_model(home: Path) -> None:
    run(home / "one", home / "run")
    make_hf(home / "later", seed=1, num_hidden_layers=1)
    assert run(home / "later", home / "run", iteration=5, tp=3, dtype="float16") == []
    assert consistent(home / "run")


def test_an_edited_tokenizer_is_never_passed_on_with_another_model(home: Path) -> None:
    run(home / "one", home / "run")
    edited = home / "run" / "tokenizer" / "tokenizer.json"
    edited.write_text(edited.read_text().replace('"w7"', '"mine"'))
    with pytest.raises(Refused, match="was edited"):
        run(home / "two", home / "run", overwrite=True)
    assert '"mine"' in edited.read_text()
    (home / "two" / "tokenizer.json").unlink()
    with pytest.raises(Refused, match="was edited"):
        run(home / "two", home / "run", overwrite=True)


def test_a_model_without_a_tokenizer_does_not_inherit_one(home: Path) -> None:
    run(home / "one", home / "run")
    (home / "two" / "tokenizer.json").unlink()
    run(home / "two", home / "run", overwrite=True)
    assert not (home / "run" / "tokenizer").exists()


def test_an_added_template_of_the_user_stays(home: Path) -> None:
    run(home / "one", home / "run")
    (home / "run" / "tokenizer" / "chat_template.jinja").write_text("mine")
    assert run(home / "one", home / "run", iteration=4) == ["tokenizer-edited"]
    assert (home / "run" / "tokenizer" / "chat_template.jinja").read_text() == "mine"


def test_a_run_whose_model_cannot_be_told(home: Path) -> None:
    run(home / "one", home / "run")
    next((home / "run" / "global_step0").glob("layer_00*")).unlink()
    with pytest.raises(Refused, match=r"cannot be compared.*is incomplete"):
        run(home / "one", home / "run", iteration=5)
    run(home / "one", home / "run", iteration=5, overwrite=True)


def test_the_yml_of_another_command_that_latest_no_longer_fits(home: Path) -> None:
    run(home / "one", home / "run", tp=2)
    options = {"optimizer": "fresh", "iteration": 5}
    assert run(home / "one", home / "run", **options) == ["start-yml-outdated"]
    assert yml(home / "run", "resume.yml")["model_parallel_size"] == 1


def test_in_a_store(home: Path) -> None:
    fs = fsspec.filesystem("memory")
    url = "memory://root/run"

    def start(name: str = "finetune.yml") -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load(fs.cat_file(f"/root/run/{name}"))
        return found

    run(home / "one", url, tp=2)
    assert run(home / "one", url, tp=1, iteration=5) == []
    assert start()["model_parallel_size"] == 1
    with pytest.raises(Refused, match="another model"):
        run(home / "two", url, iteration=6)
    fs.pipe_file("/root/run/finetune.yml", fs.cat_file("/root/run/finetune.yml") + b"# mine\n")
    assert run(home / "one", url, tp=4, iteration=7) == ["start-yml-edited"]
    assert start()["model_parallel_size"] == 1
    assert start("finetune.new.yml")["model_parallel_size"] == 4
    assert fs.cat_file("/root/run/latest") == b"global_step7"
    fs.rm_file("/root/run/finetune.yml")
    assert run(home / "two", url, iteration=8, overwrite=True) == ["other-model"]
    assert start()["hidden_size"] == 24
    words = fs.cat_file("/root/run/tokenizer/tokenizer.json")
    assert words == (home / "two" / "tokenizer.json").read_bytes()
    assert not [name for name in fs.find("/root/run") if ".neox-bridge" in name]


def test_a_step_that_is_there_is_said_first(home: Path) -> None:
    run(home / "one", home / "run")
    with pytest.raises(BridgeError, match="global_step0 exists"):
        run(home / "two", home / "run")


def test_a_genuine_run_resharded_into_its_own_root_and_another_one(home: Path) -> None:
    source = fixture("pythia_bf16_pp1_tp2_dp2")
    shutil.copytree(source, home / "run")
    command = ["reshard", str(home / "run")]
    done = CliRunner().invoke(app, [*command, str(home / "run"), "--universal"])
    assert done.exit_code == 0, done.output
    assert "warning" not in done.stderr
    assert yml(home / "run", "resume_universal.yml")["model_parallel_size"] == 2
    assert CliRunner().invoke(app, [*command, str(home / "new"), "--tp", "1"]).exit_code == 0
    again = [*command, str(home / "new"), "--dp", "1"]
    assert CliRunner().invoke(app, again).exit_code == 1, "global_step exists"
    assert CliRunner().invoke(app, [*again, "--overwrite"]).exit_code == 0
    assert yml(home / "new", "resume.yml")["model_parallel_size"] == 2
    done = CliRunner().invoke(app, ["reshard", str(source), str(home / "run"), "--tp", "1"])
    assert done.exit_code == 1
    assert "exists" in done.stderr
    convert(source, home / "run", to="neox", iteration=9)
    run(home / "two", home / "other")
    done = CliRunner().invoke(app, ["reshard", str(source), str(home / "other"), "--dp", "1"])
    assert done.exit_code == 4
    assert "another model" in done.stderr
