"""Published training runs in GPT-NeoX format by name, with their converted versions (twins).

EleutherAI publishes the files that its trainer wrote as EleutherAI/neox-ckpt-pythia-SIZE: a branch
``stepN`` for each checkpoint, or the last checkpoint on ``main``. EleutherAI/pythia-SIZE holds the
same models converted for transformers. The table contains repositories that are known to exist. For
other names of the same form, errors suggest a repository, but nothing depends on it.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

OWNER = "EleutherAI"
# its tokenizer.json is the 20B_tokenizer.json that yml files name
TOKENIZER_REPO = f"{OWNER}/gpt-neox-20b"
_PREFIX = "neox-ckpt-"
_NAME = re.compile(
    r"(?P<prefix>neox-ckpt-)?pythia-(?P<size>14m|31m|70m|160m|410m|1b|1\.4b|2\.8b|6\.9b|12b)"
    r"(?P<variant>-deduped|-(?:data-|weight-)?seed\d)?(?P<version>-v[01])?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Suite:
    """A repository of GPT-NeoX checkpoints.

    Attributes:
        repo: ``org/name``.
        twin: The repository of the same models for transformers; None if none is known.
        checkpoints: The number of branches ``stepN`` in its model card; None if it has no card.
    """

    repo: str
    twin: str | None
    checkpoints: int | None = None


def _suites() -> tuple[Suite, ...]:
    """The repositories on pages of the Hub: model cards (with counts), file lists, commits."""
    counts = {"160m": 154, "410m-seed8": 154, "14m-seed0": 154, "12b-deduped": 20}
    names = (
        *("14m-seed0", "70m", "70m-v1", "70m-deduped-v0", "70m-deduped-v1"),
        *("160m", "160m-v1", "160m-deduped-v0", "160m-deduped-v1"),
        *("410m", "410m-seed8", "410m-deduped-v1", "1b-deduped-v1", "2.8b-deduped"),
        *("6.9b-v1", "6.9b-deduped-v1", "12b-v1", "12b-deduped"),
    )
    return tuple(
        Suite(repo := f"{OWNER}/{_PREFIX}pythia-{name}", twin_of(repo), counts.get(name))
        for name in names
    )


def twin_of(repo: str) -> str | None:
    """The repository of a suite's models for transformers; None for other repositories.

    Twins of version v1 have no version in their names; those of v0 do. The run with seed 0 has no
    twin, because the published seeds begin at 1.
    """
    owner, _, name = repo.partition("/")
    match = _NAME.fullmatch(name)
    if owner.lower() != OWNER.lower() or match is None or not match["prefix"]:
        return None
    twin = f"{OWNER}/{name.lower().removeprefix(_PREFIX).removesuffix('-v1')}"
    return None if match["variant"] == "-seed0" else twin


def full_id(name: str) -> str | None:
    """``EleutherAI/NAME`` for a name of the form of the suites; None for other names."""
    return f"{OWNER}/{name.lower()}" if _NAME.fullmatch(name) else None


def nearest(repo: str) -> str | None:
    """The known repository or twin whose name is nearest to a missing one; None if none is near."""
    known = {repo.lower(): repo for suite in SUITES for repo in (suite.repo, suite.twin) if repo}
    word = repo.lower() if "/" in repo else f"{OWNER}/{repo}".lower()
    matches = get_close_matches(word, [name for name in known if name != word], 1, 0.85)
    return known[matches[0]] if matches else None


SUITES = _suites()
