"""``verify`` and ``diff`` beside ``cmp`` of the same bytes."""

from measure import Job, Row, rounds
from places import Place
from sources import TOOL, must

CMP = "`cmp` of two copies"
CASES = (
    ("`verify` HF, a copy", "verify", "hf", "hf-copy"),
    ("`verify` HF, NeoX TP 1", "verify", "hf", "neox"),
    ("`verify` HF, NeoX TP 2", "verify", "hf", "neox-tp2"),
    ("`verify` HF, NeoX TP 2 in bfloat16", "verify", "hf", "neox-bf16"),
    ("`diff` HF, NeoX TP 1", "diff", "hf", "neox"),
    ("`diff` NeoX TP 1, TP 2", "diff", "neox", "neox-tp2"),
    ("`diff`, every value another", "diff", "hf", "hf-other"),
)
DIFFERENT = 3  # the exit code


def comparisons(place: Place, shape: str, runs: int) -> list[Row]:
    """The rows, ``cmp`` first. The folder has hf, neox, neox-tp2 and neox-bf16 already."""
    folder = place.folder
    hf = folder / "hf"
    must("cp", "-r", str(hf), str(folder / "hf-copy"))
    must(TOOL, "toy", shape, str(folder / "hf-other"), "--as", "hf", "--seed", "1")
    weights = [str(folder / name / "model.safetensors") for name in ("hf", "hf-copy")]
    base = Job(CMP, "cmp", ("cmp", *weights), hf)
    jobs = [
        Job(
            title,
            "tool",
            (TOOL, verb, *(str(folder / side) for side in sides)),
            folder / sides[1],
            expected=DIFFERENT if "hf-other" in sides else 0,
        )
        for title, verb, *sides in CASES
    ]
    small = ("diff", str(hf), str(folder / "neox-tp2"), "--tensor", "*.final_layer_norm.bias")
    jobs.append(Job("`diff` of one small tensor", "tool", (TOOL, *small), hf))
    return rounds(jobs, [base], runs, place)[0]
