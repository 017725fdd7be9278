"""Runs DeepSpeed's own ds_to_universal.py on a GPT-NeoX checkpoint.

to_universal.py STEP OUT [INFO]: STEP is a global_stepN, OUT the folder to write, INFO an mp_rank
file whose universal_checkpoint_info is taken, or left out: DeepSpeed then injects an empty one.
It can't read GPT-NeoX's folders as they are: it looks for layer_01, which has no parameters there,
and for universal_checkpoint_info, which GPT-NeoX doesn't save. Both are put into a copy.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
from deepspeed.checkpoint import ds_to_universal

STEP, OUT, *INFO = sys.argv[1:]


def main() -> None:
    copy = Path(OUT).parent / "copy"
    shutil.copytree(STEP, copy)
    for path in copy.glob("layer_00-*"):
        torch.save({}, path.with_name(path.name.replace("layer_00", "layer_01")))
    for path in copy.glob("mp_rank_*") if INFO else ():
        told = torch.load(INFO[0], weights_only=False)
        value = torch.load(path, weights_only=False)
        value["universal_checkpoint_info"] = told["universal_checkpoint_info"]
        torch.save(value, path)
    sys.argv = ["ds_to_universal.py", "--input_folder", str(copy), "--output_folder", OUT]
    sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    sys.argv += [] if INFO else ["--inject_missing_state"]
    ds_to_universal.main(ds_to_universal.parse_arguments())


main()
