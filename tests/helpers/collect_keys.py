"""Writes ``frameworks/keys.json``, the names of the settings that the frameworks know.

    python tests/helpers/collect_keys.py GPT_NEOX_GIT DEEPSPEED WHEEL... > keys.json

GPT_NEOX_GIT is a git directory of GPT-NeoX, DEEPSPEED the folder of an installed ``deepspeed``
package, and each WHEEL one of transformers. Sources are parsed, never imported; only names and
dates are kept.
"""

import ast
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from neox_bridge.frameworks.eras import MERGED

ARGUMENTS = ("megatron/neox_arguments/neox_args.py", "megatron/neox_arguments/deepspeed_args.py")
# the two tagged releases, the last tree of each later era, and the newest
TREES = {"v1.0": "v1.0", "v2.0": "v2.0"}
TREES |= {
    change.ends_era: f"{change.commit}~1"
    for change in MERGED
    if change.ends_era not in ("", "v1.0")
}
TREES["today"] = MERGED[-1].commit
FAMILIES = (
    "gpt_neox",
    "gpt2",
    "gpt_bigcode",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "mamba",
    "olmo",
    "stablelm",
    "phi3",
    "starcoder2",
    "glm",
)
# the parts of DeepSpeed that GPT-NeoX's yml can configure
_CONFIGURED = ("runtime", "monitor", "profiling", "comm", "elasticity", "autotuning", "compression")
_CONFIG_CLASSES = ("PretrainedConfig", "PreTrainedConfig", "GenerationConfig")


def main(arguments: list[str]) -> None:
    """Print the file."""
    git, deepspeed, *wheels = arguments
    names = {
        "gpt_neox": gpt_neox(git),
        "deepspeed": {"version": _version(deepspeed), "keys": sorted(set(_deepspeed(deepspeed)))},
        "transformers": _transformers(wheels),
    }
    json.dump(names, sys.stdout, indent=0)
    print()


def gpt_neox(git: str) -> dict[str, Any]:
    """The arguments of each tree, and those that were there only between them."""

    def run(*words: str) -> str:
        done = subprocess.run(["git", f"--git-dir={git}", *words], capture_output=True, text=True)
        return done.stdout

    def names(commit: str) -> set[str]:
        return {name for file in ARGUMENTS for name in _fields(run("show", f"{commit}:{file}"))}

    trees = {tree: names(commit) for tree, commit in TREES.items()}
    log = run(
        "log", "--first-parent", "--reverse", "--format=%H %cs", TREES["today"], "--", *ARGUMENTS
    )
    before: set[str] = set()
    until: dict[str, str] = {}
    for line in log.splitlines():
        commit, date = line.split()
        now = names(commit)
        if len(now) < len(before) // 2:  # a file with a merge conflict in it
            continue
        until |= dict.fromkeys(before - now, date)
        before = now
    known = set().union(*trees.values())
    shipped: dict[str, list[str]] = {}
    for path in run("ls-tree", "-r", "--name-only", TREES["today"], "configs").splitlines():
        if path.endswith(".yml"):
            raw = yaml.safe_load(run("show", f"{TREES['today']}:{path}")) or {}
            for key, value in raw.items():
                if (name := key.replace("-", "_")) not in known:
                    shipped.setdefault(name, []).append(str(value))
    return {
        "commits": TREES,
        "keys": {key: " ".join(t for t in trees if key in trees[t]) for key in sorted(known)},
        "shipped": shipped,
        "removed": {key: date for key, date in sorted(until.items()) if key not in known},
    }


def _fields(source: str) -> Iterator[str]:
    """The annotated fields of the classes in a Python file."""
    try:
        module = ast.parse(source)
    except SyntaxError:
        return
    for node in module.body:
        for entry in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                yield entry.target.id


def _version(folder: str) -> str:
    (folder_name,) = Path(folder).parent.glob("deepspeed-*.dist-info")
    return folder_name.name.removeprefix("deepspeed-").removesuffix(".dist-info")


def _deepspeed(folder: str) -> Iterator[str]:
    """The keys of DeepSpeed's config: constants of its constants files, fields of its models."""
    paths = [path for part in _CONFIGURED for path in Path(folder, part).rglob("*.py")]
    for path in paths:
        source = path.read_text()
        if path.name == "constants.py":
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Assign):
                    yield from _key(node.value)
        elif "config" in path.name:
            yield from _fields(source)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.keyword) and node.arg == "alias":
                    yield from _key(node.value)


def _key(node: ast.expr) -> Iterator[str]:
    """The name that a constant is, if it is one."""
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, str) and value.isidentifier() and value.islower():
        yield value


def _transformers(wheels: list[str]) -> dict[str, Any]:
    """The fields of each family's class, and what every class takes, in any of the versions."""
    versions = []
    common: set[str] = set()
    families: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for wheel in wheels:
        versions.append(Path(wheel).name.split("-")[1])
        with zipfile.ZipFile(wheel) as archive:
            for name in ("configuration_utils.py", "generation/configuration_utils.py"):
                module = ast.parse(archive.read(f"transformers/{name}"))
                for node in ast.walk(module):
                    if isinstance(node, ast.ClassDef) and node.name in _CONFIG_CLASSES:
                        common |= set(_attributes(node))
            for family, keys in families.items():
                name = f"transformers/models/{family}/configuration_{family}.py"
                if name in archive.namelist():
                    for node in ast.parse(archive.read(name)).body:
                        keys |= set(_attributes(node)) if isinstance(node, ast.ClassDef) else set()
    return {
        "versions": versions,
        "common": sorted(common),
        "families": {family: sorted(keys - common) for family, keys in families.items()},
    }


def _attributes(node: ast.ClassDef) -> Iterator[str]:
    """What a config class takes and writes: fields, arguments, popped keywords, attributes."""
    for entry in node.body:
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
            yield from () if "ClassVar" in ast.dump(entry.annotation) else (entry.target.id,)
        if isinstance(entry, ast.FunctionDef) and entry.name in ("__init__", "__post_init__"):
            yield from (a.arg for a in entry.args.args if a.arg != "self")
            yield from _in_function(entry)


def _in_function(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("pop", "get"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


if __name__ == "__main__":
    main(sys.argv[1:])
