"""Loads a model with transformers and saves it again: by_transformers.py SOURCE TARGET."""

import sys

from transformers import AutoModelForCausalLM

source, target = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)
