"""Names stay text: nothing of a checkpoint controls a terminal, forges a line or becomes markup."""

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Job, run_all
from common import fixture, step_of

import neox_bridge
from neox_bridge.wording import markdown, one_line, plain, wording

pytestmark = pytest.mark.slow

ESC = "\x1b[31mred\x1b]0;title\x07\x9b31m"
HOSTILE = f"a{ESC}\u202egnp\u2066\u200b\u200f\u061c\u2028x\r\nFORGED[red]<img src=x>|`b"
SHORT = "\x1b[2J\u202e\nFORGED"
# what a terminal or a reader of text obeys
BAD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\u200b-\u200f\u061c\u2028-\u202e\u2060-\u206f]")
FORGED = re.compile(r"^FORGED", re.MULTILINE)


# --- the functions --------------------------------------------------------------------------


def test_every_control_is_an_escape() -> None:
    """All of Unicode: controls, formats, separators and surrogates; nothing else."""
    for number in range(0x110000):
        character = chr(number)
        kind = unicodedata.category(character)
        if kind in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert plain(character).isascii()
            assert plain(character).isprintable()
        elif character.isprintable():
            assert wording(character) == plain(character) == character
        if kind == "Cc" and character not in "\t\n":
            assert wording(character).isprintable()
    shown = [chr(n) for n in range(0x110000) if unicodedata.category(chr(n)) == "Cf"]
    # numbers of Arabic and hieroglyphs, which show and turn nothing, may stay
    assert {c for c in shown if wording(c) == c} <= {
        *map(chr, (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD)),
        *map(chr, range(0x13430, 0x13440)),
    }


def test_how_they_are_written() -> None:
    assert wording("a\x1b\t\n\u202e\U000e0001") == "a\\x1b\t\n\\u202e\\U000e0001"
    assert plain("a\t\n\x85\udcff") == "a\\t\\n\\x85\\xff"
    assert one_line("a\nb\r\nc\x1b") == "a b c\\x1b"
    assert one_line("k" * 9000) == "k" * 4000 + " …"
    assert plain("pythia-160m_déjà vu 模型") == "pythia-160m_déjà vu 模型"
    assert markdown("pythia-160m/global_step2") == "pythia-160m/global_step2"
    assert markdown("a|<b>[c](d)`\n") == "a&#124;&#60;b&#62;&#91;c&#93;(d)&#96;&#92;n"


# --- every command --------------------------------------------------------------------------


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, copy_function=os.link)
    return target


def check(jobs: list[Job], cwd: Path) -> list[tuple[int, str, str]]:
    """Run them; fails with every one that lets something through."""
    results = run_all(jobs, cwd)
    wrong = [
        (job, code, text[:400])
        for job, (code, *texts) in zip(jobs, results, strict=True)
        for text in texts
        if BAD.search(text) or FORGED.search(text) or "this is a bug" in text
    ]
    assert wrong == []
    return results


@pytest.fixture
def named(tmp_path: Path) -> dict[str, str]:
    """Genuine checkpoints below names that attack, in both forms."""
    from common import convert

    run = copied(fixture("pythia_fp32_pp1_tp2"), tmp_path / f"run{HOSTILE.replace('/', '')}")
    other = copied(fixture("pythia_fp32_pp0_tp1"), tmp_path / "other")
    convert(run, tmp_path / f"hf{HOSTILE}")
    return {"run": str(run), "other": str(other), "hf": str(tmp_path / f"hf{HOSTILE}")}


def test_names_of_folders(named: dict[str, str], tmp_path: Path) -> None:
    run, hf, other = named["run"], named["hf"], named["other"]
    out = str(tmp_path / f"out{HOSTILE}")
    jobs = [
        ["inspect", run], ["inspect", run, "--tensors"], ["inspect", hf, "--stats"],
        ["inspect", "--security", run], ["inspect", run, "--json"],
        ["convert", run, out + "1"], ["convert", run, out + "1"], ["convert", hf, out + "2"],
        ["convert", run, out + "3", "--dry-run"], ["convert", hf, out + "4", "--tp", "3"],
        ["convert", run, out + "5", "--to", "neox", "--tp", "1"],
        ["verify", run, hf], ["verify", hf], ["verify", other, hf], ["diff", run, other],
        ["diff", run, hf, "--stat"], ["doctor", run], ["doctor", hf, "--for", "neox@2024-03"],
        ["doctor", run, "--fix", out + "6"], ["doctor", run, "--json"],
        ["audit", run, other], ["audit", run, "--json"],
        ["batch", run, other, out + "7"], ["batch", run, other, out + "7"],
        ["batch", run, other, out + "8", "--dry-run"], ["batch", run, out + "9", "--json"],
        ["batch", run, other, out + "10", "--log", "-"],
        ["reshard", run, out + "11", "--tp", "1"], ["export-optimizer", run, out + "12"],
        ["report", run, "-o", str(tmp_path / f"page{HOSTILE[:60]}.html")],
        ["patch", run], ["toy", out + "13", "--shape", HOSTILE], ["convert", run + "no", out],
        ["inspect", out], ["verify", out], ["doctor", out], ["audit", out], [HOSTILE],
        ["convert", run, out, f"--{HOSTILE}"], ["convert", run, out, "--for", HOSTILE],
        ["inspect", f"s3://{SHORT}/x"], ["inspect", f"hf://{SHORT}/x"], ["changes", "--for", out],
    ]  # fmt: skip
    results = check(jobs, tmp_path)
    done = {tuple(job[:2]): code for job, (code, _, _) in zip(jobs, results, strict=True)}
    assert done["inspect", run] == 0
    assert done["batch", run] == 0
    assert results[5][0] == 0
    card = (Path(out + "1") / "README.md").read_text()
    assert "FORGED" in card
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix in (".md", ".yml", ".html", ".json", ".txt"):
            text = path.read_text()
            assert not BAD.search(text), path
            assert path.suffix == ".html" or not FORGED.search(text), path
    assert not re.search(r"<img|\[red\]", card)
    assert "\n# " in card
    assert "&#92;x1b" in card


def test_failed_rows_of_a_batch(named: dict[str, str], tmp_path: Path) -> None:
    (step_of(Path(named["run"])) / "layer_03-model_00-model_states.pt").unlink()
    command = ["batch", named["run"], named["other"], str(tmp_path / "out"), "--retries"]
    results = check([[*command, "0"], [*command, "1", "--json"]], tmp_path)
    assert [code for code, _, _ in results] == [1, 1]
    assert all("layer_03" in err for _, _, err in results)


def test_progress_on_a_terminal(named: dict[str, str], tmp_path: Path) -> None:
    """Bars move the cursor themselves, but for no name; and colors are theirs."""
    import pty

    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "400"}
    environment["PYTHONPATH"] = str(Path(neox_bridge.__file__).parent.parent)
    environment.pop("NO_COLOR", None)
    (step_of(Path(named["run"])) / "layer_03-model_00-model_states.pt").unlink()
    command = [sys.executable, "-m", "neox_bridge", "batch", named["run"], named["other"]]
    child = subprocess.Popen(
        [*command, str(tmp_path / "out"), "--retries", "0"],
        stdout=subprocess.DEVNULL, stderr=slave, env=environment,
    )  # fmt: skip
    os.close(slave)
    data = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:
            break
        if not part:
            break
        data += part
    assert child.wait() == 1
    text = data.decode()
    assert "\x1b[31merror:\x1b[0m" in text
    assert "\x1b]0;" not in text
    assert "\x1b[31mred" not in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b-\u200f\x07\x9b]", text)


def neox_with(folder: Path, name: str = "pythia_fp32_pp1_tp2") -> Path:
    return copied(fixture(name), folder / "run")


def written_over(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)


def test_what_checkpoints_say(tmp_path: Path) -> None:
    """Keys, values, tensor names, file names, tags and texts inside them."""
    from common import convert

    sound = fixture("pythia_fp32_pp1_tp2")
    convert(sound, tmp_path / "sound")
    places: list[Path] = []

    def neox(number: int) -> Path:
        places.append(neox_with(tmp_path / f"n{number}"))
        return step_of(places[-1])

    def hf(number: int) -> Path:
        places.append(copied(tmp_path / "sound", tmp_path / f"h{number}"))
        return places[-1]

    yml = neox(0) / "configs"
    (yml / f"{HOSTILE[:80].replace('/', '')}.yml").write_text("hidden-size: 7\n")
    config = sorted((neox(1) / "configs").iterdir())[0]
    written_over(config, config.read_text() + f"{json.dumps('x' + SHORT)}: 1\n")
    config = sorted((neox(2) / "configs").iterdir())[0]
    written_over(
        config, config.read_text().replace("activation", "x") + f"activation: {json.dumps(SHORT)}\n"
    )
    config = sorted((neox(3) / "configs").iterdir())[0]
    written_over(config, config.read_text() + f"x: {json.dumps(SHORT)}\n\x1b[2J: {{\n")
    written_over(neox(4).parent / "latest", SHORT)
    step = neox(5)
    torch.save({SHORT: torch.ones(3)}, replaced(step / "layer_03-model_00-model_states.pt"))
    step = neox(6)
    torch.save(
        {"args": {SHORT: SHORT, "num_layers": SHORT}, "module": None},
        replaced(step / "mp_rank_00_model_states.pt"),
    )
    step = neox(7)
    (step / f"layer_{SHORT}-model_00-model_states.pt").write_bytes(b"x")
    (step / f"zero_pp_rank_{SHORT}_mp_rank_00_optim_states.pt").write_bytes(b"x")
    for number, change in enumerate((
        {"model_type": SHORT}, {"hidden_act": SHORT}, {SHORT: 1},
        {"torch_dtype": SHORT, "dtype": SHORT},
        {"architectures": [SHORT]}, {"hidden_size": SHORT}, {"rope_scaling": {SHORT: SHORT}},
        {"_name_or_path": SHORT, "transformers_version": SHORT},
        {"quantization_config": {"quant_method": SHORT}},
    )):  # fmt: skip
        folder = hf(number)
        facts = json.loads((folder / "config.json").read_text()) | change
        written_over(folder / "config.json", json.dumps(facts))
    from safetensors.numpy import load_file, save_file

    folder = hf(20)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, SHORT: np.ones(3)}, str(replaced(folder / "model.safetensors")))
    folder = hf(21)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {SHORT: SHORT}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = hf(22)
    (folder / f"tokenizer{SHORT}.json").write_text("{}")
    written_over(
        folder / "neox_bridge.json",
        json.dumps({"format": 1, SHORT: SHORT, "source": {"name": SHORT}}),
    )
    folder = hf(23)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": SHORT, "peft_type": SHORT})
    )
    folder = hf(24)
    written_over(folder / "config.json", f'{{"model_type": {SHORT}')
    folder = hf(25)
    (folder / "model.safetensors").unlink()
    torch.save({SHORT: torch.ones(2)}, folder / "pytorch_model.bin")
    jobs = []
    for number, place in enumerate(map(str, places)):
        out = str(tmp_path / f"out{number}")
        jobs += [
            ["inspect", place, "--tensors"],
            ["convert", place, out],
            ["doctor", place],
            ["verify", place],
        ]
        jobs += [["inspect", "--security", place], ["audit", place], ["diff", place, str(sound)]]
        jobs += [
            ["convert", place, out + "n", "--to", "neox", "--tp", "1"],
            ["batch", place, out + "b", "--retries", "0"],
        ]
    check(jobs, tmp_path)
    for path in tmp_path.glob("out*/**/*"):
        if path.is_file() and path.suffix in (".md", ".yml"):
            assert not BAD.search(path.read_text()), path
            assert not FORGED.search(path.read_text()), path


def replaced(path: Path) -> Path:
    path.unlink()
    return path
