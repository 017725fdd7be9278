"""What makes GPT-NeoX's conversion scripts call neox-bridge: one function for each.

patch/scripts.py copies the function of a script, and those that it calls, into the
script as they are: they use the standard library and PyYAML, which GPT-NeoX needs too,
and are wrapped as that tree is (88 columns). They do not import neox_bridge, which may
be installed elsewhere.
"""

# mypy: allow-untyped-defs, allow-untyped-calls


# neox-bridge put this here: neox-bridge converts in place of this script's code.
# `neox-bridge patch --revert` takes it out again.
def _neox_bridge_run(arguments):
    """Run neox-bridge. If it fails, the script ends with its exit code."""
    import shlex
    import subprocess

    command = ["neox-bridge", *arguments]
    shown = " ".join(shlex.quote(word) for word in command)
    print(f"neox-bridge: this script is patched and runs: {shown}", flush=True)
    code = subprocess.call([*_neox_bridge_program(), *arguments])
    if code:
        raise SystemExit(code)


def _neox_bridge_program():
    """The command neox-bridge: of this Python if it is installed there, or on PATH."""
    import importlib.util
    import shutil
    import sys

    if importlib.util.find_spec("neox_bridge"):
        return [sys.executable, "-m", "neox_bridge"]
    program = shutil.which("neox-bridge")
    if program is None:
        raise SystemExit(
            "neox-bridge: this script is patched to call neox-bridge, which is not "
            "installed. Install it, or restore the script: neox-bridge patch --revert."
        )
    return [program]


def _neox_bridge_refuse(option, advice):
    raise SystemExit(f"neox-bridge: {option} is not supported. Instead, {advice}.")


def _neox_bridge_need(args, *options):
    """Refuse a command line without an option that the script needs as well."""
    for option in options:
        if not getattr(args, option.strip("-").replace("-", "_")):
            raise SystemExit(f"neox-bridge: this script needs {option}.")


def _neox_bridge_settings(paths):
    """The settings of ymls, with underscores in their keys."""
    import yaml

    settings = {}
    for path in paths:
        with open(path) as file:
            for key, value in (yaml.safe_load(file) or {}).items():
                settings[key.replace("-", "_")] = value
    return settings


def _neox_bridge_tree():
    """What --for says: this source tree will load the checkpoint."""
    import os

    folder = os.path.dirname(os.path.abspath(__file__))
    return ["--for", "neox:" + os.path.dirname(os.path.dirname(folder))]


def _neox_bridge_to_hf(args, overwrite_values):
    """The arguments for the options that the exporters have in common."""
    _neox_bridge_need(args, "--input_dir", "--config_file", "--output_dir")
    if overwrite_values:
        _neox_bridge_refuse("overwrite_values", "write the values into the yml")
    if args.no_save_tokenizer:
        advice = "delete the tokenizer afterwards; it is written if there is one"
        _neox_bridge_refuse("--no_save_tokenizer", advice)
    arguments = ["convert", args.input_dir, args.output_dir, "--to", "hf"]
    arguments += ["--config", args.config_file]
    if args.precision != "auto":  # auto keeps the dtype of the checkpoint
        arguments += ["--dtype", args.precision]
    return arguments


def _neox_bridge_convert_neox_to_hf(args, overwrite_values):
    import json
    import os
    import subprocess

    arguments = _neox_bridge_to_hf(args, overwrite_values)
    if getattr(args, "pad_token_id", -1) != -1:
        advice = "set pad_token_id in config.json afterwards"
        _neox_bridge_refuse("--pad-token-id", advice)
    settings = _neox_bridge_settings([args.config_file])
    tokenizer = settings.get("vocab_file") or ""
    if getattr(args, "vocab_is_hf_tokenizer", False):
        arguments += ["--tokenizer", os.path.dirname(tokenizer) or "."]
    elif settings.get("tokenizer_type") == "HFTokenizer" and os.path.isfile(tokenizer):
        arguments += ["--tokenizer", tokenizer]
    inspect = ["inspect", args.input_dir, "--config", args.config_file, "--json"]
    command = [*_neox_bridge_program(), *inspect]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    family = json.loads(done.stdout.decode())["family"]
    architecture = "neox" if family == "gpt_neox" else family
    if args.architecture != architecture:
        advice = f"give --architecture {architecture}: the settings say so"
        if architecture not in ("neox", "llama", "mistral"):
            advice = f"run neox-bridge convert, which writes {architecture}"
        _neox_bridge_refuse(f"--architecture {args.architecture}", advice)
    _neox_bridge_run(arguments)


def _neox_bridge_convert_neox_to_mamba_ssm(args, overwrite_values):
    arguments = _neox_bridge_to_hf(args, overwrite_values)
    _neox_bridge_run([*arguments, "--format", "mamba_ssm"])


def _neox_bridge_merge20b(args):
    _neox_bridge_need(args, "--input_dir", "--output_dir")
    arguments = ["convert", args.input_dir, args.output_dir, "--to", "neox"]
    _neox_bridge_run([*arguments, "--step", "150000", "--tp", "1", "--pp", "1"])


def _neox_bridge_convert_hf_to_sequential(args):
    import os

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        advice = "run one process, which writes the files of all ranks"
        _neox_bridge_refuse("a launcher of several processes", advice)
    _neox_bridge_need(args, "--hf-model-name", "--output-dir", "--config")
    name, revision = f"EleutherAI/{args.hf_model_name}", f"step{args.revision}"
    if args.download_only:
        advice = f"run hf download {name} --revision {revision}"
        _neox_bridge_refuse("--download-only", advice)
    source = name if os.path.isdir(name) else f"{name}@{revision}"
    # transformers' cache, which an earlier run with --download-only filled
    cache = os.path.join(args.cache_dir, args.hf_model_name, revision)
    cache = os.path.join(cache, "models--" + name.replace("/", "--"))
    reference = os.path.join(cache, "refs", revision)
    if os.path.isfile(reference):
        with open(reference) as file:
            source = os.path.join(cache, "snapshots", file.read().strip())
    settings = _neox_bridge_settings(args.config)
    for key, value in settings.items():
        if key.startswith("te_") and value:
            advice = "run neox-bridge convert --te"
            _neox_bridge_refuse(f"{key} in the yml", advice)
    output = os.path.normpath(args.output_dir)
    arguments = ["convert", source, output, "--to", "neox", *_neox_bridge_tree()]
    arguments += ["--tp", str(settings.get("model_parallel_size") or 1)]
    arguments += ["--pp", str(settings.get("pipe_parallel_size") or 0)]
    if settings.get("make_vocab_size_divisible_by"):
        multiple = str(settings["make_vocab_size_divisible_by"])
        arguments += ["--vocab-multiple", multiple]
    if settings.get("rotary_save_freqs_buffer"):
        arguments += ["--inv-freq", "store"]
    _neox_bridge_run(arguments)
    _neox_bridge_name_latest(output)
    if args.test:
        _neox_bridge_run(["verify", source, output, "--logits"])


def _neox_bridge_name_latest(output):
    """Name the checkpoint in the folder above, as the script does."""
    import os

    above, folder = os.path.split(os.path.abspath(output))
    with open(os.path.join(output, "latest")) as file:
        step = f"{folder}/{file.read().strip()}"
    latest = os.path.join(above, "latest")
    if os.path.exists(latest):
        with open(latest) as file:
            other = file.read().strip()
        if other != step:
            print(f"neox-bridge: {latest} still names {other}. Set load to {output}.")
        return
    with open(latest, "w") as file:
        file.write(step)


def _neox_bridge_convert_hf_llama_to_neox(args):
    _neox_bridge_need(args, "--model", "--model_path")
    arguments = ["convert", args.model, args.model_path, "--to", "neox"]
    arguments += [*_neox_bridge_tree(), "--tp", str(args.tp), "--pp", str(args.pp)]
    _neox_bridge_run(arguments)


def _neox_bridge_convert_raw_llama_weights_to_neox(args):
    import os

    _neox_bridge_need(args, "--input_dir", "--model_size", "--output_dir")
    if args.model_size == "tokenizer_only":
        advice = "copy the tokenizer"
        _neox_bridge_refuse("--model_size tokenizer_only", advice)
    source = os.path.join(args.input_dir, args.model_size)
    arguments = ["convert", source, args.output_dir, "--to", "neox"]
    arguments += [*_neox_bridge_tree(), "--tp", str(args.num_output_shards)]
    arguments += ["--pp", "1" if args.pipeline_parallel else "0"]
    _neox_bridge_run(arguments)
