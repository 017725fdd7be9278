"""The documentation is complete, in order, and its commands work."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from pages import DOCS, ROOT, Command, all_pages, blocks, commands, difference, name_of
from rehearsal import (
    BEFORE,
    EXITS,
    REPLACED,
    cluster,
    is_for_ray,
    materials,
    perform,
    runs,
    stage,
)
from stand_in_trees import write_tree

import neox_bridge
from neox_bridge.cli.app import COMMANDS, app

# built with the site: they are no files
GENERATED = {"reference/cli.md", "reference/messages.md"}
PYTHIA = "docs/how-to/pythia.md"  # test_docs_pythia.py runs it
# The commands that pages mark with what they need, and that no test runs. The list may only shrink.
NOT_RUN = {
    "docs/explanation/benchmarks.md": ["make bench"],
    "docs/explanation/safety.md": [
        "python -m venv scanners",
        "scanners/bin/pip install",
        "python benchmarks/scanners.py",
    ],
    "docs/how-to/batch.md": ["ray start --head", "ray start --address"],
}


# How a block that stands in the file ``script`` is run, by its language.
SCRIPTS = {
    "bash": "bash -e script",
    "python": "python script",
    "yaml": "mv script suite.yml; neox-bridge batch suite.yml --dry-run",
}
LANGUAGES = {*SCRIPTS, "", "console", "diff", "json", "sh", "text"}


class _Loader(yaml.SafeLoader):
    """mkdocs.yml may name Python functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)


def nav() -> list[str]:
    """The pages in the order of the navigation."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return list(leaves(yaml.load(text, _Loader)["nav"]))


def leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for part in entry.values() if isinstance(entry, dict) else entry:
        if not isinstance(entry, str):
            yield from leaves(part)


def written() -> list[str]:
    return [page for page in nav() if page not in GENERATED]


def shown_commands() -> list[tuple[str, str]]:
    """Each call of neox-bridge that a console block shows, and its page."""
    calls = []
    for page in all_pages():
        texts = [command.text for command in commands(page)]
        texts += [block.text for block in blocks(page, "sh", "bash")]
        for shown in texts:
            text = re.sub(r"\$\(\(.*?\)\)|\$\([^)]*\)|\$\{?\w+\}?", "1", shown)
            for part in re.split(r"\n|;|&&", text):
                words = shlex.split(part, comments=True)
                if "neox-bridge" in words:
                    call = words[words.index("neox-bridge") + 1 :]
                    calls.append((name_of(page), shlex.join(before(call, ">"))))
    return calls


def before(words: list[str], mark: str) -> list[str]:
    return words[: words.index(mark)] if mark in words else words


def test_every_page_is_in_the_navigation() -> None:
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} == set(written())


@pytest.mark.parametrize("page", written())
def test_a_page_begins_with_something_that_works(page: str) -> None:
    """A title of one line, then soon a block of commands or of Python."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text.startswith("# ")
    block = re.search(r"^```(console|python|sh)$", text, re.M)
    assert block is not None
    assert text[: block.start()].count("\n") <= 12


@pytest.mark.parametrize("page", written())
def test_a_page_ends_with_a_link_to_another(page: str) -> None:
    last = (DOCS / page).read_text(encoding="utf-8").rstrip().split("\n\n")[-1]
    link = re.fullmatch(r"Next: \[[^\]]+\]\(([^)#]+)(#[^)]*)?\)\.", last.replace("\n", " "))
    assert link, last
    target = (DOCS / page).parent.joinpath(link[1]).resolve()
    assert target.relative_to(DOCS).as_posix() in nav()


def test_the_python_api_has_every_export() -> None:
    text = (DOCS / "reference" / "python-api.md").read_text(encoding="utf-8")
    exports = set(neox_bridge.__all__) - {"__version__"}
    assert set(re.findall(r"^::: neox_bridge\.(\w+)$", text, re.M)) == exports


def test_the_help_of_every_command_is_a_section() -> None:
    from runpy import run_path

    pytest.importorskip("mkdocs")
    text = run_path(str(DOCS / "_generate.py"))["commands_page"]()
    assert re.findall(r"^## (.*)$", text, re.M) == list(COMMANDS)
    assert all(f"Usage: neox-bridge {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("page", all_pages(), ids=name_of)
def test_pages_address_users(page: Path) -> None:
    """No page sends a user to a test or a module, except where a measurement is repeated."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"\]\((?:\.\./)*(?:src|tests)/[^)]*\)", text) == []


@pytest.mark.parametrize(("page", "call"), shown_commands())
def test_a_command_is_one(page: str, call: str, tmp_path: Path) -> None:
    """The command exists, with these options and values, and as many arguments."""
    words = shlex.split(call)
    if "gpt-neox" in call:
        tree = str(write_tree("2024-09", tmp_path / "tree"))
        words = [re.sub(r"(~|/path/to)/gpt-neox", tree, word) for word in words]
    if words[0].startswith("-"):
        app.make_context("neox-bridge", words, resilient_parsing=True)
        return
    command = app.get_command(click.Context(app), words[0])
    assert command is not None, words[0]
    if {"-h", "--help"} & set(words):
        return
    command.make_context(words[0], words[1:])


def test_what_does_not_run_is_marked() -> None:
    """Each command that no test runs says in the page what it needs: ``# needs a cluster``."""
    left_out = {
        name_of(page): [command for command in commands(page) if not runs(command)]
        for page in all_pages()
    }
    left_out = {name: rest for name, rest in left_out.items() if rest}
    for name, rest in left_out.items():
        for command in rest:
            print(f"not run: {name}: {command.text}")
            assert command.needs, f"mark it, as '# needs a cluster': {command.text}"
    assert left_out.keys() == NOT_RUN.keys()
    for name, rest in left_out.items():
        for command, start in zip(rest, NOT_RUN[name], strict=True):
            assert command.text.startswith(start)


def test_what_is_prepared_is_for_shown_commands() -> None:
    shown = [f"{command.text}\n" for page in all_pages() for command in commands(page)]
    for start in (*EXITS, *BEFORE, *REPLACED):
        assert any(start in text for text in shown), start


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return materials(tmp_path_factory.mktemp("materials") / "all")


def pages_with_commands() -> list[str]:
    return [name_of(page) for page in all_pages() if commands(page) and name_of(page) != PYTHIA]


@pytest.mark.slow
@pytest.mark.parametrize("name", pages_with_commands())
def test_commands_work_as_printed(name: str, source: Path, tmp_path: Path) -> None:
    with stage(name, tmp_path, source) as shell:
        for command in commands(ROOT / name):
            if runs(command) and not is_for_ray(command):
                assert_same(name, command, perform(command, shell))


@pytest.mark.slow
def test_commands_for_a_cluster_work_as_printed(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    name = "docs/how-to/batch.md"
    on_ray = [command for command in commands(ROOT / name) if is_for_ray(command)]
    assert len(on_ray) == 2
    with stage(name, tmp_path, source) as shell, cluster(shell):
        for command in on_ray:
            assert_same(name, command, perform(command, shell))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name_of(page) for page in all_pages() if blocks(page, *SCRIPTS)])
def test_scripts_work_as_printed(name: str, source: Path, tmp_path: Path) -> None:
    """Python with the imports of the blocks above it, Slurm jobs, and files of options."""
    imports: list[str] = []
    with stage(name, tmp_path, source) as shell:
        shell.environment["SLURM_ARRAY_TASK_ID"] = "0"
        for block in blocks(ROOT / name, *SCRIPTS):
            above = "".join(imports) if block.language == "python" else ""
            (shell.cwd / "script").write_text(above + block.text)
            shell.run(SCRIPTS[block.language])
            imports += re.findall(r"^(?:import|from) .*\n", block.text, re.M)


@pytest.mark.parametrize("page", all_pages(), ids=name_of)
def test_a_block_is_well_formed(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.language in ("sh", "bash"):
            done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
            assert not done.returncode, done.stderr
        if block.language in ("yaml", "json"):
            assert yaml.safe_load(block.text)


@pytest.mark.parametrize("page", all_pages(), ids=name_of)
def test_named_extras_exist(page: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", table, re.M))
    assert extras
    named = re.findall(r"'[^' ]*\[([\w,]+)\][^']*'", page.read_text(encoding="utf-8"))
    assert {extra for names in named for extra in names.split(",")} <= extras


def assert_same(name: str, command: Command, output: str) -> None:
    problem = difference(command, output)
    assert not problem, (
        f"{name}: {command.text}\n{output}\n{problem}\n"
        f"To write the new output into the page: python tests/helpers/pages.py --update {name}"
    )
