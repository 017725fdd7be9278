"""Folders as branches of the Hub: with the real client, against a Hub on loopback."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_stub import PART, READ, WRITE, Stub, pointer, serving, use

import neox_bridge
from neox_bridge.errors import BridgeError
from neox_bridge.execution.work import work_of
from neox_bridge.hub.changes import compare
from neox_bridge.hub.publish import Published, check_writable, publish, publish_written, work_base
from neox_bridge.hub.remote import look, published_plan
from neox_bridge.layouts.seal import sealed
from neox_bridge.stores.hub_names import HubTarget, hub_target
from neox_bridge.stores.hub_revisions import revisions

REPO = "org/model"
# what the real client asks when a folder of four files, one of them in parts, becomes a new branch
RECORDED = """
GET /api/models/org/model/refs
POST /api/repos/create
GET /api/models/org/model/refs
GET /api/models/org/model/commits/main
POST /api/models/org/model/branch/step10
GET /api/models/org/model/refs
GET /api/models/org/model/tree/FIRST?recursive=true&expand=false
GET /api/models/org/model
POST /api/models/org/model/preupload/step10
POST /org/model.git/info/lfs/objects/batch
PUT /part/LARGE/1
PUT /part/LARGE/2
PUT /part/LARGE/3
POST /complete/LARGE
POST /org/model.git/info/lfs/verify
POST /api/validate-yaml
POST /api/models/org/model/commit/step10
GET /api/models/org/model/tree/LAST?recursive=true&expand=false
GET /api/models/org/model/tree/LAST?recursive=true&cursor=3
""".split("\n")[1:-1]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been waited between tries, in seconds."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]) -> Iterator[Stub]:
    with serving(Stub(page=3)) as stub:
        use(stub, monkeypatch, tmp_path)
        yield stub


def make(folder: Path, seed: int = 0, large: int = 2 * PART + 1000, plan: str = "abc") -> Path:
    """A folder like those that this tool writes."""
    folder.mkdir(exist_ok=True)
    files = {
        "README.md": b"---\ntags: [neox-bridge]\n---\n# model\n",
        "config.json": b'{"hidden_size": 8}\n',
        "model.safetensors": (bytes(range(seed, 251)) * (large // 200))[:large],
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    sizes = {name: (len(data), None) for name, data in files.items()}
    (folder / "neox_bridge.json").write_bytes(
        sealed(b'{"written_by": "a test"}', "none", sizes, plan=plan)
    )
    return folder


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def asked(stub: Stub) -> list[str]:
    """The requests but one, which the client makes where it likes."""
    return [line for line in stub.seen if "agent-harnesses" not in line]


def test_the_public_function(hub: Stub, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    done = neox_bridge.publish(str(folder), f"hf://{REPO}@step10", private=True, message="Mine")
    assert (
        done.to_json()["published"]["commit"] == done.commit == hub.repos[REPO].branches["step10"]
    )
    assert hub.repos[REPO].private
    assert hub.repos[REPO].commits[done.commit].title == "Mine"
    assert not neox_bridge.publish(str(folder), f"hf://{REPO}@step10").changed
    with pytest.raises(BridgeError, match="is not a Hub URL"):
        neox_bridge.publish(str(folder), REPO)
    run = tmp_path / "run"
    for number in (1, 2):  # the second step is added beside the first one
        tiny.convert(tiny.write_hf(tmp_path / f"hf{number}"), run, iteration=number)
        neox_bridge.publish(str(run), f"hf://{REPO}@run")
        shutil.rmtree(run)
    files = hub.files(REPO, "run")
    assert {"global_step1/neox_bridge.json", "global_step2/neox_bridge.json"} <= set(files)
    assert files["latest"] == b"global_step2"


def test_a_folder_becomes_a_branch(hub: Stub, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    done = publish(str(folder), REPO, "step10", private=True, message="Convert it")
    repo = hub.repos[REPO]
    first, last = repo.branches["main"], repo.branches["step10"]
    assert hub.files(REPO, "step10") == content(folder)
    assert hub.files(REPO, "main") == {}
    assert repo.private
    assert repo.commits[last].parent == first
    assert repo.commits[last].title == "Convert it"
    size = sum(map(len, content(folder).values()))
    names = tuple(sorted(content(folder)))
    page = f"{hub.url}/{REPO}/tree/step10"
    assert done == Published(REPO, "step10", page, last, True, names, (), 0, size)
    large = repo.commits[last].files["model.safetensors"].sha256
    assert large is not None
    seen = [
        s.replace(first, "FIRST").replace(last, "LAST").replace(large, "LARGE") for s in asked(hub)
    ]
    assert seen == RECORDED


def test_twice_is_once(hub: Stub, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    first = publish(str(folder), REPO, "step10")
    hub.seen.clear()
    second = publish(str(folder), REPO, "step10")
    assert second.changed is False
    assert second.commit == first.commit
    assert second.kept == 4
    assert [line for line in hub.seen if not line.startswith("GET ")] == []


def test_only_what_differs_is_sent(hub: Stub, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    publish(str(folder), REPO)
    hub.put(REPO, "main", **{"notes.md": b"mine", "old-00001-of-00002.safetensors": b"old"})
    (folder / "config.json").write_text('{"hidden_size": 9}\n')
    sent = hub.sent
    done = publish(str(folder), REPO, overwrite=True)
    assert done.uploaded == ("config.json",)
    assert done.removed == ("notes.md", "old-00001-of-00002.safetensors")
    assert done.kept == 3
    assert hub.sent == sent
    assert hub.files(REPO) == content(folder)


def test_what_is_there_is_not_replaced_unasked(hub: Stub, tmp_path: Path) -> None:
    publish(str(make(tmp_path / "out")), REPO, "step10")
    before = hub.repos[REPO].branches["step10"]
    with pytest.raises(BridgeError, match=r"model\.safetensors.*`overwrite=True`"):
        publish(str(make(tmp_path / "other", seed=1)), REPO, "step10")
    assert hub.repos[REPO].branches["step10"] == before


def test_weights_of_another_kind_are_not_mixed_in(hub: Stub, tmp_path: Path) -> None:
    hub.make(REPO)
    hub.put(REPO, "main", **{"pytorch_model.bin": b"old", "LICENSE": b"free"})
    folder = make(tmp_path / "out")
    with pytest.raises(BridgeError, match=r"pytorch_model\.bin"):
        publish(str(folder), REPO)
    del hub.repos[REPO]
    hub.make(REPO)
    hub.put(REPO, "main", LICENSE=b"free")
    assert publish(str(folder), REPO).removed == ()
    assert hub.files(REPO) == {**content(folder), "LICENSE": b"free"}


@pytest.mark.parametrize("squashed", [False, True])
def test_a_new_branch_does_not_hold_the_weights_of_main(
    hub: Stub, tmp_path: Path, squashed: bool
) -> None:
    weights = {"model.safetensors": b"the last step", "extra.md": b"text"}
    hub.make(REPO, **(weights if squashed else {}))
    if not squashed:
        hub.put(REPO, "main", **weights)
    at_start: list[Any] = []
    branch = "step10"
    hub.before.append(("POST .*/commit/", lambda: at_start.append(hub.files(REPO, branch))))
    folder = make(tmp_path / "out")
    publish(str(folder), REPO, branch)
    assert at_start == [weights if squashed else {}]
    assert hub.files(REPO, branch) == content(folder)
    assert hub.files(REPO) == weights


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Stub, tmp_path: Path) -> None:
    hub.make(REPO)
    with pytest.raises(BridgeError, match="already exists and is public"):
        publish(str(make(tmp_path / "out")), REPO, private=True)
    assert hub.files(REPO) == {}


def test_one_that_somebody_makes_public_meanwhile_neither(hub: Stub, tmp_path: Path) -> None:
    hub.before.append(("POST /api/repos/create", lambda: (hub.make(REPO), None)[1]))
    with pytest.raises(BridgeError, match="already exists and is public"):
        publish(str(make(tmp_path / "out")), REPO, private=True)
    assert hub.files(REPO) == {}


# pull requests


def test_a_pull_request(hub: Stub, tmp_path: Path) -> None:
    hub.make(REPO)
    folder = make(tmp_path / "out")
    done = publish(str(folder), REPO, create_pr=True)
    assert done.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert done.url == done.pull_request
    assert hub.files(REPO) == {}
    assert hub.files(REPO, "refs/pr/1") == content(folder)
    assert done.commit == hub.repos[REPO].pulls["refs/pr/1"]


def test_a_pull_request_to_others(hub: Stub, tmp_path: Path) -> None:
    hub.make("others/model")
    folder = make(tmp_path / "out")
    with pytest.raises(BridgeError, match=r"do not have write access.*`create_pr=True`.*403"):
        publish(str(folder), "others/model")
    publish(str(folder), "others/model", create_pr=True)
    assert hub.files("others/model", "refs/pr/1") == content(folder)


@pytest.mark.parametrize("there", [False, True])
def test_a_pull_request_needs_a_branch(hub: Stub, tmp_path: Path, there: bool) -> None:
    if there:
        hub.make(REPO)
    what = "branch" if there else "repository"
    with pytest.raises(BridgeError, match=f"no such {what}"):
        publish(str(make(tmp_path / "out")), REPO, "step10", create_pr=True)
    assert hub.count("POST .") == 0


def test_a_pull_request_is_not_opened_twice(hub: Stub, tmp_path: Path) -> None:
    hub.make(REPO)
    hub.fail("POST /commit/", 502, after=True)
    with pytest.raises(BridgeError, match="502"):
        publish(str(make(tmp_path / "out")), REPO, create_pr=True)
    assert list(hub.repos[REPO].pulls) == ["refs/pr/1"]


# faults


def test_a_commit_that_fails_is_tried_again(hub: Stub, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("POST /commit/", 500, times=2)
    folder = make(tmp_path / "out")
    done = publish(str(folder), REPO)
    assert waits == [1, 2]
    assert done.commit == hub.repos[REPO].branches["main"]
    assert len(hub.repos[REPO].commits) == 2
    assert hub.count("POST /objects/batch") == 1


def test_not_for_ever(hub: Stub, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("POST /commit/", 503, times=9)
    with pytest.raises(BridgeError, match=r"the Hub failed.*503"):
        publish(str(make(tmp_path / "out")), REPO)
    assert waits == [1, 2, 4, 8]
    assert hub.files(REPO) == {}


@pytest.mark.parametrize("status", [0, 504])
def test_a_commit_whose_answer_is_lost_is_made_once(hub: Stub, tmp_path: Path, status: int) -> None:
    hub.fail("POST /commit/", status, after=True)
    folder = make(tmp_path / "out")
    done = publish(str(folder), REPO)
    assert done.changed
    assert done.commit == hub.repos[REPO].branches["main"]
    assert len(hub.repos[REPO].commits) == 2
    assert hub.files(REPO) == content(folder)


@pytest.mark.parametrize("answer", [412, 500])
def test_somebody_else_commits_meanwhile(hub: Stub, tmp_path: Path, answer: int) -> None:
    hub.make(REPO)
    hub.before.append(("POST .*/commit/", lambda: (hub.put(REPO, "main", x=b"x"), None)[1]))
    if answer == 500:
        hub.fail("POST /commit/", 500)
    with pytest.raises(BridgeError, match="another commit was pushed"):
        publish(str(make(tmp_path / "out")), REPO)
    assert hub.files(REPO) == {"x": b"x"}


def test_a_branch_that_appears_meanwhile(hub: Stub, tmp_path: Path) -> None:
    hub.make(REPO)

    def appear() -> None:
        hub.repos[REPO].branches["step10"] = hub.repos[REPO].branches["main"]

    hub.before.append(("POST .*/branch/", appear))
    folder = make(tmp_path / "out")
    publish(str(folder), REPO, "step10")
    assert hub.files(REPO, "step10") == content(folder)


def test_a_branch_that_appears_with_other_weights(hub: Stub, tmp_path: Path) -> None:
    hub.make(REPO)
    other = {"model.safetensors": b"other"}
    hub.before.append(("POST .*/branch/", lambda: (hub.put(REPO, "step10", **other), None)[1]))
    with pytest.raises(BridgeError, match="holds other files"):
        publish(str(make(tmp_path / "out")), REPO, "step10")
    assert hub.files(REPO, "step10") == other


@pytest.mark.parametrize("status", [0, 503])
def test_a_part_that_is_dropped_is_sent_again(hub: Stub, tmp_path: Path, status: int) -> None:
    hub.fail("PUT /part/.*/2", status)
    folder = make(tmp_path / "out")
    publish(str(folder), REPO)
    assert hub.count("PUT /part/.*/2") == 2
    assert hub.files(REPO) == content(folder)


def test_an_upload_that_was_cut_off_goes_on(hub: Stub, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    (folder / "second.safetensors").write_bytes(b"second" * 1000)
    second = len(b"second" * 1000)
    hub.fail("PUT /lfs/", 403, message="expired")
    with pytest.raises(BridgeError, match="expired"):
        publish(str(folder), REPO)
    assert hub.files(REPO) == {}
    sent = hub.sent
    publish(str(folder), REPO)
    assert hub.sent == sent + second
    assert hub.files(REPO) == content(folder)


def test_what_a_gitignore_keeps_out_is_told(hub: Stub, tmp_path: Path) -> None:
    hub.make(REPO, **{".gitignore": b"*.json\n"})
    with pytest.raises(BridgeError, match=r"does not contain config\.json and 1 more.*\.gitignore"):
        publish(str(make(tmp_path / "out")), REPO)


@pytest.mark.parametrize(
    ("token", "status", "words"),
    [
        ("hf_wrong", None, r"not logged in to the Hub.*hf auth login.*HF_TOKEN"),
        ("", None, "hf auth login"),
        (READ, None, r"do not have write access.*403"),
        (WRITE, 402, "quota of the account is exceeded"),
        (WRITE, 404, "the repository does not exist"),
        (WRITE, 413, "too large"),
        (WRITE, 418, r"refused.*418"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: Stub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    status: int | None,
    words: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.make(REPO)
    if status is not None:
        hub.fail("POST /preupload/", status, message="for a reason")
        words += ".*for a reason"
    with pytest.raises(BridgeError, match=words) as found:
        publish(str(make(tmp_path / "out")), REPO)
    assert "\n" not in str(found.value)
    assert hub.files(REPO) == {}


def test_addresses_that_are_signed_are_not_told() -> None:
    from neox_bridge.stores.hub_api import explanation

    error = OSError("no answer from https://s3.example/file?X-Amz-Signature=secret in time")
    assert explanation(error, REPO) == (
        f"{REPO}: OSError: no answer from https://s3.example/file in time"
    )


def test_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    with serving(Stub()) as stub:
        pass
    use(stub, monkeypatch, tmp_path)
    for ask in (
        lambda: publish(str(make(tmp_path / "out")), REPO),
        lambda: revisions(REPO),
        lambda: published_plan(REPO, "main"),
    ):
        with pytest.raises(BridgeError, match=r"cannot be reached.*HF_ENDPOINT"):
            ask()


def test_a_folder_without_files(hub: Stub, tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(BridgeError, match=f"{folder} contains no files to publish"):
            publish(str(folder), REPO)
    assert hub.repos == {}


def test_what_was_written_is_kept_if_it_cannot_be_published(hub: Stub, tmp_path: Path) -> None:
    plan = tiny.plan_of(tiny.write_hf(tmp_path / "hf"), tmp_path / "x")
    work = work_of(str(tmp_path / "place"))
    Path(work.folder).mkdir()
    make(Path(work.files))
    hub.fail("POST /api/repos/create", 403)
    with pytest.raises(BridgeError) as caught:
        publish_written(plan, work, hub_target(f"hf://{REPO}"))
    assert str(caught.value).startswith(f"{REPO}: you do not have write access.")
    assert f"The files are kept in {work.folder}. Run the same command again" in str(caught.value)
    published = publish_written(plan, work, hub_target(f"hf://{REPO}"))
    assert set(published.uploaded) == set(content(Path(work.files)))


def test_the_folder_for_the_files_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert work_base(None) == os.path.realpath(tmp_path)
    with pytest.raises(BridgeError, match=r"missing: no such folder\. .*`work=DIR`"):
        work_base(str(tmp_path / "missing"))


def test_offline(hub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BridgeError, match="HF_HUB_OFFLINE is set, so the Hub is not contacted"):
        revisions(REPO)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(BridgeError, match=r"is missing. Install it: .*pip install .*\[hub\]"):
        revisions(REPO)


# reading


def test_revisions_by_step(hub: Stub) -> None:
    repo = hub.make(REPO)
    head = repo.branches["main"]
    for name in ("step10", "step9", "global_step512", "v2", "step1000-tokens4B"):
        repo.branches[name] = head
    repo.tags["step10"] = head
    found = [(r.name, r.kind, r.step) for r in revisions(REPO)]
    assert found == [
        ("main", "branch", None),
        ("v2", "branch", None),
        ("step9", "branch", 9),
        ("step10", "branch", 10),
        ("step10", "tag", 10),
        ("global_step512", "branch", 512),
        ("step1000-tokens4B", "branch", 1000),
    ]
    assert {r.commit for r in revisions(REPO)} == {head}
    with pytest.raises(BridgeError, match="org/nothing"):
        revisions("org/nothing")


def test_the_plan_that_a_branch_was_made_by(hub: Stub, tmp_path: Path) -> None:
    assert published_plan(REPO, "step10") is None
    publish(str(make(tmp_path / "out", plan="f00")), REPO, "step10")
    hub.seen.clear()
    assert published_plan(REPO, "step10") == "f00"
    assert all("/resolve/step10/neox_bridge.json" in line for line in asked(hub))
    assert published_plan(REPO, "step11") is None
    assert published_plan(REPO, "main") is None
    record = hub.files(REPO, "step10")["neox_bridge.json"]
    hub.put(REPO, "step10", **{"neox_bridge.json": record.replace(b"f00", b"f01")})
    assert published_plan(REPO, "step10") is None


def test_names_of_places() -> None:
    assert hub_target("hf://org/name") == HubTarget("org/name", "main")
    assert hub_target("hf://org/name.v2@runs/a-1") == HubTarget("org/name.v2", "runs/a-1")
    assert str(hub_target("hf://org/name")) == "hf://org/name@main"
    for wrong in ("hf://name", "hf://org/name@", "hf://org/name/file", "org/name", "hf://org/n\n"):
        with pytest.raises(BridgeError, match="hf://ORG/NAME"):
            hub_target(wrong)


def test_branches_with_a_slash(hub: Stub, tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    publish(str(folder), REPO, "runs/a")
    assert hub.files(REPO, "runs/a") == content(folder)
    assert published_plan(REPO, "runs/a") == "abc"


# steps of a GPT-NeoX run


def step(folder: Path, number: int) -> Path:
    name = f"global_step{number}"
    (folder / name).mkdir(parents=True)
    (folder / name / "layer_00-model_00-model_states.pt").write_bytes(b"%d" % number)
    (folder / "latest").write_text(name)
    (folder / "finetune.yml").write_text(f"iteration: {number}")
    return folder


def test_a_step_is_put_beside_the_others(hub: Stub, tmp_path: Path) -> None:
    one, two = step(tmp_path / "one", 1), step(tmp_path / "two", 2)
    publish(str(one), REPO, step="global_step1")
    done = publish(str(two), REPO, step="global_step2")
    assert done.uploaded == ("global_step2/layer_00-model_00-model_states.pt", "latest")
    expected = {**content(two), **content(one), "latest": b"global_step2"}
    assert hub.files(REPO) == expected
    (one / "global_step1/layer_00-model_00-model_states.pt").write_bytes(b"else")
    with pytest.raises(BridgeError, match="global_step1/layer_00"):
        publish(str(one), REPO, step="global_step1")
    publish(str(one), REPO, step="global_step1", overwrite=True)
    assert hub.files(REPO) == {
        **expected,
        "latest": b"global_step1",
        "global_step1/layer_00-model_00-model_states.pt": b"else",
    }


def test_what_a_commit_has_to_do() -> None:
    there = {name: pointer("0" * 64, 1) for name in ("a", "b", "c.pt", "d.md", ".gitattributes")}
    found = compare(["a", "b", "e"], there, {"b"})  # type: ignore[arg-type]
    assert (found.add, found.replace, found.same) == (("e",), ("a",), ("b",))
    assert (found.leave, found.conflicts) == (("c.pt", "d.md"), ("a", "c.pt"))


# Xet


def test_xet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Xet's real client, which gets its token from the Hub and keeps chunks in a folder.

    That is what it does for a ``local://`` address; its requests to a real server aren't tested.
    """
    hf_xet = pytest.importorskip("hf_xet")
    cas = tmp_path / "cas"
    cas.mkdir()
    folder = make(tmp_path / "out")
    with serving(Stub(cas=str(cas))) as hub:
        use(hub, monkeypatch, tmp_path)
        publish(str(folder), REPO, "step10")
        assert hub.count("GET /xet-write-token/step10") == 1
        assert hub.count("POST /objects/batch") == 0
        assert hub.sent == 0
        blob = hub.repos[REPO].commits[look(REPO, "step10").commit or ""].files["model.safetensors"]
        assert blob.size == (folder / "model.safetensors").stat().st_size
        assert publish(str(folder), REPO, "step10").changed is False
        done = publish(str(folder), REPO, "main", create_pr=True)
        assert done.pull_request
        assert hub.count(r"GET /xet-write-token/None\?create_pr=1") == 1
    (info,) = hf_xet.hash_files([str(folder / "model.safetensors")])
    back = tmp_path / "back.safetensors"
    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{cas}") as group:
        group.start_download_file(hf_xet.XetFileInfo(info.hash, info.file_size), str(back))
    assert back.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_xet_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    cas = tmp_path / "cas"
    cas.mkdir()
    with serving(Stub(cas=str(cas))) as hub:
        use(hub, monkeypatch, tmp_path)
        hub.fail("GET /xet-write-token/", 403, times=99)
        with pytest.raises(BridgeError, match="org/model"):
            publish(str(make(tmp_path / "out")), REPO, "step10")
        assert hub.files(REPO, "step10") == {}


def test_write_access_is_checked_without_a_commit(hub: Stub) -> None:
    check_writable(REPO)
    assert hub.repos[REPO].private
    hub.make("org/public")
    before = dict(hub.repos["org/public"].branches)
    check_writable("org/public")
    assert not hub.repos["org/public"].private
    assert hub.repos["org/public"].branches == before


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (READ, REPO, "the token 'test' is read-only"),
        (WRITE, "other/model", "may not write to this repository. Give it write access"),
        (WRITE, "other/missing", "may not write to this repository. Give it write access"),
        ("revoked", REPO, "you are not logged in to the Hub"),
    ],
)
def test_missing_write_access_is_an_error(
    hub: Stub, monkeypatch: pytest.MonkeyPatch, token: str, repo: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.make("other/model")
    with pytest.raises(BridgeError, match=message):
        check_writable(repo)
    assert set(hub.repos) == {"other/model"}


def test_write_access_cannot_be_checked_without_huggingface_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(BridgeError, match=r"huggingface_hub is missing. Install it: "):
        check_writable(REPO)


def test_an_outage_is_no_missing_access(hub: Stub) -> None:
    hub.make(REPO)
    hub.fail("POST preupload", 503, times=100)
    with pytest.raises(ConnectionError, match="the Hub failed"):
        check_writable(REPO)
