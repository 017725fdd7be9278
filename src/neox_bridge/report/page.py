"""Renders sections as one self-contained HTML page."""

from collections.abc import Sequence
from importlib.resources import files

from neox_bridge.extras import missing
from neox_bridge.report.parts import Facts, Section, Verdict, worst
from neox_bridge.version import __version__
from neox_bridge.wording import plural, wording

# a symbol beside the color, for readers who cannot see it and for print
SIGNS = {"good": "✓", "neutral": "i", "warning": "!", "differs": "≠", "bad": "✗"}


def require() -> None:
    """Raise BridgeError early if jinja2 or matplotlib is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing(f"{error.name} is missing, which reports need", "report") from None


def verdict_of(sections: Sequence[Section]) -> Verdict:
    """The verdict of the page: that of its worst section, or a count."""
    state = worst(section.verdict.state for section in sections)
    like = [section for section in sections if section.verdict.state == state]
    if len(sections) == 1 or (len(like) == len(sections) == 2 and state == "good"):
        return Verdict(state, ". ".join(section.verdict.words for section in like))
    if len(like) == 1 and state != "good":
        return Verdict(state, f"{like[0].kind}, {like[0].title}: {like[0].verdict.words}")
    count, of = f"{len(like):,}", plural(len(sections), "result")
    words = {
        "good": f"{count} of {of} hold; the others have no findings",
        "neutral": f"{of}, nothing to check",
        "warning": f"Warnings in {count} of {of}",
        "differs": f"Differences in {count} of {of}",
        "bad": f"Faults in {count} of {of}",
    }
    if len(like) == len(sections) and state == "good":
        return Verdict(state, f"All {of} hold")
    return Verdict(state, words[state])


def _shown(value: object) -> object:
    """Make a template value safe: names cannot change the text direction after them."""
    return wording(value) if type(value) is str else value  # plots are Markup


def render(title: str, sections: Sequence[Section], read: Facts, date: str) -> str:
    """The page as text: the same for the same arguments.

    read: the inputs, with their provenance. Names in the sections are escaped; plots are inserted
    unchanged. Raises BridgeError if jinja2 is missing.
    """
    require()
    from jinja2 import Environment, StrictUndefined

    template = files("neox_bridge.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.from_string(template).render(
        title=title,
        sections=sections,
        verdict=verdict_of(sections),
        signs=SIGNS,
        read=read,
        date=date,
        version=__version__,
    )
