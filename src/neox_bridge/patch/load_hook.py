"""The load hook: one source for the patch of a tree, which copies it, and for ``install()``.

What stands below the marker goes into a GPT-NeoX file as it is: it uses nothing but torch, is
wrapped as that tree is (88 columns) and has no annotations, as that tree has none.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="var-annotated"

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # install() sets it, so that nothing imports torch before GPT-NeoX does

# neox-bridge put this here: checkpoints load with and without the buffers that are
# computed when a module is built. `neox-bridge patch --revert` takes it out again.
_NEOX_BRIDGE_SAID = set()


def _neox_bridge_load(module, name, state_dict, prefix, error_msgs):
    """Makes the state dict hold the computed buffer `name` exactly if the module does.

    A stored value is compared with the computed one first. Where the module stores the
    buffer too (rotary_save_freqs_buffer), the stored value is loaded, as it always was.
    """
    key, computed = prefix + name, getattr(module, name)
    wanted, stored = name in module.state_dict(), state_dict.get(key)
    what = f"{type(module).__name__}'s {name}"
    if stored is None:
        if wanted:
            state_dict[key] = computed
            _neox_bridge_say(f"{what} isn't in the checkpoint: computed")
        return
    if stored.shape == computed.shape:
        _neox_bridge_compare(what, key, stored, computed)
    elif not wanted:
        shapes = f"{list(stored.shape)} in the checkpoint, {list(computed.shape)} here"
        error_msgs.append(f"size mismatch for {key}: {shapes}.")
    if not wanted:
        del state_dict[key]
        _neox_bridge_say(f"{what} is in the checkpoint: left out, since it is computed")


def _neox_bridge_compare(what, key, stored, computed):
    """Warns, once, of a stored value that differs by more than its dtype's rounding."""
    coarser = max(stored.dtype, computed.dtype, key=lambda t: torch.finfo(t).eps)
    info = torch.finfo(coarser)
    stored, computed = stored.detach().cpu().double(), computed.detach().cpu().double()
    off = (stored - computed).abs()
    # rounded twice: when it was stored, and when it was computed on this machine
    allowed = max(2 * info.eps, 1e-6) * computed.abs().clamp(min=info.tiny)
    if not (off <= allowed).all():  # also where it isn't a number
        message = f"{what} in the checkpoint isn't what this model computes"
        _neox_bridge_say(message, f"{key} is off by up to {off.max():.3g}")


def _neox_bridge_say(message, warning=""):
    """Says something once: a note on rank 0, a warning on every rank that has one."""
    import warnings

    if message in _NEOX_BRIDGE_SAID:
        return
    _NEOX_BRIDGE_SAID.add(message)
    ranks = torch.distributed
    alone = not ranks.is_available() or not ranks.is_initialized()
    if warning:
        text = f"neox-bridge: {message}: {warning} (further ones aren't named)"
        warnings.warn(text, stacklevel=2)
    elif alone or ranks.get_rank() == 0:
        print(f"neox-bridge: {message}", flush=True)
