"""What libraries put into the names of the modules that they wrap, as `module.` and `_orig_mod.`."""

import re

# What torch's own ways to run a model put before the names of each module that they are used on, and of models alone.
_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPING = (*_ANYWHERE, "module", "_forward_module")
_WITHIN = re.compile(rf"(?<![^.])(?:{'|'.join(_ANYWHERE)})\.")
_PEFT = re.compile(rf"(?:(?:{'|'.join(_WRAPPING)})\.)*base_model\.model\.")
_WRAPPERS = re.compile(rf"(?<![^.])(?:(?:{'|'.join(_WRAPPING)}|base_model\.model)\.)+")


def around(name: str) -> str:
    """The wrappers of the whole model that a name, or a prefix of names, begins with.

    >>> around("module._orig_mod.h.0._orig_mod.attn.c_attn.weight")
    'module._orig_mod.'
    """
    return found[0] if (found := _WRAPPERS.match(name)) else ""


def within(name: str) -> tuple[str, list[str]]:
    """A name without wrappers of modules within the model, and these; one of the whole model is a prefix.

    >>> within("module.h.0._orig_mod.attn.c_attn.weight")
    ('module.h.0.attn.c_attn.weight', ['_orig_mod.'])
    """
    start = around(name)
    rest = name[len(start) :]
    return start + _WITHIN.sub("", rest), _WITHIN.findall(rest)


def bare(name: str) -> str:
    """A name without torch's own wrappers, wherever they stand."""
    return _WITHIN.sub("", name)


def no_wrappers(prefix: str) -> str:
    """A prefix without the wrappers in it."""
    return _WRAPPERS.sub("", prefix)


def without_peft(stored: str) -> str:
    """A name in an adapter's file without peft's own prefix, and what stands before that."""
    return stored[found.end() :] if (found := _PEFT.match(stored)) else stored


def wrappers_in(name: str) -> tuple[str, ...]:
    """The wrappers that a name tells of, as `module.`."""
    return tuple(f"{part}." for part in name.split(".") if part in _WRAPPING)
