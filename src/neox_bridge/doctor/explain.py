"""Explains pasted tracebacks of GPT-NeoX, DeepSpeed, torch and transformers.

The messages are those of GPT-NeoX megatron/checkpointing.py (``check_checkpoint_args``) and
megatron/neox_arguments/arguments.py, DeepSpeed runtime/state_dict_factory.py, runtime/engine.py and
runtime/pipe/module.py, and torch serialization.py.
"""

import re
from collections.abc import Callable, Iterator

from neox_bridge.doctor.explain_keys import KEY_RULES, VOCABULARY_SETTINGS
from neox_bridge.doctor.messages import (
    CONVERT,
    EXPORT,
    FIX,
    OTHER_TP,
    PATCH_SCRIPTS,
    Diagnosis,
    Message,
    Older,
    read_message,
)
from neox_bridge.findings import Command
from neox_bridge.frameworks.changes import CHANGES, change_named
from neox_bridge.frameworks.eras import FLAG, LATER_ERAS, known_keys
from neox_bridge.wording import sentence

# the scripts that neox-bridge patch rewrites, without "convert_"
_PATCHED_SCRIPTS = ("neox_to_hf", "hf_to_sequential", "hf_llama_to_neox", "neox_to_mamba_ssm")
_NO_ADJUSTMENT = r"Automatic adjustment|ZeRORuntimeException"
_WEIGHTS_ALONE = "continue from the weights alone, in the yml: finetune: true"


def recognise(text: str) -> list[Diagnosis]:
    """Every cause that is recognized in a pasted output."""
    message = read_message(text)
    causes: dict[tuple[str, str], Diagnosis] = {}
    for rule in (*KEY_RULES, *_SENTENCES):
        for diagnosis in rule(message):
            causes.setdefault((diagnosis.code, diagnosis.older), diagnosis)
    if not causes:
        for diagnosis in _by_changes(message.text):
            causes.setdefault((diagnosis.code, ""), diagnosis)
    return list(causes.values())


def _by_changes(text: str) -> Iterator[Diagnosis]:
    """The known changes that cause this message, if no rule knows more."""
    for change in CHANGES:
        for pattern in change.in_error:
            if match := re.search(pattern, text, re.M):
                origin = f"This came with {change.named}."
                if change.proposed:
                    origin = f"{change.pull} proposes this. It is not merged."
                cause = f"{sentence(change.title)} {origin}"
                yield Diagnosis(change.id, cause, change.remedy, (match[0],), more=(change.link,))
                break


def _args(m: Message) -> Iterator[Diagnosis]:
    pattern = (
        r"(\w+) value from checkpoint \(([^)\n]*)\) is not equal to the currently set argument "
        r"value \(([^)\n]*)\)"
    )
    options = {
        "model_parallel_size": "tp",
        "make_vocab_size_divisible_by": "vocab-multiple",
        "padded_vocab_size": "vocab-multiple",
    }
    for key, stored, now in re.findall(pattern, m.text):
        needs = [(options[key], now)] if key in options and now.isdecimal() else []
        is_padding = key == "padded_vocab_size"
        if is_padding and needs and stored.isdecimal() and int(now) < int(stored):
            needs.append(("vocab-rows", "tokenizer"))
        as_saved = f"in the yml: {key}: {stored}"
        yield Diagnosis(
            "checkpoint-args",
            f"The checkpoint was saved with {key}: {stored}, and the run has {now}. GPT-NeoX "
            "compares the args in the mp_rank files with its own.",
            "" if needs or is_padding else as_saved,
            (key,),
            tuple(needs),
            settings=VOCABULARY_SETTINGS if is_padding else (),
            others=(as_saved,) if needs and not is_padding else (),
        )
    if "padded_vocab_size" in m.text and not re.search(pattern, m.text):
        yield Diagnosis(
            "checkpoint-args",
            "GPT-NeoX pads the vocabulary to a multiple of make_vocab_size_divisible_by x "
            "model_parallel_size, and gets another number of rows than the checkpoint has.",
            "",
            ("padded_vocab_size",),
            settings=VOCABULARY_SETTINGS,
            others=(Command(f"{CONVERT}   # pads the vocabulary again"),),
        )


def _layout(m: Message) -> Iterator[Diagnosis]:
    ranks, again = change_named("neox-pipe-1-ranks"), change_named("neox-pipe-1-again")
    if re.search(r"Expected state_dict to be dict-like, got <class 'NoneType'>", m.text):
        first = change_named("neox-pipe-1-layers")
        yield Diagnosis(
            "layout",
            "The checkpoint has one file per layer, and the run expects one file per rank: "
            f"pipe_parallel_size: 0, or 1 in a tree from {ranks.date} to {again.date} or before "
            f"{first.date}.",
            "",
            ("module",),
            (("layout", "ranks"),),
            others=("in the yml: pipe_parallel_size: 1 (2 in a tree of those times)",),
            more=(again.link,),
        )
    if re.search(r"KeyError: 'module'", m.text):
        yield Diagnosis(
            "layout",
            "The checkpoint has one file per rank, and the run expects one file per layer "
            "(pipe_parallel_size: 1 or more).",
            "",
            ("module",),
            (("layout", "layers"),),
            others=("in the yml: pipe_parallel_size: 0",),
            more=(again.link,),
        )
    if match := re.search(r"key: (\S+) is not found in the checkpoint (\S+)", m.text):
        yield Diagnosis(
            "tensor-parallel",
            f"DeepSpeed cannot merge {match[1]} from the files of several ranks ({match[2]}): the "
            "checkpoint has more tensor-parallel ranks than the run.",
            OTHER_TP,
            (match[1],),
            settings=("model_parallel_size",),
        )
    pattern = r"checkpoint count (\d+) is different from saved mp_world_size (\d+)"
    if match := re.search(pattern, m.text):
        yield Diagnosis(
            "mp-world-size",
            f"The folder has {match[1]} mp_rank files, and they say that there are {match[2]}. "
            "Some are left over from another layout, or some are missing.",
            FIX,
            ("mp_world_size",),
            others=(Command(CONVERT),),
        )


def _optimizer(m: Message) -> Iterator[Diagnosis]:
    pattern = r"used a DP\s+world size of (\d+) but the\s+current world size is (\d+)"
    match = re.search(pattern, m.text)
    if match or re.search(_NO_ADJUSTMENT, m.text):
        saved, now = match.groups() if match else ("another number of", "another")
        yield Diagnosis(
            "zero-world-size",
            f"The optimizer states were saved by {saved} data-parallel ranks, and this run has "
            f"{now}. DeepSpeed does not repartition ZeRO's states.",
            Command(
                "neox-bridge reshard CHECKPOINT NEW --dp "
                + (now if match else "N   # N: the run's data-parallel ranks")
            ),
            ("dp_world_size",),
            (("dp", now),) if match else (),
            resumes=True,
            others=(
                f"run with {f'{saved} data-parallel ranks' if match else 'as many ranks'}",
                _WEIGHTS_ALONE,
            ),
        )
    if re.search(r"Empty ds_version in checkpoint", m.text):
        yield Diagnosis(
            "optimizer-version",
            "The optimizer states have no ds_version, like those of GPT-NeoX v1.0, and later "
            "trees cannot resume from them. The weights are not affected.",
            Command("neox-bridge reshard CHECKPOINT NEW --for today"),
            ("ds_version",),
            (("for", "today"),),
            resumes=True,
            others=(_WEIGHTS_ALONE,),
            more=(change_named("neox-deepspeed-08").link,),
            older="checkpoint",
        )
    if re.search(r"KeyError: 'csr_tensor_module_names'", m.text):
        yield Diagnosis(
            "sparse-tensor-names",
            "This is GPT-NeoX v1.0 or older with DeeperSpeed 0.3.15, and the checkpoint is of a "
            "newer GPT-NeoX. DeepSpeed 0.5.5 renamed csr_tensor_module_names to "
            "sparse_tensor_module_names.",
            Command(f"{CONVERT} --for neox@v1.0"),
            ("csr_tensor_module_names",),
            (("for", "neox@v1.0"),),
            others_with_states=(
                Command(
                    "neox-bridge reshard CHECKPOINT NEW --for neox@v1.0   # with its optimizer"
                ),
            ),
            more=(change_named("neox-deepspeed-08").link,),
            older="framework",
        )
    absent = r"'NoneType' object is not subscriptable"
    where = r"start_lr|lr_scheduler|learning_rates\.py|load_checkpoint|optimizer"
    framed = re.search(r'^\s*File "', m.text, re.M)
    if re.search(absent, m.text) and (not framed or re.search(where, m.text)):
        yield Diagnosis(
            "no-optimizer-states",
            "The checkpoint has only weights (no learning rate and no optimizer states), and the "
            "run tries to resume from it.",
            "in the yml: finetune: true",
            ("lr_scheduler",),
        )


def _scripts(m: Message) -> Iterator[Diagnosis]:
    """GPT-NeoX's conversion scripts read only the tensor names of their version."""
    scripts = r"convert_(\w+)\.py"
    weight = r"KeyError: '((?:\w+\.)+(?:weight|bias|scale|inv_freq))'"
    for key in re.findall(weight, m.text):
        script = re.search(scripts, m.text)
        to_hf = script is not None and re.search(r"to_hf", script[1])
        to_neox = script is not None and not to_hf
        patched = script is not None and script[1] in _PATCHED_SCRIPTS
        commands = (EXPORT, Command(CONVERT))
        remedy, other = commands if to_hf or not to_neox else reversed(commands)
        yield Diagnosis(
            "conversion-script",
            f"A conversion script reads {key}, which the checkpoint does not have. GPT-NeoX's "
            "scripts know only the names of their own time.",
            remedy,
            (key,),
            others=(PATCH_SCRIPTS,) if patched else () if script else (other,),
        )


def _yml(m: Message) -> Iterator[Diagnosis]:
    if "NeoXArgs" in m.text or "neox_arguments" in m.text:
        for key in re.findall(r"__init__\(\) got an unexpected keyword argument '(\w+)'", m.text):
            yield _unknown_key(key)
    pattern = r"Conf file (\S+) has the following duplicate keys with previously loaded file: (\S+)"
    for file, key in re.findall(pattern, m.text):
        yield Diagnosis(
            "duplicate-key",
            f"{key} is in {file} and in a yml before it. GPT-NeoX rejects a key that is in two yml "
            "files.",
            f"remove {key} from one of the yml files",
            (key,),
        )


def _unknown_key(key: str) -> Diagnosis:
    changes = [change for change in CHANGES if key in change.keys]
    knows = [era for era in LATER_ERAS if key in known_keys(era)]
    cause = f"This GPT-NeoX does not know the yml key {key}, and rejects keys that it does not know"
    if knows:
        cause += f". Known by {', '.join(f'neox@{era.name}' for era in knows)}"
    remedy = f"remove {key} from the yml"
    remedy += ", or use a GPT-NeoX that knows it" if knows else ""
    if changes and key != FLAG:
        remedy = changes[0].remedy
    newer = bool(knows) and LATER_ERAS[-1] in knows
    older: Older = "framework" if newer else "checkpoint" if knows else ""
    return Diagnosis(
        changes[0].id if changes else "unknown-yml-key",
        f"{cause}.",
        remedy,
        (key,),
        older=older,
        by_convert=bool(knows),
        others=(remedy,) if knows else (),
        more=tuple(change.link for change in changes),
    )


def _torch(m: Message) -> Iterator[Diagnosis]:
    if "Weights only load failed" in m.text:
        names = re.findall(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.]+\w)", m.text)
        unique = tuple(dict.fromkeys(names))
        yield Diagnosis(
            "torch-weights-only",
            "torch 2.6 and newer reject files that contain more than tensors, such as GPT-NeoX's "
            f"mp_rank and optimizer files ({', '.join(unique) or 'pickled objects'}). neox-bridge "
            "reads such files and executes nothing.",
            EXPORT,
            unique,
            older="checkpoint",
            others=("in your code: torch.load(…, weights_only=False), for a file that you trust",),
        )
    for name in re.findall(r"No module named '(deepspeed|megatron|apex)[\w.]*'", m.text):
        if re.search(r"find_class|serialization\.py|unpickl", m.text, re.I):
            yield Diagnosis(
                "pickled-class",
                f"The file names classes of {name}, which is not installed here. neox-bridge reads "
                "it without them.",
                EXPORT,
                (name,),
            )


_SENTENCES: tuple[Callable[[Message], Iterator[Diagnosis]], ...] = (
    _args,
    _layout,
    _optimizer,
    _scripts,
    _yml,
    _torch,
)
