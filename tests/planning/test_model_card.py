"""README.md: the model's own text stays, and a section between markers says what was done."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny import convert, plan_of, write_hf

from neox_bridge.cli.app import app
from neox_bridge.errors import BridgeError
from neox_bridge.execution.execute import execute
from neox_bridge.verification.sealed import check_seal, find_record

BEGIN, END = "<!-- neox-bridge -->", "<!-- /neox-bridge -->"
FRONT = (
    "---\nlicense: mit  # free\nlibrary_name: gpt-neox\nbase_model:\n- org/base\n"
    "model-index:\n- name: x\n  results: []\ntags:\n- causal-lm\n---\n"
)


def neox(tmp_path: Path, text: str | bytes, tp: int = 2) -> Path:
    """A GPT-NeoX checkpoint of a model with this README.md."""
    hf = write_hf(tmp_path / "hf")
    (hf / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return convert(hf, tmp_path / "neox", tp=tp)


def card(source: Path, target: Path, *words: str) -> str:
    done = CliRunner().invoke(app, ["convert", str(source), str(target), *words])
    assert done.exit_code == 0, done.output
    return (target / "README.md").read_bytes().decode()


def outside(text: str) -> str:
    assert text.count(BEGIN) == text.count(END) == 1
    return text.partition(BEGIN)[0] + text.partition(END)[2]


@pytest.mark.parametrize("text", ["# A\n", "# A", "", "# A\n\n", "a\r\n---\r\nb", "\ufeff# A\n"])
def test_the_text_stays_and_a_second_run_changes_only_the_section(
    text: str, tmp_path: Path
) -> None:
    first = card(neox(tmp_path, text), tmp_path / "one")
    assert outside(first).startswith(text)
    assert outside(first).removeprefix(text).strip() == ""
    again = convert(tmp_path / "one", tmp_path / "neox2", tp=1)
    second = card(again, tmp_path / "two")
    assert outside(second) == outside(first)
    assert "joined" in first
    assert "joined" not in second
    assert card(again, tmp_path / "again") == second, "the same run writes the same card"


def test_a_section_in_the_middle_stays_there(tmp_path: Path) -> None:
    text = f"before\n{BEGIN}\nan old line\n{END}\nafter\n"
    new = card(neox(tmp_path, text), tmp_path / "one")
    assert outside(new) == "before\n\nafter\n"
    assert "an old line" not in new


@pytest.mark.parametrize("text", [f"a {BEGIN} b", f"{END} {BEGIN}", f"{BEGIN}\n{BEGIN}\nx\n{END}"])
def test_markers_that_are_no_pair(text: str, tmp_path: Path) -> None:
    """The section that follows is replaced from then on, and the text never grows."""
    first = card(neox(tmp_path, text), tmp_path / "one")
    second = card(convert(tmp_path / "one", tmp_path / "neox2", tp=2), tmp_path / "two")
    assert second.count(BEGIN) == first.count(BEGIN)
    assert len(second) == len(first) + 1  # the folder's name in the table


def test_metadata_that_became_wrong_is_corrected_and_said(tmp_path: Path) -> None:
    source = neox(tmp_path, f"{FRONT}# A\n")
    plan = plan_of(source, tmp_path / "one")
    (said,) = [f.message for f in plan.findings if f.code == "card-metadata-changed"]
    assert said.endswith("library_name: gpt-neox is now transformers")
    text = card(source, tmp_path / "one")
    expected = FRONT.replace("library_name: gpt-neox", "library_name: transformers")
    assert text.startswith(expected), "and nothing else"


@pytest.mark.parametrize(
    "front",
    [
        "---\nlicense: mit\n---\n",
        "---\nlibrary_name: transformers\n---\n",
        "---\nlibrary_name: [unclosed\n---\n",
        "---\n? library_name\n: gpt-neox\n---\n",
        "---\nlibrary_name: &a gpt-neox\nother: *a\n---\n",
        "---\nlibrary_name: gpt-neox\n",
    ],
)
def test_other_front_matter_stays_as_it_is(front: str, tmp_path: Path) -> None:
    source = neox(tmp_path, f"{front}# A\n")
    assert outside(card(source, tmp_path / "one")).startswith(f"{front}# A\n")
    codes = [finding.code for finding in plan_of(source, tmp_path / "x").findings]
    assert "card-metadata-changed" not in codes


def test_results_of_the_model_before_training_are_removed(tmp_path: Path) -> None:
    root = neox(tmp_path, f"{FRONT}# A\n")
    (root / "global_step0").rename(root / "global_step9")
    (root / "global_step9" / "neox_bridge.json").unlink()
    (root / "latest").write_text("global_step9")
    text = card(root, tmp_path / "one")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "license": "mit",
        "library_name": "transformers",
        "base_model": ["org/base"],
        "tags": ["causal-lm"],
    }
    assert "license: mit  # free\n" in text
    assert "**Trained:** These weights are those of a later step" in text
    said = {f.code: f.message for f in plan_of(root, tmp_path / "x").findings}
    assert "model-index is removed" in said["card-metadata-changed"]


def test_windows_line_ends(tmp_path: Path) -> None:
    front = "---\r\nlibrary_name: x\r\nlicense: mit\r\n---\r\n# A\r\n"
    text = card(neox(tmp_path, front), tmp_path / "one")
    expected = front.replace("library_name: x", "library_name: transformers")
    assert text.startswith(f"{expected}\n{BEGIN}")


def test_a_card_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    source = neox(tmp_path, b"\xff\xfe#\0A\0")
    assert not (source / "huggingface").exists()
    text = card(source, tmp_path / "one")
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "\n# neox/global_step0\n" in text.replace("&#95;", "_")


def test_in_plain_words(tmp_path: Path) -> None:
    source = neox(tmp_path, "# A\n")
    (source / "global_step0" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    text = card(source, tmp_path / "bf16", "--dtype", "bfloat16")
    assert "- **Merged:** The parts of 2 tensor-parallel ranks were joined" in text
    assert "- **Cast:** From float32 to bfloat16.\n" in text
    assert "- **Dropped:** optimizer states (1).\n" in text
    assert "compared with the source, value by value after the cast to bfloat16.\n" in text
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "other.gguf")
    text = card(tmp_path / "hf", tmp_path / "cast", "--to", "hf", "--dtype", "float16")
    assert "- **Merged:** Nothing: the source held each tensor in one piece.\n" in text
    assert "- **Dropped:** other.gguf.\n" in text


def test_biases_that_were_added_up(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    source = convert(hf, tmp_path / "neox", tp=2, row_bias="split")
    (source / "global_step0" / "neox_bridge.json").unlink()
    text = card(source, tmp_path / "one")
    assert "Each rank held a part of 2 biases, and the parts were added up." in text
    assert "- **Dropped:** Nothing.\n" in text


@pytest.mark.parametrize("by", ["convert", "batch", "python"])
def test_without_verification_the_card_says_so(by: str, tmp_path: Path) -> None:
    from neox_bridge import convert as convert_in_python

    source = neox(tmp_path, "# A\n")
    target = tmp_path / "out"
    if by == "python":
        convert_in_python(str(source), str(target), verify=False)
    else:
        words = [by, str(source), str(target), "--no-verify"]
        assert CliRunner().invoke(app, words).exit_code == 0
    (path,) = target.rglob("README.md")
    text = path.read_text()
    assert "**Verified:** Nothing. The tensors were not compared" in text
    assert not re.search("all tensors were read back", text)
    assert "all tensors were read back" in card(source, tmp_path / "verified")


@pytest.mark.parametrize("verified_first", [True, False])
def test_a_run_that_is_resumed_without_verification(verified_first: bool, tmp_path: Path) -> None:
    """It keeps the weights, and the card says what the run that finished did."""
    plan, target = plan_of(neox(tmp_path, "# A\n"), tmp_path / "out"), str(tmp_path / "out")

    def check(_folder: str) -> None:
        if verified_first:
            raise KeyboardInterrupt

    def no_space(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    if verified_first:
        with pytest.raises(KeyboardInterrupt):
            execute(plan, target, check=check)
    else:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("neox_bridge.execution.install._write", no_space)
            with pytest.raises(BridgeError, match="No space left"):
                execute(plan, target)
    result = execute(plan, target, check=None if verified_first else check)
    assert result.kept > 3000
    text = (tmp_path / "out" / "README.md").read_text()
    assert ("all tensors were read back" in text) == (not verified_first)
    assert check_seal(find_record(target)).changes == ()
