"""What a GPT-NeoX source tree expects of a checkpoint, read from its syntax alone.

Nothing of the tree is imported or run, and git is not needed. Each fact is recognized by the forms
that GPT-NeoX has had for it since 2023. Another form is an error, never a guess.
"""

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from neox_bridge.errors import BridgeError
from neox_bridge.frameworks.deepspeed import DEEPERSPEED_VERSIONS
from neox_bridge.frameworks.eras import FLAG, Buffer, GatedBiases, MlpNames, RmsEps
from neox_bridge.frameworks.facts import TreeFacts
from neox_bridge.tensors.fused import GqaOrder

POSITIONS = "megatron/model/positional_embeddings.py"
TRANSFORMER = "megatron/model/transformer.py"
NORMS = "megatron/model/norms.py"
CHECKPOINTING = "megatron/checkpointing.py"
ARGUMENTS = ("megatron/neox_arguments/neox_args.py", "megatron/neox_arguments/deepspeed_args.py")
REQUIREMENTS = "requirements/requirements.txt"
_V1_DEEPSPEED = "0.3.15"
_MOST_BYTES = 4 << 20


@dataclass
class _Tree:
    """The parsed files of a tree, and where each fact was found."""

    path: str
    modules: dict[str, ast.Module] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def module(self, name: str) -> ast.Module:
        """A file's syntax tree. Raises BridgeError if it is missing or is not Python."""
        if name not in self.modules:
            self.modules[name] = _parse(self.path, name)
        return self.modules[name]

    def note(self, fact: str, file: str, node: ast.AST) -> None:
        """Note where a fact comes from."""
        self.places[fact] = f"{file}:{getattr(node, 'lineno', 1)}"

    def unknown(self, file: str, sought: str) -> BridgeError:
        """What to raise if the file has none of the known forms."""
        return BridgeError(
            f"{os.path.join(self.path, file)} does not contain {sought} in any form that GPT-NeoX "
            "has had, so what this tree expects is unknown. Name the GPT-NeoX that it descends "
            "from, such as neox@2024-03 or neox@today."
        )


def read_tree(path: str) -> TreeFacts:
    """The facts of the tree in a folder.

    Raises:
        BridgeError: The folder is not a GPT-NeoX tree, or its source has none of the known forms.
            The message names the file and what is missing in it.
    """
    tree = _Tree(os.path.abspath(path))
    keys = _keys(tree)
    deepspeed = _deepspeed(tree)
    return TreeFacts(
        name=tree.path,
        until=f"like {tree.path}",
        buffer=_inv_freq(tree),
        mlp_names=_mlp_names(tree),
        gqa_order=_gqa_order(tree),
        rms_eps=_rms_eps(tree),
        gated_biases=_gated_biases(tree),
        plain_mlp_4h=_plain_mlp_4h(tree),
        rope_tables_fp32=_rope_tables_fp32(tree),
        transformer_engine=_transformer_engine(tree),
        args_checked=_args_checked(tree),
        keys=keys,
        places=tree.places,
        states="sub-partitions" if deepspeed == _V1_DEEPSPEED else "partitions",
        deepspeed=deepspeed,
    )


def _parse(root: str, name: str) -> ast.Module:
    path = os.path.join(root, name)
    if not os.path.isdir(root):
        raise BridgeError(f"{root} is not a folder. Name the folder that contains GPT-NeoX.")
    if not os.path.isfile(path):
        raise BridgeError(
            f"{root} is not a GPT-NeoX tree: {name} is missing. Name the folder that contains "
            "megatron/."
        )
    if os.path.getsize(path) > _MOST_BYTES:
        raise BridgeError(
            f"{path} is larger than {_MOST_BYTES >> 20} MiB, so it is not the file of GPT-NeoX. "
            "Restore the file."
        )
    try:
        with open(path, "rb") as file:
            return ast.parse(file.read(), name)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise BridgeError(
            f"{path}{line}: not valid Python, so the tree cannot be read. Restore the file."
        ) from None


def _deepspeed(tree: _Tree) -> str:
    """The version of DeeperSpeed that the tree requires; "" if it names no known one."""
    path = os.path.join(tree.path, REQUIREMENTS)
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES)
    except OSError:
        return ""
    commits = re.findall(rb"DeeperSpeed(?:\.git)?@([0-9a-f]{40})", text)
    versions = [DEEPERSPEED_VERSIONS.get(commit.decode(), "") for commit in commits]
    return versions[0] if versions else ""


def _keys(tree: _Tree) -> frozenset[str]:
    """The fields of the argument dataclasses. NeoXArgs rejects all other yml keys."""
    keys: set[str] = set()
    for name in ARGUMENTS:
        classes = [node for node in tree.module(name).body if isinstance(node, ast.ClassDef)]
        for node in classes:
            keys |= {
                entry.target.id
                for entry in node.body
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)
            }
        if not classes:
            raise tree.unknown(name, "the dataclasses of the yml's keys")
    if not {"num_layers", "hidden_size"} <= keys:
        raise tree.unknown(ARGUMENTS[0], "the yml keys num_layers and hidden_size")
    tree.places["keys"] = ARGUMENTS[0]
    return frozenset(keys)


def _inv_freq(tree: _Tree) -> Buffer:
    """Persistent always, by a flag, or never; "either" if a load hook accepts both kinds.

    Before neox-inv-freq ``register_buffer("inv_freq", inv_freq)``, since then with
    ``persistent=save_inv_freqs``, which transformer.py takes from rotary_save_freqs_buffer.
    """
    rotary = _class(tree, POSITIONS, "RotaryEmbedding")
    kinds = set()
    for call in _calls(rotary, "register_buffer"):
        first = call.args[0] if call.args else None
        if isinstance(first, ast.Constant) and first.value == "inv_freq":
            kinds.add(_persistent(tree, call))
            tree.note("inv_freq", POSITIONS, call)
    if not kinds:
        raise tree.unknown(POSITIONS, 'RotaryEmbedding\'s register_buffer("inv_freq", …)')
    if len(kinds) > 1:
        raise tree.unknown(
            POSITIONS, 'one and the same persistent= in every register_buffer("inv_freq")'
        )
    if _has_load_hook(tree, rotary):
        return "either"
    (kind,) = kinds
    return _flag(tree, rotary) if kind == "flag" else kind


def _persistent(tree: _Tree, call: ast.Call) -> Buffer:
    value = next((k.value for k in call.keywords if k.arg == "persistent"), None)
    if value is None and len(call.args) > 2:
        value = call.args[2]
    if value is None:
        return "always"
    if isinstance(value, ast.Constant) and isinstance(value.value, bool):
        return "always" if value.value else "never"
    if isinstance(value, ast.Name):
        return "flag"
    raise tree.unknown(POSITIONS, 'a known persistent= in register_buffer("inv_freq")')


def _flag(tree: _Tree, rotary: ast.ClassDef) -> Buffer:
    """Whether transformer.py passes the yml's flag; otherwise the parameter's default counts."""
    for call in _calls(tree.module(TRANSFORMER), "RotaryEmbedding"):
        for keyword in call.keywords:
            if keyword.arg == "save_inv_freqs":
                if isinstance(keyword.value, ast.Attribute) and keyword.value.attr == FLAG:
                    tree.note("inv_freq flag", TRANSFORMER, keyword.value)
                    return "flag"
                raise tree.unknown(TRANSFORMER, f"save_inv_freqs=neox_args.{FLAG}")
    if function := _function(rotary, "__init__"):
        names = [argument.arg for argument in reversed(function.args.args)]
        defaults = dict(zip(names, reversed(function.args.defaults), strict=False))
        if isinstance(default := defaults.get("save_inv_freqs"), ast.Constant):
            return "always" if default.value else "never"
    raise tree.unknown(TRANSFORMER, "RotaryEmbedding(…, save_inv_freqs=…)")


_HOOKS = ("_register_load_state_dict_pre_hook", "register_load_state_dict_pre_hook")


def _has_load_hook(tree: _Tree, rotary: ast.ClassDef) -> bool:
    """Whether loading removes inv_freq from the state dict, or adds it."""
    body = _function(rotary, "_load_from_state_dict")
    if body is not None and _mentions_inv_freq(body):
        tree.note("load hook", POSITIONS, body)
        return True
    for name in _HOOKS:
        for call in _calls(rotary, name):
            hook = call.args[0] if call.args else None
            target = getattr(hook, "attr", getattr(hook, "id", ""))
            function = _function(tree.module(POSITIONS), target)
            if not _mentions_inv_freq(function or call):
                raise tree.unknown(POSITIONS, "what RotaryEmbedding's load hook does with inv_freq")
            tree.note("load hook", POSITIONS, call)
            return True
    return False


def _mentions_inv_freq(node: ast.AST) -> bool:
    return any(
        isinstance(n, ast.Constant) and isinstance(n.value, str) and "inv_freq" in n.value
        for n in ast.walk(node)
    )


def _mlp_names(tree: _Tree) -> MlpNames:
    """linear1/linear2 since neox-mlp-names, before it dense_h_to_4h/dense_4h_to_h."""
    mlp = _class(tree, TRANSFORMER, "ParallelMLP")
    names: dict[str, MlpNames] = {"linear1": "linear", "dense_h_to_4h": "dense"}
    targets = (t for node in ast.walk(mlp) if isinstance(node, ast.Assign) for t in node.targets)
    for target in targets:
        on_self = isinstance(target, ast.Attribute) and _name(target.value) == "self"
        if on_self and _name(target) in names:
            tree.note("mlp_names", TRANSFORMER, target)
            return names[_name(target)]
    raise tree.unknown(TRANSFORMER, "ParallelMLP's self.linear1 or self.dense_h_to_4h")


def _plain_mlp_4h(tree: _Tree) -> bool:
    """Since neox-mlp-width the plain MLP takes its width from intermediate_size."""
    mlp = _class(tree, TRANSFORMER, "ParallelMLP")
    for node in ast.walk(mlp):
        if isinstance(node, ast.Attribute) and node.attr == "intermediate_size":
            tree.note("plain_mlp_4h", TRANSFORMER, node)
            return False
    tree.note("plain_mlp_4h", TRANSFORMER, mlp)
    return True


def _gated_biases(tree: _Tree) -> GatedBiases:
    """What ParallelTransformerLayer.forward asks before it asserts that ``mlp_bias is None``.

    The kind of MLP until neox-mlp-names, the activation until neox-gated-biases, then the bias.
    Trees before LLaMAParallelMLP (2023) assert nothing.
    """
    rules: dict[str, GatedBiases] = {"mlp_type": "none", "activation": "by activation"}
    for node in ast.walk(_class(tree, TRANSFORMER, "ParallelTransformerLayer")):
        if not (isinstance(node, ast.If) and any(map(_asserts_no_mlp_bias, node.body))):
            continue
        tree.note("gated_biases", TRANSFORMER, node)
        tested = {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
        if rule := next((rules[attribute] for attribute in rules if attribute in tested), None):
            return rule
        if any(isinstance(n, ast.Name) and n.id == "mlp_bias" for n in ast.walk(node.test)):
            return "optional"
    if "gated_biases" not in tree.places and _mlp_names(tree) == "dense":
        return "none"
    raise tree.unknown(TRANSFORMER, "ParallelTransformerLayer's assert mlp_bias is None")


def _asserts_no_mlp_bias(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.Assert) else None
    return isinstance(test, ast.Compare) and _name(test.left) == "mlp_bias"


def _gqa_order(tree: _Tree) -> GqaOrder:
    """How gqa_project splits a rank's rows; by query head before neox-gqa-order.

    Trees before neox-num-kv-heads have no grouped-query attention at all.
    """
    module = tree.module(TRANSFORMER)
    function = _function(module, "gqa_project")
    if function is None:
        return "interleaved"
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id == "split_sizes" and node.value.elts:
                tree.note("gqa_order", TRANSFORMER, node)
                first = ast.walk(node.value.elts[0])
                names = {n.attr for n in first if isinstance(n, ast.Attribute)}
                if "num_attention_heads_per_partition" in names:
                    return "grouped"
                if names == {"hidden_size_per_attention_head"}:
                    return "interleaved"
    raise tree.unknown(TRANSFORMER, "gqa_project's split_sizes")


def _rms_eps(tree: _Tree) -> RmsEps:
    """``rsqrt(var + eps)`` since neox-rms-epsilon, before it ``x / (rms + eps)``."""
    forward = _function(_class(tree, NORMS, "RMSNorm"), "forward")
    for node in ast.walk(forward) if forward else ():
        root = isinstance(node, ast.Call) and _name(node.func) in ("rsqrt", "sqrt")
        if root and any(map(_adds_eps, getattr(node, "args", ()))):
            tree.note("rms_eps", NORMS, node)
            return "inside"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and _adds_eps(node.right):
            tree.note("rms_eps", NORMS, node)
            return "outside"
    raise tree.unknown(NORMS, "RMSNorm's rsqrt(variance + self.eps) or x / (rms + self.eps)")


def _adds_eps(node: ast.AST) -> bool:
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    return is_sum and any(isinstance(n, ast.Attribute) and n.attr == "eps" for n in ast.walk(node))


def _rope_tables_fp32(tree: _Tree) -> bool:
    """Since neox-rope-fp32 _prepare_cache computes the tables in fp32."""
    prepare = _function(_class(tree, POSITIONS, "RotaryEmbedding"), "_prepare_cache")
    if prepare is not None:
        tree.note("rope_tables_fp32", POSITIONS, prepare)
    return prepare is not None


def _transformer_engine(tree: _Tree) -> bool:
    """Since neox-transformer-engine layers may be Transformer Engine's."""
    for node in ast.walk(tree.module(TRANSFORMER)):
        if isinstance(node, ast.ImportFrom) and node.module == "megatron.model.transformer_engine":
            tree.note("transformer_engine", TRANSFORMER, node)
            return True
    return False


def _args_checked(tree: _Tree) -> tuple[str, ...]:
    """The keys of ``args`` that are saved: check_checkpoint_args compares every one at load."""
    module = tree.module(CHECKPOINTING)
    check = _function(module, "check_checkpoint_args")
    if check is None:
        raise tree.unknown(CHECKPOINTING, "check_checkpoint_args")
    for node in ast.walk(module):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                named = isinstance(key, ast.Constant) and key.value == "args"
                if named and isinstance(value, ast.Dict):
                    tree.note("args_checked", CHECKPOINTING, check)
                    return tuple(str(k.value) for k in value.keys if isinstance(k, ast.Constant))
    raise tree.unknown(CHECKPOINTING, 'the "args" that a checkpoint is saved with')


def _class(tree: _Tree, file: str, name: str) -> ast.ClassDef:
    for node in ast.walk(tree.module(file)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise tree.unknown(file, f"class {name}")


def _function(node: ast.AST, name: str) -> ast.FunctionDef | None:
    functions = (n for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n.name == name)
    return next(functions, None)


def _calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and _name(call.func) == name:
            yield call


def _name(node: ast.AST) -> str:
    """The last part of ``a.b.name``."""
    return str(getattr(node, "attr", getattr(node, "id", "")))


def looks_like_tree(path: str) -> bool:
    """Whether a folder contains megatron/, so that ``neox:`` may be omitted."""
    return bool(re.search(r"[/.~]", path)) and os.path.isdir(os.path.join(path, "megatron"))
