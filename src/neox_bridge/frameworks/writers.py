"""Which program wrote a GPT-NeoX checkpoint, as far as the fields of its files tell.

DeepSpeed has written its version into the files since 0.3.17 (cfa63f5d, 2021-05-19). What is older
is told by the keys beside the weights, and its version follows from what GPT-NeoX required at that
time (requirements/requirements.txt).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neox_bridge.frameworks.deepspeed import release_of

OLD_SPARSE_NAMES = "csr_tensor_module_names"  # renamed by fcb3ca5e (0.5.5, 2021-10-27)
_SPARSE = "sparse_tensor_module_names"
_VERSION = "ds_version"
SHAPES = "param_shapes"  # moved here from the optimizer's files by 135a6256 (0.6.0, 2022-02-07)
_LONGEST_VERSION = 100  # characters
# GPT-NeoX required DeeperSpeed, EleutherAI's fork of DeepSpeed, from 92d033d8 on
_FORK = "DeeperSpeed"
_FIRST_FORK = "2021-02"
_NAMED_FILES = "2021-04"  # DeeperSpeed 0.3.13, by 81bf16d5; 0.3.15 three weeks later, by 3acce483
_LAST_FORK = "2023-03"  # v1.0 is of the 7th, v2.0 (neox-deepspeed-08) of the 9th
_SINCE_V2 = (0, 8, 0)  # the release of DeepSpeed that v2.0 came with is 0.8.3


@dataclass(frozen=True, slots=True)
class Writer:
    """What wrote a checkpoint. Texts are empty where nothing tells them.

    Attributes:
        program: "GPT-NeoX", or the tool that left its name.
        version: Of the program, such as "v1.0".
        span: When GPT-NeoX required this version of DeepSpeed, as "2021-04 to 2023-03".
        deepspeed: "DeepSpeed", or "DeeperSpeed" for EleutherAI's fork of it.
        deepspeed_version: As the files have it, or as the program required it.
        evidence: What the files contain or do not contain, for people.
        guessed: Which of these fields the files do not hold themselves.
    """

    program: str = ""
    version: str = ""
    span: str = ""
    deepspeed: str = ""
    deepspeed_version: str = ""
    evidence: tuple[str, ...] = ()
    guessed: frozenset[str] = frozenset()


UNKNOWN = Writer()


def writer_of(meta: Mapping[str, Any], optimizer: Sequence[str] = (), tool: str = "") -> Writer:
    """What wrote a checkpoint, by its first mp_rank file and the names of the optimizer's files.

    tool: the name and version of a tool, where it left a record beside the files.
    """
    if tool:
        program, _, number = tool.partition(" ")
        return Writer(program, number)
    version = meta.get(_VERSION)
    if isinstance(version, str) and 0 < len(version) <= _LONGEST_VERSION:
        return _versioned(version, meta)
    return _unversioned(optimizer) if OLD_SPARSE_NAMES in meta else UNKNOWN


def words_of(writer: Writer) -> str:
    """The writer in one line: what it is, what tells it, and what is a guess."""
    if not writer.program:
        return "a tool that left no name"
    words = " ".join(filter(None, (writer.program, writer.version)))
    if writer.deepspeed:
        words += f" with {writer.deepspeed} {writer.deepspeed_version}"
    if writer.deepspeed == _FORK:
        words += f", a fork of DeepSpeed {writer.deepspeed_version}"
    if writer.evidence:
        words += f" ({'; '.join(writer.evidence)})"
    if "deepspeed_version" in writer.guessed:
        return f"{words}; the versions are a guess by what GPT-NeoX required from {writer.span}"
    if "version" in writer.guessed:
        return f"{words}; the version of GPT-NeoX is a guess by that of DeepSpeed"
    return words


def _versioned(version: str, meta: Mapping[str, Any]) -> Writer:
    """Files with DeepSpeed's version; GPT-NeoX writes no version of its own."""
    evidence = tuple(key for key in (_VERSION, _SPARSE, OLD_SPARSE_NAMES, SHAPES) if key in meta)
    release = release_of(version)
    if release is None:  # a tool that writes its name there
        program, _, number = version.partition(" ")
        return Writer(program, number, evidence=(_VERSION,))
    later = release >= _SINCE_V2
    return Writer(
        program="GPT-NeoX",
        version="v2.0 or later" if later else "",
        span=f"since {_LAST_FORK}" if later else "",
        deepspeed="DeepSpeed",
        deepspeed_version=version,
        evidence=evidence,
        guessed=frozenset({"version"} if later else ()),
    )


def _unversioned(optimizer: Sequence[str]) -> Writer:
    """Files without DeepSpeed's version, which are those of 0.3.16 and older."""
    evidence = (f"no {_VERSION}", OLD_SPARSE_NAMES)
    writer = Writer(
        program="GPT-NeoX",
        version="v1.0",
        span=f"{_NAMED_FILES} to {_LAST_FORK}",
        deepspeed=_FORK,
        deepspeed_version="0.3.15",
        evidence=evidence,
        guessed=frozenset({"version", "deepspeed", "deepspeed_version"}),
    )
    if old := [name for name in optimizer if not name.endswith("_optim_states.pt")]:
        return replace(
            writer,
            version="before v1.0",
            span=f"{_FIRST_FORK} to {_NAMED_FILES}",
            deepspeed_version="0.3.11",
            evidence=(*evidence, f"files named like {old[0]}"),
        )
    return writer
