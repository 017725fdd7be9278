"""What a pasted traceback of GPT-NeoX, DeepSpeed, torch or transformers means, and what to do.

The sentences are those of GPT-NeoX megatron/checkpointing.py (``check_checkpoint_args``) and
megatron/neox_arguments/arguments.py, DeepSpeed runtime/state_dict_factory.py, runtime/engine.py and
runtime/pipe/module.py, and torch serialization.py.
"""

import re
from collections.abc import Callable, Iterator

from neox_bridge.doctor.explain_keys import KEY_RULES
from neox_bridge.doctor.messages import CONVERT, Diagnosis, Message, Older, read_message
from neox_bridge.frameworks.changes import CHANGES, change_named
from neox_bridge.frameworks.eras import LATER_ERAS, known_keys

_NO_ADJUSTMENT = r"Automatic adjustment|ZeRORuntimeException"


def recognise(text: str) -> list[Diagnosis]:
    """Every cause that is recognised in a pasted output; nothing where none is."""
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
    """The known changes whose messages stand there, where no rule says more."""
    for change in CHANGES:
        for pattern in change.in_error:
            if match := re.search(pattern, text, re.M):
                yield Diagnosis(change.id, change.title, change.remedy, (match[0],))
                break


def _args(m: Message) -> Iterator[Diagnosis]:
    pattern = (
        r"(\w+) value from checkpoint \(([^)\n]*)\) is not equal to the currently set argument "
        r"value \(([^)\n]*)\)"
    )
    for key, stored, now in re.findall(pattern, m.text):
        options = {
            "model_parallel_size": "tp",
            "make_vocab_size_divisible_by": "vocab-multiple",
            "padded_vocab_size": "vocab-multiple",
        }
        needs = [(options[key], now)] if key in options and now.isdecimal() else []
        same = f"in the yml: {key}: {stored}"
        if key == "padded_vocab_size":
            same = (
                "in the yml: the tokenizer, make_vocab_size_divisible_by and model_parallel_size "
                "as they were when the checkpoint was saved"
            )
            fewer = needs and stored.isdecimal() and int(now) < int(stored)
            needs += [("vocab-rows", "tokenizer")] if fewer else []
        yield Diagnosis(
            "checkpoint-args",
            f"the checkpoint was saved with {key}: {stored}, and the run has {now}; GPT-NeoX "
            "compares the args that mp_rank files hold with its own",
            same,
            (key,),
            tuple(needs),
            others=(same,) if needs else (),
        )
    if "padded_vocab_size" in m.text and not re.search(pattern, m.text):
        yield Diagnosis(
            "checkpoint-args",
            "GPT-NeoX pads the vocabulary to a multiple of make_vocab_size_divisible_by x "
            "model_parallel_size, and gets another number of rows than the checkpoint has",
            "in the yml: the tokenizer, make_vocab_size_divisible_by and model_parallel_size as "
            "they were when the checkpoint was saved",
            ("padded_vocab_size",),
            others=("pad anew: neox-bridge convert CHECKPOINT NEW --to neox",),
        )


def _layout(m: Message) -> Iterator[Diagnosis]:
    if re.search(r"Expected state_dict to be dict-like, got <class 'NoneType'>", m.text):
        yield Diagnosis(
            "layout",
            "the checkpoint holds layer files, and the run wants one file a rank: "
            "pipe_parallel_size: 0, or 1 in a tree of 2024-03-07 to 2024-06-07 or before "
            "2023-04-21",
            "",
            ("module",),
            (("layout", "ranks"),),
            others=("in the yml: pipe_parallel_size: 1 (2 in a tree of those times)",),
        )
    if re.search(r"KeyError: 'module'", m.text):
        yield Diagnosis(
            "layout",
            "the checkpoint holds one file a rank, and the run wants layer files "
            "(pipe_parallel_size: 1 or more)",
            "",
            ("module",),
            (("layout", "layers"),),
            others=("in the yml: pipe_parallel_size: 0",),
        )
    if match := re.search(r"key: (\S+) is not found in the checkpoint (\S+)", m.text):
        yield Diagnosis(
            "tensor-parallel",
            f"{match[1]} couldn't be put together from files of several ranks ({match[2]}): the "
            "checkpoint has more tensor-parallel ranks than the run",
            f"{CONVERT} --tp N, with the run's model_parallel_size",
            (match[1],),
        )
    pattern = r"checkpoint count (\d+) is different from saved mp_world_size (\d+)"
    if match := re.search(pattern, m.text):
        yield Diagnosis(
            "mp-world-size",
            f"the folder holds {match[1]} mp_rank files, and they say that there are {match[2]}: "
            "left-over files of another layout, or some are missing",
            "remove those of the other layout (neox-bridge doctor CHECKPOINT names them), or write "
            f"the folder anew: {CONVERT}",
            ("mp_world_size",),
        )


def _optimizer(m: Message) -> Iterator[Diagnosis]:
    pattern = r"used a DP\s+world size of (\d+) but the\s+current world size is (\d+)"
    match = re.search(pattern, m.text)
    if match or re.search(_NO_ADJUSTMENT, m.text):
        saved, now = match.groups() if match else ("another number of", "another")
        number = match[2] if match else "N"
        run_so = f"run with {saved} data-parallel ranks" if match else "run with as many ranks"
        yield Diagnosis(
            "zero-world-size",
            f"the optimizer's states were saved by {saved} data-parallel ranks, and this run has "
            f"{now}; DeepSpeed does not divide ZeRO's partitions anew",
            f"neox-bridge reshard CHECKPOINT NEW --dp {number}"
            + ("" if match else ", with N the run's data-parallel ranks"),
            ("dp_world_size",),
            others=(run_so, "go on from the weights alone, in the yml: finetune: true"),
        )
    if re.search(r"Empty ds_version in checkpoint", m.text):
        yield Diagnosis(
            "optimizer-version",
            "the optimizer's states have no ds_version, like those of GPT-NeoX v1.0, and later "
            "trees cannot resume from them. The weights are not affected",
            "neox-bridge reshard CHECKPOINT NEW --for today",
            ("ds_version",),
            others=("go on from the weights alone, in the yml: finetune: true",),
            more=change_named("neox-deepspeed-08").link,
            older="checkpoint",
        )
    if re.search(r"KeyError: 'csr_tensor_module_names'", m.text):
        yield Diagnosis(
            "sparse-tensor-names",
            "this is GPT-NeoX v1.0 or older with DeeperSpeed 0.3.15, and a newer GPT-NeoX wrote "
            "the checkpoint: csr_tensor_module_names is called sparse_tensor_module_names now",
            f"{CONVERT} --for neox@v1.0",
            ("csr_tensor_module_names",),
            (("for", "neox@v1.0"),),
            others=("with its optimizer: neox-bridge reshard CHECKPOINT NEW --for neox@v1.0",),
            more=change_named("neox-deepspeed-08").link,
            older="framework",
        )
    absent = r"'NoneType' object is not subscriptable"
    where = r"start_lr|lr_scheduler|learning_rates\.py|load_checkpoint|optimizer"
    framed = re.search(r'^\s*File "', m.text, re.M)
    if re.search(absent, m.text) and (not framed or re.search(where, m.text)):
        yield Diagnosis(
            "no-optimizer-states",
            "the checkpoint holds weights only (no learning rate, no optimizer states), and the "
            "run wants to resume from it",
            "in the yml: finetune: true",
            ("lr_scheduler",),
        )


def _scripts(m: Message) -> Iterator[Diagnosis]:
    """GPT-NeoX's own conversion scripts look for the names of their own time."""
    scripts = r"convert_(\w+)\.py"
    weight = r"KeyError: '((?:\w+\.)+(?:weight|bias|scale|inv_freq))'"
    for key in re.findall(weight, m.text):
        script = re.search(scripts, m.text)
        to_hf = script is not None and re.search(r"to_hf", script[1])
        to_neox = script is not None and not to_hf
        commands = ["neox-bridge convert CHECKPOINT NEW --to hf", CONVERT]
        remedy, other = commands if to_hf or not to_neox else reversed(commands)
        yield Diagnosis(
            "conversion-script",
            f"a conversion script looks for {key}, which the checkpoint does not have: GPT-NeoX's "
            "scripts know the names of one time only",
            remedy,
            (key,),
            others=() if script else (other,),
        )


def _yml(m: Message) -> Iterator[Diagnosis]:
    if "NeoXArgs" in m.text or "neox_arguments" in m.text:
        for key in re.findall(r"__init__\(\) got an unexpected keyword argument '(\w+)'", m.text):
            yield _unknown_key(key)
    pattern = r"Conf file (\S+) has the following duplicate keys with previously loaded file: (\S+)"
    for file, key in re.findall(pattern, m.text):
        yield Diagnosis(
            "duplicate-key",
            f"{key} stands in {file} and in a yml before it; GPT-NeoX refuses that",
            f"remove {key} from one of the yml files",
            (key,),
        )


def _unknown_key(key: str) -> Diagnosis:
    message = f"unexpected keyword argument '{key}'"
    changes = [c for c in CHANGES if any(re.search(text, message) for text in c.in_error)]
    knows = [era for era in LATER_ERAS if key in known_keys(era)]
    cause = f"the GPT-NeoX tree doesn't know the yml key {key}, and refuses what it doesn't know"
    if knows:
        spans = ", ".join(f"neox@{era.name}" for era in knows)
        cause += f"; those that do are {spans}"
    remedy = f"remove {key} from the yml"
    remedy += ", or use a GPT-NeoX that knows it" if knows else ""
    if changes and key != "rotary_save_freqs_buffer":
        remedy = changes[0].remedy
    newer = bool(knows) and LATER_ERAS[-1] in knows
    older: Older = "framework" if newer else "checkpoint" if knows else ""
    code = changes[0].id if changes else "unknown-yml-key"
    others = (remedy,) if knows else ()
    return Diagnosis(
        code, cause, remedy, (key,), older=older, by_convert=bool(knows), others=others
    )


def _torch(m: Message) -> Iterator[Diagnosis]:
    if "Weights only load failed" in m.text:
        names = re.findall(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.]+\w)", m.text)
        yield Diagnosis(
            "torch-weights-only",
            "torch 2.6 and newer refuse files that hold more than tensors, as GPT-NeoX's mp_rank "
            "and optimizer files do ("
            + (", ".join(dict.fromkeys(names)) or "pickled objects")
            + ")",
            "neox-bridge reads such files without executing anything: neox-bridge convert "
            "CHECKPOINT NEW --to hf; in code of your own, torch.load(…, weights_only=False) for a "
            "file that you trust",
            tuple(dict.fromkeys(names)),
            older="checkpoint",
        )
    for name in re.findall(r"No module named '(deepspeed|megatron|apex)[\w.]*'", m.text):
        if re.search(r"find_class|serialization\.py|unpickl", m.text, re.I):
            yield Diagnosis(
                "pickled-class",
                f"the file names classes of {name}, which isn't installed here",
                "neox-bridge reads it without: neox-bridge convert CHECKPOINT NEW --to hf",
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
