"""Values of options: read from what a user types, or a usage error that names what is allowed."""

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

# options that several commands have, in the same words
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub model.")
]
Step = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Read global_stepN instead of the step in `latest`."),
]
Configs = Annotated[
    list[str] | None,
    typer.Option(metavar="FILE", help="A yml for a GPT-NeoX folder without one; may be repeated."),
]


def one_of(*allowed: str) -> Any:
    """An option that takes one of these words: the arguments of ``typer.Option``."""
    return {"parser": _choice({word: word for word in allowed}), "metavar": "|".join(allowed)}


def vocab_rows() -> Any:
    """An option that takes a number of rows, or a word for one."""
    words = ("all", "tokenizer", "keep")

    def parse(text: str) -> str | int:
        if text.isascii() and text.isdigit() and int(text) > 0:
            return int(text)
        if text not in words:
            raise typer.BadParameter(f"{text!r} isn't a number of rows, {', '.join(words)}.")
        return text

    return {"parser": parse, "metavar": f"N|{'|'.join(words)}"}


def _choice(words: dict[str, str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise typer.BadParameter(f"{text!r} isn't one of {', '.join(words)}.")
        return words[text]

    return parse


GqaOrder = Annotated[
    str | None,
    typer.Option(
        **one_of("grouped", "interleaved"),
        help="Rows of grouped-query attention in a GPT-NeoX checkpoint whose files don't tell: "
        "grouped since 2024-11, interleaved before.",
    ),
]
IgnoreKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-key",
        metavar="NAME",
        help="An unknown key of the source's settings that does not matter; may be repeated. "
        "A key that seems to change the model stops the conversion without this.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="The same as JSON on stdout; errors stay on stderr.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors (and --json).")]

RUN = "How it runs"  # the panel of these
DryRun = Annotated[
    bool, typer.Option("--dry-run", rich_help_panel=RUN, help="Print the plan and write nothing.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=RUN, help="Replace DST where it exists.")
]
Movers = Annotated[
    int | None,
    typer.Option(
        "--max-workers", min=1, metavar="N", rich_help_panel=RUN, help="Threads that move bytes."
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        rich_help_panel=RUN,
        help="Don't read the result back and compare it with the source.",
    ),
]

_DTYPES = {
    "keep": "keep",
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000 ** (n + 1) for n, letter in enumerate("KMGT")}
_UNITS |= {f"{letter}IB": 1024 ** (n + 1) for n, letter in enumerate("KMGT")}


def dtype() -> Any:
    """An option that takes a floating dtype, or its short name."""
    return {"parser": _choice(_DTYPES), "metavar": "keep|float32|float16|bfloat16"}


def size() -> Any:
    """An option that takes a number of bytes, as Hugging Face's libraries do."""
    return {"parser": parse_size, "metavar": "SIZE"}


_TREES = "neox:TREE|neox@DATE|today"
_TARGETS = "neox:TREE|neox@2024-03|today|transformers@4.48"


def era(*, resumes: bool = False) -> Any:
    """An option that takes what will load the result: an ``Era``, or ``TransformersFacts``.

    resumes: whether only a GPT-NeoX makes sense; it is for the caller to refuse others.
    """
    return {"parser": _parse_era, "metavar": _TREES if resumes else _TARGETS}


def target() -> Any:
    """An option that takes a GPT-NeoX tree, one of some time, or a version of transformers."""
    return {"parser": _parse_target, "metavar": _TARGETS}


def parse_size(text: str | int) -> int:
    """Bytes of 5GB (powers of 1000), 5GiB (powers of 1024) or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip(), re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    count = float(match[1]) * unit if match and unit else 0.0
    if count < 1:
        raise typer.BadParameter(f"{text!r} isn't a size: write 5GB, 500MB, 2GiB or bytes.")
    assert match is not None
    return int(match[1]) * (unit or 1) if match[1].isdigit() else int(count)


def _parse_era(text: str) -> Any:
    from neox_bridge.errors import BridgeError
    from neox_bridge.frameworks.eras import era_named

    try:
        return era_named(text)
    except BridgeError:
        found = _parse_target(text)
        return getattr(found, "era", found)


def _parse_target(text: str) -> Any:
    from neox_bridge.errors import BridgeError
    from neox_bridge.frameworks.targets import target_named

    try:
        return target_named(text)
    except BridgeError as error:
        raise typer.BadParameter(str(error)) from None
