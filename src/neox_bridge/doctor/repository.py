"""Reads every file of a Hugging Face repository, and collects what is wrong with the files.

``layouts.open_stored`` stops at the first file that is damaged or missing. This goes on, so that a
user sees all of them at once. Only names, shapes and settings are read.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from neox_bridge.doctor.verdict import free_folder, near
from neox_bridge.errors import BridgeError
from neox_bridge.findings import Command, Details, Finding, Severity
from neox_bridge.formats.file_kinds import HEAD_BYTES, FileKind, is_stand_in, misplaced
from neox_bridge.layouts.folder_kinds import unfinished_files
from neox_bridge.layouts.index_findings import index_findings
from neox_bridge.layouts.linked_files import brought_along
from neox_bridge.layouts.stored_model import Component, StoredModel
from neox_bridge.layouts.stored_reader import (
    MergedFiles,
    quantization_as_stored,
    read_file,
    weight_folders,
)
from neox_bridge.layouts.text_files import LARGE_BYTES, read_json
from neox_bridge.layouts.tokenizer import piece_count, tokenizer_entries, tokenizer_files
from neox_bridge.layouts.weight_sets import (
    WeightSet,
    by_preference,
    is_index,
    is_shard,
    is_weights_file,
    loose_sets,
    read_index,
)
from neox_bridge.stores.paths import absolute, ahead, is_local, isfile, read_at
from neox_bridge.wording import natural, plural, some

# what transformers reads beside the weights, and what it cannot do without
_JSON = (
    *("config.json", "generation_config.json", "adapter_config.json", "model_index.json"),
    *("modules.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "added_tokens.json", "preprocessor_config.json", "processor_config.json"),
)
_TEXTS = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "merges.txt", "vocab.txt"),
    "chat_template.jinja",
)
_LARGE = ("tokenizer.json", "vocab.json")
_MOST_NAMES = 100  # of tensors in a finding
_MOST_REMOVED = 20  # files in one command


@dataclass(frozen=True)
class Shards:
    """A complete set of shards, and what its index should say.

    Attributes:
        folder: The folder with its files, below the repository; "" for the repository itself.
        index: The name of the index.
        weight_map: The file of each tensor.
        total_size: Bytes of all tensors.
        is_indexed: Whether the index says so already.
    """

    folder: str
    index: str
    weight_map: Mapping[str, str]
    total_size: int
    is_indexed: bool


@dataclass(frozen=True)
class Repository:
    """A Hugging Face repository as far as its files can be read.

    Attributes:
        model: The tensors that could be read.
        settings: The JSON files in the repository's folder by name, except those of the tokenizer.
        tokenizer_entries: The number of tokens, and at least the largest id + 1; None if unknown.
        damage: What is missing or damaged. While there is any, no command reads the repository.
        findings: What else the files show.
        shards: The sets of shards that are complete.
    """

    model: StoredModel
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer_entries: int | None = None
    damage: tuple[Finding, ...] = ()
    findings: tuple[Finding, ...] = ()
    shards: tuple[Shards, ...] = ()

    @property
    def fixable(self) -> tuple[Shards, ...]:
        """The sets whose index can be written again from the shards."""
        return () if self.damage else tuple(one for one in self.shards if not one.is_indexed)


def read_repository(path: str, reason: str, revision: str = "") -> Repository:
    """Read a repository and collect every problem of its files.

    Args:
        path: The folder, or its URL.
        reason: Why no family is used, as a sentence; may be empty.
        revision: ``org/name@revision`` of a model of the Hub, or "".

    Raises:
        BridgeError: A folder cannot be listed.
    """
    reader = _Reader(absolute(path), revision)
    for folder, below, names in weight_folders(reader.path):
        reader.list_sets(folder, below, names)
    pickled = all(one.pickled for _, _, one in reader.sets)
    components = [
        reader.component(folder, below, one)
        for folder, below, one in reader.sets
        if pickled or not one.pickled
    ]
    settings, entries = reader.settings()
    damage = tuple(reader.all_damage())
    model = StoredModel(
        path=reader.path,
        components=tuple(components),
        raw=settings.get("config.json", {}),
        reason=reason,
        tokenizer=reader.tokenizer(),
        revision=revision,
    )
    model = replace(model, quantization=quantization_as_stored(model, reader.classes))
    return Repository(
        model,
        settings,
        entries,
        damage,
        (
            *reader.findings,
            *reader.harmless_links(),
            *reader.unfinished(is_damaged=bool(damage)),
        ),
        tuple(reader.shards),
    )


class _Reader:
    """Collects what is read and what is wrong. Each method reads one kind of files."""

    def __init__(self, path: str, revision: str) -> None:
        self.path, self.revision = path, revision
        self.sets: list[tuple[str, str, WeightSet]] = []
        self.classes: dict[str, str] = {}
        self.damage: list[Finding] = []
        self.findings: list[Finding] = []
        self.shards: list[Shards] = []
        self._stand_ins: dict[str, tuple[FileKind, list[str]]] = {}
        self._dangling: list[str] = []
        self._names: set[str] = set()
        self._unindexed: set[str] = set()  # folders whose index is damaged

    def list_sets(self, folder: str, below: str, names: Sequence[str]) -> None:
        """Find the sets of weights in a folder, and which of them are left over."""
        if is_local(folder):
            dangling = [n for n in names if _leads_nowhere(os.path.join(folder, n))]
            self._dangling += [os.path.join(below, name) for name in dangling]
            names = [name for name in names if name not in dangling]
        read = (self._indexed(folder, name, names) for name in names if is_index(name))
        indexed = [one for one in read if one is not None]
        for one in indexed:
            if one.unnamed:
                self._stale(folder, one.index, one.unnamed)
        leaders: dict[str, WeightSet] = {}
        sets = sorted([*indexed, *loose_sets(indexed, names)], key=_by_use)
        for one in sets:
            leader = leaders.setdefault(one.name.removesuffix(".index.json"), one)
            if leader is one:
                self.sets.append((folder, below, one))
            else:
                self._left_over(folder, leader, one)

    def _indexed(self, folder: str, name: str, names: Sequence[str]) -> WeightSet | None:
        """The set of an index; None if the index is damaged, which is reported."""
        try:
            return read_index(folder, name, names)
        except BridgeError as error:
            self._unreadable(os.path.join(folder, name), error)
            self._unindexed.add(folder)
            return None

    def _left_over(self, folder: str, leader: WeightSet, one: WeightSet) -> None:
        """A set that transformers ignores, because another one of the same name comes first."""
        if one.index:
            absent = (
                f", of which {plural(len(one.absent), 'shard')} would be missing"
                if one.absent
                else ""
            )
            self.findings.append(
                Finding(
                    "index-ignored",
                    "warning",
                    f"{one.index} lies beside {leader.files[0]}, a whole model in one file",
                    f"remove whichever is out of date: {leader.files[0]}, or {one.index} and its "
                    "shards",
                    details=Details(
                        wrong=(one.index,),
                        why=f"transformers reads {leader.files[0]} and ignores the index{absent}. "
                        "One of the two is probably left from another save",
                    ),
                )
            )
        elif not is_shard(leader.files[0]):
            self._stale(folder, leader.files[0], one.files)
        else:
            self.damage.append(
                Finding(
                    "mixed-shards",
                    "error",
                    f"{folder} has shards of different sets and no index: {leader.files[0]} and "
                    f"{one.files[0]}",
                    "keep the shards of one set and remove the others",
                    details=Details(
                        wrong=(leader.files[0], one.files[0]),
                        why="The number after -of- is the number of shards of the whole set. Only "
                        "an index file tells which set is valid",
                    ),
                )
            )

    def _stale(self, folder: str, used: str, names: Sequence[str]) -> None:
        """Shards that are left from another save. used: what transformers reads instead."""
        self.findings.append(
            Finding(
                "stale-shards",
                "warning",
                f"{plural(len(names), 'shard')} of another save beside {used}: "
                f"{some(list(names), 3)}",
                self._removal(folder, names),
                details=Details(
                    unexpected=tuple(names[:_MOST_NAMES]),
                    why=f"{used} does not use these files, so transformers never reads them. They "
                    "take space, and a tool that reads every file mixes two models",
                ),
            )
        )

    def _removal(self, folder: str, names: Sequence[str]) -> str:
        """How to remove files."""
        if self.revision or not is_local(folder) or len(names) > _MOST_REMOVED:
            return f"remove them from {self.revision or folder}"
        return Command(shlex.join(["rm", *(os.path.join(near(folder), name) for name in names)]))

    def component(self, folder: str, below: str, one: WeightSet) -> Component:
        """Read a set of weights. Files that cannot be read are left out."""
        name = below if below not in self._names else os.path.join(below, one.name)
        self._names.add(name)
        files = [file for file in one.files if file not in one.absent]
        paths = [os.path.join(folder, file) for file in files]
        self._absent(folder, one)
        merged = MergedFiles(one)
        classes: dict[str, str] = {}
        unread = set(one.absent)
        for file, path in zip(files, ahead(paths), strict=True):
            try:
                stored, quantized = read_file(path)
            except BridgeError as error:
                self._unreadable(path, error)
                unread.add(file)
                continue
            classes |= {name: kind for name, kind in quantized.items() if kind}
            merged.add(file, stored)
        tensors = merged.tensors
        lost = [
            key
            for key, file in one.weight_map.items()
            if key not in tensors and key not in classes and file not in unread
        ]
        self._lost(one, lost)
        self._clashes(merged.clashes)
        is_whole = not unread and not lost and not merged.clashes
        component = Component(
            name,
            folder,
            tuple(os.path.join(folder, file) for file in files if file not in unread),
            tensors,
            os.path.join(folder, one.index) if one.index else "",
            one.total_size,
            self._json(os.path.join(folder, "config.json"), folder) or {} if below else {},
        )
        self.classes |= {component.full_name(key): kind for key, kind in classes.items()}
        if is_shard(files[0] if files else ""):
            self._check_index(folder, below, one, component, merged, is_whole=is_whole)
        return component

    def _check_index(
        self,
        folder: str,
        below: str,
        one: WeightSet,
        component: Component,
        merged: MergedFiles,
        *,
        is_whole: bool,
    ) -> None:
        """Compare an index with the shards, or report that it is missing."""
        size = component.nbytes
        complete = is_whole and not component.tensors.keys() & self.classes.keys()
        one = replace(one, unnamed=())  # reported by ``list_sets``
        refs = {key: tensor.ref for key, tensor in component.tensors.items()}
        homes = merged.homes
        wrong = list(index_findings(one, refs, homes, {}, complete=complete)) if one.index else []
        fix = ""
        if complete:
            is_indexed = bool(one.index) and not wrong
            index = one.index or f"{one.name}.index.json"
            self.shards.append(Shards(below, index, homes, size, is_indexed))
            fix = "" if is_indexed else self._fix_command()
        self.findings += [replace(one, remedy=fix or one.remedy) for one in wrong]
        if not one.index and folder not in self._unindexed:
            self.findings.append(_no_index(one, fix))
        if merged.twice and one.index:
            self.findings += index_findings(one, {}, {}, merged.twice, complete=False)

    def _fix_command(self) -> Command:
        """The command that writes a copy with a right index."""
        home = near(self.path)
        name = home
        if self.revision:
            name = self.revision.removesuffix("@main")
            home = name.partition("/")[2].replace("@", "-").replace("/", "-")
        words = ["neox-bridge", "doctor", name, "--fix", free_folder(home, "fixed")]
        return Command(shlex.join(words))

    def _absent(self, folder: str, one: WeightSet) -> None:
        """Shards that an index or the names of others name, and that are not in the folder."""
        dangling = {os.path.basename(name) for name in self._dangling}
        absent = [name for name in one.absent if name not in dangling]
        if not absent:
            return
        total = len(one.files) + (0 if one.index else len(one.absent))
        named = one.index or "the numbers in the other names"
        tensors = sum(file in absent for file in one.weight_map.values())
        why = f"{named} say that the model has {total} shards"
        if one.index:
            why = f"{one.index} places {plural(tensors, 'tensor')} of the model there"
        self.damage.append(
            Finding(
                "missing-shards",
                "error",
                f"{len(absent)} of {plural(total, 'shard')} missing in {folder}: {some(absent, 3)}",
                self._again(folder),
                details=Details(missing=tuple(absent[:_MOST_NAMES]), why=why),
            )
        )

    def _lost(self, one: WeightSet, lost: list[str]) -> None:
        if not lost:
            return
        lost.sort(key=natural)
        self.damage.append(
            Finding(
                "missing-tensors",
                "error",
                f"{one.index} names {plural(len(lost), 'tensor')} that no shard contains: "
                f"{some(lost, 3)}",
                self._again(self.path),
                details=Details(
                    missing=tuple(lost[:_MOST_NAMES]),
                    wrong=tuple(dict.fromkeys(one.weight_map[key] for key in lost))[:_MOST_NAMES],
                    why="The shards and the index are of different saves, or a shard was written "
                    "only in part. transformers would initialize these tensors at random",
                ),
            )
        )

    def _clashes(self, clashes: Mapping[str, tuple[str, str]]) -> None:
        if clashes:
            first = min(clashes, key=natural)
            self.damage.append(
                Finding(
                    "two-copies",
                    "error",
                    f"two files contain {plural(len(clashes), 'tensor')}: {first} is in "
                    f"{' and '.join(clashes[first])}",
                    "remove the file that does not belong to the model",
                    details=Details(
                        wrong=tuple(sorted(clashes, key=natural)[:_MOST_NAMES]),
                        why="No index tells which copy is valid",
                    ),
                )
            )

    def settings(self) -> tuple[dict[str, Mapping[str, Any]], int | None]:
        """The small JSON files of the repository, and the number of tokens."""
        contents: dict[str, Mapping[str, Any]] = {}
        entries: Mapping[str, int] = {}
        added: Mapping[str, int] = {}
        for name in _JSON:
            path = os.path.join(self.path, name)
            content = self._json(path, self.path, is_list=name == "modules.json")
            if content is None:
                continue
            if name == "tokenizer.json" and content:
                try:
                    entries = tokenizer_entries(content, path)
                except BridgeError as error:
                    self._unreadable(path, error)
            elif name == "vocab.json" and not entries:
                entries = {key: i for key, i in content.items() if isinstance(i, int)}
            elif name == "added_tokens.json":
                added = {key: i for key, i in content.items() if isinstance(i, int)}
            elif name not in _LARGE:
                contents[name] = content
        for name in _TEXTS:
            path = os.path.join(self.path, name)
            head = read_at(path, 0, HEAD_BYTES) if isfile(path) else b""
            kind = misplaced(path, head) if is_stand_in(path, head) else None
            if kind is not None:
                self._add_stand_in(path, kind)
        pieces = 0 if entries else piece_count(self.tokenizer()) or 0
        if not entries and not pieces:  # the added tokens alone tell nothing
            return contents, None
        entries = {**entries, **added}
        ids = [i for i in entries.values() if isinstance(i, int)]
        return contents, max(pieces, len(entries), max(ids, default=-1) + 1)

    def _json(self, path: str, folder: str, *, is_list: bool = False) -> dict[str, Any] | None:
        """A JSON file; None if there is none or if it cannot be read, which is reported."""
        if os.path.relpath(path, self.path) in self._dangling:
            return None
        try:
            if not brought_along(path, folder):
                return None
            if is_list:  # of modules, whose content does not matter
                return {"modules": []}
            large = os.path.basename(path) in _LARGE
            return read_json(path, LARGE_BYTES, None) if large else read_json(path)
        except BridgeError as error:
            self._unreadable(path, error)
            return None

    def tokenizer(self) -> tuple[str, ...]:
        """The tokenizer's files."""
        try:
            return tokenizer_files(self.path)
        except BridgeError:  # reported by ``settings``
            return ()

    def _unreadable(self, path: str, error: BridgeError) -> None:
        """Remember a file that cannot be read, with the reason."""
        try:
            head = read_at(path, 0, HEAD_BYTES) if isfile(path) else b""
        except (BridgeError, OSError):
            head = b""
        if (kind := misplaced(path, head)) is not None:
            self._add_stand_in(path, kind)
            return
        name = self._inside(path)
        what = str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
        self.damage.append(
            Finding(
                "damaged-file",
                "error",
                f"{name} cannot be read",
                self._again(os.path.dirname(path)),
                details=Details(wrong=(name,), why=f"{name} {what}".rstrip(".")),
            )
        )

    def _add_stand_in(self, path: str, kind: FileKind) -> None:
        _, names = self._stand_ins.setdefault(kind.name, (kind, []))
        names.append(self._inside(path))

    def _inside(self, path: str) -> str:
        """The path of a file below the repository."""
        return path.removeprefix(os.path.join(self.path, ""))

    def _again(self, folder: str) -> str:
        """How to get files of the repository again."""
        if self.revision:
            repo, _, name = self.revision.partition("@")
            words = ["hf", "download", repo, *(["--revision", name] if name != "main" else [])]
            return f"download the missing and damaged files again: {shlex.join(words)}"
        if unfinished_files(folder):
            return "run the same download again. It continues where it stopped"
        return f"copy or download the missing and damaged files again, into {folder}"

    def all_damage(self) -> Iterator[Finding]:
        """Everything that is damaged or missing, files that stand for others first."""
        for kind, names in self._stand_ins.values():
            are = f"is {kind.what}" if len(names) == 1 else f"are {kind.what}, each"
            yield Finding(
                "misplaced-file",
                "error",
                f"{some(names, 3)} {are}",
                kind.way_out.rstrip("."),
                details=Details(
                    wrong=tuple(names[:_MOST_NAMES]),
                    why=f"{plural(len(names), 'file')} of the repository cannot be read",
                ),
            )
        needed, _ = self._dangling_by_use()
        if needed:
            yield self._dangling_links(needed, "error")
        yield from self.damage

    def harmless_links(self) -> Iterator[Finding]:
        """Links that lead nowhere, of files without which the model loads."""
        _, others = self._dangling_by_use()
        if others:
            yield self._dangling_links(others, "warning")

    def _dangling_by_use(self) -> tuple[list[str], list[str]]:
        """The links that lead nowhere: those that the model needs, and the others."""
        needed: list[str] = []
        others: list[str] = []
        for path in self._dangling:
            name = os.path.basename(path)
            is_needed = name in (*_JSON, *_TEXTS) or is_index(name) or is_weights_file(name)
            (needed if is_needed else others).append(path)
        return needed, others

    def _dangling_links(self, names: list[str], severity: Severity) -> Finding:
        goals = [os.readlink(os.path.join(self.path, name)) for name in names]
        in_cache = any("/blobs/" in goal for goal in goals)
        why = "A link leads to a file that was moved or removed"
        if in_cache:
            why = (
                "A snapshot in the cache of Hugging Face consists of links to blobs. The blobs "
                "were removed, or their download did not finish"
            )
        return Finding(
            "dangling-link",
            severity,
            f"{plural(len(names), 'dangling link')} in {self.path}: {some(names, 3)}",
            self._again(self.path),
            details=Details(
                missing=tuple(names[:_MOST_NAMES]),
                wrong=tuple(f"{n} → {goal}" for n, goal in zip(names[:3], goals, strict=False)),
                why=why,
            ),
        )

    def unfinished(self, *, is_damaged: bool) -> Iterator[Finding]:
        """Files that a download left unfinished."""
        if names := unfinished_files(self.path):
            yield Finding(
                "unfinished-download",
                "error" if is_damaged else "warning",
                f"a download into {self.path} did not finish: {some(names, 3)}",
                "run the same download again. It continues where it stopped",
                details=Details(
                    unexpected=tuple(names[:_MOST_NAMES]),
                    why="Files may be missing or of another revision until it has finished",
                ),
            )


def _leads_nowhere(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _by_use(one: WeightSet) -> tuple[bool, int, int, str]:
    """The key that sorts sets of one name by what transformers prefers: a file, an index, none."""
    pickled, place, _, name = by_preference(one)
    kind = 1 if one.index else 2 if is_shard(one.files[0]) else 0
    return pickled, place, kind, name


def _no_index(one: WeightSet, fix: str) -> Finding:
    return Finding(
        "no-index",
        "error",
        f"the index of {plural(len(one.files), 'shard')} is missing: {one.name}.index.json",
        fix or "download the index too",
        subject="missing index",
        details=Details(
            missing=(f"{one.name}.index.json",),
            why="transformers finds shards only by their index file",
        ),
    )
