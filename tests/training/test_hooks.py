"""What wraps GPT-NeoX's functions, on a stand-in of its package."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron_stand_in
import pytest
import tiny
import torch
import yaml
from hub_stub import READ, WRITE, Stub, serving, use
from megatron_stand_in import Engine, Megatron

from neox_bridge.errors import BridgeError
from neox_bridge.training import hooks, loading
from neox_bridge.training.exports import Exports
from neox_bridge.training.hooks import install


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny.write_hf(tmp_path / "hf")


def values_of(hf: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model as GPT-NeoX names them."""
    neox = tiny.convert(hf, folder, layout="ranks")
    (path,) = neox.glob("global_step*/mp_rank_00_model_states.pt")
    module = torch.load(path, weights_only=False)["module"]
    return {name: value for name, value in module.items() if name.startswith("sequential.")}


@pytest.fixture
def expected(hf: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    return values_of(hf, tmp_path / "neox")


@pytest.fixture
def megatron(
    trees: Mapping[str, Path],
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> Megatron:
    engines = [Engine({k: torch.zeros_like(v) for k, v in expected.items()}) for _ in range(1)]
    monkeypatch.setattr(hooks, "_exporters", [])
    return megatron_stand_in.use(Megatron(trees["today"], engines), monkeypatch)


def args_of(megatron: Megatron, hf: Path, tmp_path: Path, **keys: Any) -> Any:
    """The ``NeoXArgs`` of a run with the yml that a conversion writes."""
    settings = yaml.safe_load((tmp_path / "neox" / "finetune.yml").read_text())
    known = {"load": str(hf), "num_layers": 1, **keys}
    args = megatron.arguments.NeoXArgs(**known)
    for key, value in settings.items():
        if key not in ("load", "save", "finetune", "num_layers"):
            setattr(args, key.replace("-", "_"), value)
    args.padded_vocab_size, args.train_impl = 16, "normal"
    return args


def test_a_run_starts_from_a_model(
    megatron: Megatron,
    hf: Path,
    tmp_path: Path,
    expected: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    install()
    install()  # once is enough
    args = args_of(megatron, hf, tmp_path)
    megatron.training.pretrain(args)
    (engine,) = megatron.engines
    assert args.iteration == 0
    assert megatron.calls == []
    assert engine.refreshed == 1
    assert [k for k, v in expected.items() if not torch.equal(engine.parameters[k], v)] == []
    size = sum(4 * value.numel() for value in expected.values())
    assert f"started from {hf}: rank 0 loaded {size:,} bytes\n" in capsys.readouterr().out


def test_warnings_of_the_conversion_are_printed(
    megatron: Megatron,
    hf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = loading.Loaded(12, ("the logits differ by about 1e-4",))
    monkeypatch.setattr(loading, "load_into", lambda *_args: loaded)
    install()
    megatron.training.pretrain(args_of(megatron, hf, tmp_path))
    assert "neox-bridge: warning: the logits differ by about 1e-4\n" in capsys.readouterr().out


def test_the_same_yml_resumes(
    megatron: Megatron, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "save"
    (save / "global_step7").mkdir(parents=True)
    (save / "latest").write_text("global_step7\n")
    install()
    args = args_of(megatron, hf, tmp_path, save=str(save), finetune=True)
    megatron.training.pretrain(args)
    assert args.iteration == 7  # with its optimizer, which finetune would leave out
    assert megatron.calls == [("load", str(save), False)]
    assert (args.load, args.finetune) == (str(hf), True)
    assert f"resuming from global_step7 in {save}" in capsys.readouterr().out


def test_the_reference_model_of_a_resumed_run_is_the_one_of_load(
    megatron: Megatron, hf: Path, tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    save = tmp_path / "save"
    (save / "global_step7").mkdir(parents=True)
    (save / "latest").write_text("global_step7")
    megatron.engines.append(Engine({k: torch.zeros_like(v) for k, v in expected.items()}))
    install()
    megatron.training.pretrain(args_of(megatron, hf, tmp_path, save=str(save)))
    policy, reference = megatron.engines
    assert megatron.calls == [("load", str(save), False)]
    assert policy.refreshed == 0
    assert [k for k, v in expected.items() if not torch.equal(reference.parameters[k], v)] == []


def test_checkpoints_of_gpt_neox_load_as_before(
    megatron: Megatron, hf: Path, tmp_path: Path
) -> None:
    install()
    args = args_of(megatron, hf, tmp_path)
    args.load = str(tmp_path / "neox")
    megatron.training.pretrain(args)
    assert megatron.calls == [("load", str(tmp_path / "neox"), False)]


def test_a_yml_of_another_model_is_refused(megatron: Megatron, hf: Path, tmp_path: Path) -> None:
    install()
    args = args_of(megatron, hf, tmp_path)
    args.rotary_pct = 1.0
    with pytest.raises(BridgeError, match=r"rotary_pct: 1\.0 in the yml, 0\.5 in the model"):
        megatron.training.pretrain(args)
    assert not any(value.any() for value in megatron.engines[0].parameters.values())


def test_saved_steps_are_exported(megatron: Megatron, hf: Path, tmp_path: Path) -> None:
    install()
    save, target = tmp_path / "save", tmp_path / "exported"
    (step,) = (tmp_path / "neox").glob("global_step*")
    args = args_of(megatron, hf, tmp_path, save=str(save), save_hf=str(target))
    megatron.training.setup_model_and_optimizer(args)
    step.rename(save / "global_step5")
    megatron.saves = [5]
    (save / "latest").write_text("global_step5")
    megatron.training.save_checkpoint(args, 5, megatron.engines[0], None, None)
    (exporter,) = hooks._exporters
    exporter.finish()
    assert (target / "step5" / "model.safetensors").exists()
    assert list(save.glob(".neox_bridge*")) == []


def test_the_end_of_a_training_waits_for_the_exports(
    megatron: Megatron, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    keys = {"save": str(tmp_path / "save"), "save_hf": str(tmp_path / "exported")}
    megatron.saves = [5]
    megatron.training.pretrain(args_of(megatron, hf, tmp_path, **keys))
    assert f"waiting until {tmp_path}/exported contains the last steps" in capsys.readouterr().out
    log = (tmp_path / "exported" / "neox_bridge_exports.log").read_text()
    assert "step 5 was removed before it was exported" in log  # this stand-in saves nothing


def test_ranks_that_see_different_runs_are_refused(
    megatron: Megatron, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    seen = hooks._gather
    monkeypatch.setattr(
        hooks, "_gather", lambda text: [text, "hf\nsave"] if "\n" in text else seen(text)
    )
    with pytest.raises(BridgeError, match="is not the same folder on all nodes"):
        megatron.training.pretrain(args_of(megatron, hf, tmp_path, save=str(tmp_path / "save")))


@pytest.mark.parametrize("name", ["save", "save_hf"])
def test_a_folder_that_cannot_be_written_ends_the_start(
    megatron: Megatron, hf: Path, tmp_path: Path, name: str
) -> None:
    install()
    (tmp_path / "file").write_text("")
    keys = {"save": str(tmp_path / "save"), "save_hf": str(tmp_path / "exported")}
    keys[name] = str(tmp_path / "file" / "below")
    with pytest.raises(BridgeError, match=f"{name}: .* cannot be written"):
        megatron.training.pretrain(args_of(megatron, hf, tmp_path, **keys))


def pushing(megatron: Megatron, hf: Path, tmp_path: Path) -> Any:
    """The ``NeoXArgs`` of a run that pushes its steps."""
    keys = {"save": str(tmp_path / "save"), "save_hf": str(tmp_path / "exported")}
    return args_of(megatron, hf, tmp_path, **keys, push_to_hub="org/model")


@pytest.mark.parametrize("token", [READ, WRITE])
def test_the_start_checks_that_steps_can_be_pushed(
    megatron: Megatron, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    install()
    args = pushing(megatron, hf, tmp_path)
    with serving(Stub()) as hub:
        use(hub, monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", token)
        if token == READ:
            with pytest.raises(BridgeError, match="push_to_hub: org/model: the token 'test' is r"):
                megatron.training.pretrain(args)
            assert megatron.engines[0].refreshed == 0  # before anything is loaded
        else:
            megatron.training.pretrain(args)
            assert hub.repos["org/model"].private


def test_an_outage_of_the_hub_does_not_end_the_start(
    megatron: Megatron,
    hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install()
    args = pushing(megatron, hf, tmp_path)
    with serving(Stub()) as hub:
        use(hub, monkeypatch, tmp_path)
    megatron.training.pretrain(args)
    printed = capsys.readouterr().out
    assert "warning: push_to_hub: write access cannot be checked now: org/model: " in printed


def test_inference_exports_nothing(megatron: Megatron, hf: Path, tmp_path: Path) -> None:
    install()
    keys = {"save": str(tmp_path / "save"), "save_hf": str(tmp_path / "exported")}
    args = args_of(megatron, hf, tmp_path, **keys)
    megatron.utils.setup_for_inference_or_eval(args)
    assert megatron.engines[0].refreshed == 1
    assert hooks._exporters == []
    assert not (tmp_path / "exported").exists()


def test_the_launcher_only_gets_the_keys(
    megatron: Megatron, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = megatron.training.pretrain
    monkeypatch.setattr(sys, "argv", ["/tree/deepy.py", "train.py"])
    install()
    assert megatron.training.pretrain is before
    megatron.arguments.NeoXArgs(save_hf="exported")


def test_outside_of_gpt_neox_the_import_says_where_it_belongs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import neox_bridge.neox"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Import it in train.py and deepy.py of a GPT-NeoX tree" in done.stderr
    with pytest.raises(ImportError, match=r"neox_bridge\.neox works inside GPT-NeoX"):
        install()


def test_a_training_that_exit_interval_ends_waits_for_its_exports(
    megatron: Megatron, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-NeoX then calls sys.exit (megatron/training.py, ``train``)."""

    class Exporter:
        exports = Exports(str(tmp_path / "save"), str(tmp_path / "exported"))
        is_finished = False

        def finish(self) -> None:
            self.is_finished = True

    exporter = Exporter()
    monkeypatch.setattr(hooks, "_exporters", [exporter])

    def pretrain() -> None:
        raise SystemExit

    megatron.training.pretrain = pretrain
    install()
    with pytest.raises(SystemExit):
        megatron.training.pretrain()
    assert exporter.is_finished
