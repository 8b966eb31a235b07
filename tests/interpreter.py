"""Triton's interpreter, without work that it does over and over."""

from __future__ import annotations


def patch_once_a_launch() -> None:
    """For every helper that a kernel calls, the interpreter patches `triton.language` again, which
    takes longer than most helpers. Here it does so once a launch for each module of helpers.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return None  # within a launch nobody asks what it was
        patched.add(module)
        return patch(function)

    def launch_patched(self, *args, **kwargs):
        patched.clear()  # what the last launch patched it has restored
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_patched
