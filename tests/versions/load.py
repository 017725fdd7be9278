"""Loads a folder with the transformers of this environment and saves what it computes.

load.py FOLDER TOKENS.npz OUT.npz: prints one line of JSON with what the model's config says.
"""

import json
import sys

import numpy as np
import torch
import transformers

folder, tokens, out = sys.argv[1:4]
model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
model = model.float().eval()
with torch.no_grad():
    logits = model(torch.from_numpy(np.load(tokens)["tokens"])).logits
np.savez(out, logits=logits.float().numpy())
# buffers that a version derives are no weights
keys = [k for k in info["missing_keys"] if not k.endswith((".inv_freq", ".bias", ".masked_bias"))]
if model.config.tie_word_embeddings:  # old versions call the tied head missing, and tie it
    keys = [key for key in keys if key != "embed_out.weight"]
print(
    json.dumps(
        {
            "version": transformers.__version__,
            "missing": sorted(keys),
            "unexpected": sorted(info["unexpected_keys"]),
        }
    )
)
