"""All that runs inside the sandbox: limits, one program, the values of some expressions.

It is handed to a fresh interpreter as text and never imported by `mar`; standard library only. It
holds no secret and reaches no verdict. Expected values never enter, so a program that forges the
reply must already know the right answers.

To stderr, a pipe, go `ready` and the program's key, before its first instruction: it can append
to them and never take them back. To stdout, a file, go the values as tagged JSON.
"""

import _ast
import _json
import marshal
import os
import resource
import sys
from _blake2 import blake2b
from collections.abc import Iterator

# statements that bind a name
BINDING = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef, _ast.ExceptHandler)

# fields of a syntax tree that change nothing
IDLE_FIELDS = ("annotation", "returns", "asname", "type_comment", "kind")

PLAIN = (list, tuple, set, frozenset, bytes, bytearray)


def _walk(node: object) -> Iterator[_ast.AST]:
    """Every node of a syntax tree, or of a list of them, parents first."""
    if isinstance(node, list):
        for part in node:
            yield from _walk(part)
    elif isinstance(node, _ast.AST):
        yield node
        for field in node._fields:
            yield from _walk(getattr(node, field, None))


def _names(tree: _ast.AST) -> dict[str, str]:
    """Every name that the program binds -> what stands for it.

    That is a number, or for an import what it was imported from.
    """
    names: dict[str, str] = {}
    for node in _walk(tree):
        number = f"v{len(names)}"
        if isinstance(node, _ast.alias):
            names.setdefault(node.asname or node.name, node.name)
        elif isinstance(node, BINDING):
            names.setdefault(node.name or "", number)
        elif isinstance(node, _ast.Name) and isinstance(node.ctx, _ast.Store):
            names.setdefault(node.id, number)
        elif isinstance(node, _ast.arg):
            names.setdefault(node.arg, number)
    return names


def _is_idle(node: object) -> bool:
    """`pass`, a docstring, or another constant that stands alone."""
    if isinstance(node, _ast.Expr):
        return isinstance(node.value, _ast.Constant)
    return isinstance(node, _ast.Pass)


def _text(node: object, names: dict[str, str]) -> str:
    """A syntax tree as text, without what makes no program new."""
    if isinstance(node, list):
        return "[" + ",".join(_text(part, names) for part in node if not _is_idle(part)) + "]"
    if not isinstance(node, _ast.AST):
        return repr(node)
    text = type(node).__name__
    for field in node._fields:
        if field in IDLE_FIELDS:
            continue
        value = getattr(node, field, None)
        if field in ("name", "arg", "id"):
            value = names.get(value or "", value)
        elif field == "names" and isinstance(node, _ast.Global | _ast.Nonlocal):
            value = [names.get(name, name) for name in node.names]
        text += f" {field}=({_text(value, names)})"
    return text


def canonical(program: str) -> str:
    """A digest of the structure of a program, as 64 hexadecimal digits.

    Renaming, comments, docstrings, annotations, `pass` and import aliases leave it as it is.
    """
    tree = compile(program, "<program>", "exec", _ast.PyCF_ONLY_AST)
    text = _text(tree, _names(tree))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


def tagged(value: object) -> str:
    """Plain data as JSON, containers as [kind, items]. TypeError for anything else.

    What is derived from a plain type is written as that type.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _json.encode_basestring_ascii(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return f'["float", "{float.__repr__(value)}"]'
    if isinstance(value, complex):
        return f'["complex", [{tagged(value.real)}, {tagged(value.imag)}]]'
    if isinstance(value, dict):
        return f'["dict", [{", ".join(map(tagged, value.items()))}]]'
    for kind in PLAIN:
        if isinstance(value, kind):
            return f'["{kind.__name__}", [{", ".join(map(tagged, value))}]]'
    raise TypeError(f"{type(value).__name__} is not plain data")


def confine(uid: int, limits: dict[str, int]) -> None:
    """Set hard limits, and change to user `uid` unless it is 0.

    The latter is for a sandbox that root made: the kernel does not count root's processes.
    """
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def main() -> None:
    request = marshal.load(sys.stdin.buffer)
    program = request["program"]
    values_out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    confine(request["uid"], request["limits"])
    os.write(2, b"ready\n")
    os.write(2, canonical(program).encode() + b"\n")
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)

    space: dict[str, object] = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), space)
    exec(compile(request["setup"], "<setup>", "exec"), space)
    values = [tagged(eval(expression, space)) for expression in request["expressions"]]
    reply = memoryview(f"[{', '.join(values)}]".encode())
    while reply:
        reply = reply[os.write(values_out, reply) :]
    # without the program's exit hooks
    os._exit(0)


if __name__ == "__main__":
    main()
