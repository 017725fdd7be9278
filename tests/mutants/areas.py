"""The areas that `make mutants` measures: their modules, and the tests that belong to them."""

from dataclasses import dataclass

_PACKAGE = "src/neox_bridge"


@dataclass(frozen=True, slots=True)
class Area:
    """A part of the package and its tests.

    Attributes:
        modules: Paths below the package; a path without a suffix is a folder or a glob.
        tests: Files of tests, the quickest and most telling first.
        quick: How many of these files are asked before the others.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    quick: int = 1

    def patterns(self) -> tuple[str, ...]:
        """Globs of the modules, relative to the repository."""
        return tuple(f"{_PACKAGE}/{name}.py" for name in self.modules)


AREAS: dict[str, Area] = {
    "durability": Area(
        (
            "execution/staging",
            "execution/install",
            "execution/exchange",
            "execution/flushing",
            "execution/journal",
            "execution/work",
            "execution/output",
            "execution/execute",
            "execution/disk",
            "execution/units",
            "execution/placement",
        ),
        (
            "tests/execution/test_staging.py",
            "tests/execution/test_durability.py",
            "tests/execution/test_unfinished.py",
            "tests/execution/test_execution.py",
            "tests/verification/test_hashes.py",
            "tests/execution/test_reserving.py",
            "tests/batches/test_batch.py",
        ),
    ),
    "verification": Area(
        (
            "verification/verify",
            "verification/equal",
            "verification/compare",
            "verification/sealed",
            "verification/causes",
            "verification/logits",
        ),
        (
            "tests/verification/test_verify_tiny.py",
            "tests/planning/test_records.py",
            "tests/verification/test_logits_tiny.py",
            "tests/verification/test_equal.py",
            "tests/doctor/test_verdicts.py",
            "tests/verification/test_verify.py",
            "tests/verification/test_hashes.py",
            "tests/verification/test_logits.py",
        ),
        quick=3,
    ),
    "audit": Area(
        ("verification/audit*", "verification/steps", "verification/runs"),
        (
            "tests/verification/test_audit_boundaries.py",
            "tests/verification/test_audit_folders.py",
            "tests/verification/test_audit.py",
            "tests/verification/test_audit_states.py",
        ),
        quick=2,
    ),
    "judges": Area(
        (
            "frameworks/detectors",
            "frameworks/targets",
            "doctor/diagnose",
            "frameworks/facts",
            "doctor/*",
            "frameworks/eras",
        ),
        (
            "tests/frameworks/test_version_boundaries.py",
            "tests/doctor/test_judges.py",
            "tests/test_facts.py",
            "tests/architectures/test_mlp_biases.py",
            "tests/doctor/test_explain.py",
            "tests/doctor/test_doctor.py",
            "tests/doctor/test_advice.py",
        ),
        quick=2,
    ),
    "batch": Area(
        ("batches/target_state", "batches/items", "batches/row", "batches/run", "batches/watch"),
        (
            "tests/batches/test_batch_inline.py",
            "tests/planning/test_records.py",
            "tests/batches/test_batch.py",
        ),
        quick=2,
    ),
    "derived": Area(
        (
            "planning/neox_yml",
            "layouts/derived_values",
            "planning/vocabulary",
            "optimizer/mp_rank",
            "planning/common",
            "planning/option_checks",
            "optimizer/gradient_scale",
            "layouts/window",
            "layouts/unknown_keys",
            "frameworks/unknown_keys",
            "frameworks/check_keys",
            "frameworks/keys",
            "frameworks/deepspeed",
            "formats/yml",
        ),
        (
            "tests/layouts/test_derived_boundaries.py",
            "tests/layouts/test_settings.py",
            "tests/execution/test_beside_weights.py",
            "tests/layouts/test_unknown_keys.py",
            "tests/optimizer/test_gradient_scale.py",
            "tests/layouts/test_window.py",
            "tests/planning/test_usage.py",
            "tests/planning/test_planning.py",
        ),
        quick=2,
    ),
    "formats": Area(
        (
            "formats/pickles",
            "formats/pickle_folds",
            "formats/pickle_security",
            "formats/torch_zip",
            "formats/torch_legacy",
            "formats/zip_directory",
            "formats/tar",
            "formats/tensor_values",
            "formats/bounded_json",
            "formats/safetensors",
        ),
        (
            "tests/formats/test_format_boundaries.py",
            "tests/formats/test_pickles.py",
            "tests/formats/test_zip_readers.py",
            "tests/formats/test_attacks_pt.py",
            "tests/formats/test_security.py",
            "tests/formats/test_torch_files.py",
        ),
        quick=2,
    ),
    "exits": Area(
        (
            "cli/errors",
            "cli/app",
            "cli/command",
            "cli/conversion",
            "cli/execution",
            "cli/verify",
            "cli/audit",
            "cli/streams",
            "wording",
            "cli/values",
            "cli/options",
        ),
        (
            "tests/cli/test_exits.py",
            "tests/doctor/test_verdicts.py",
            "tests/planning/test_usage.py",
            "tests/cli/test_cli.py",
            "tests/cli/test_bad_input.py",
        ),
    ),
}
