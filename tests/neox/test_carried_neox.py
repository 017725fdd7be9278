"""The license of a model that GPT-NeoX trained on comes back with the steps that it saved."""

from pathlib import Path

import pytest
import real_neox
from common import convert, make_hf

pytestmark = pytest.mark.neox


@pytest.mark.parametrize("saves_into", ["run", "elsewhere"])
def test_after_training(saves_into: str, neox_python: str, tmp_path: Path) -> None:
    hf = real_neox.with_tokenizer(make_hf(tmp_path / "hf"))
    (hf / "LICENSE").write_bytes(b"Apache-2.0\r\n")
    (hf / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    run, saved = tmp_path / "run", tmp_path / saves_into
    convert(hf, run, tp=2)
    job = {"yml": str(run / "finetune.yml"), "losses": 2, "save": str(saved)}
    job["set"] = {"keep_last_n_checkpoints": 1}
    assert real_neox.run(neox_python, "gpt-neox", 2, [job], tmp_path) == [None]
    assert (saved / "latest").read_text().strip() == "global_step2"
    plan = convert(saved, tmp_path / "back")
    assert (tmp_path / "back" / "LICENSE").read_bytes() == b"Apache-2.0\r\n"
    card = (tmp_path / "back" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n# A model\n")
    assert "**Trained:**" in card
    assert "card-of-the-source" in [finding.code for finding in plan.findings]
