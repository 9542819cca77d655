"""All that runs inside the sandbox: limits, one program, the values of some expressions. Standard library only; it is handed to a fresh interpreter
as text and never imported by `mar`.

It holds no secret and reaches no verdict. Expected values never enter, so a program that forges the reply must already know the right answers.
On stderr, a pipe, `ready` and the program's key go out before its first instruction: it can append to them, never take them back.
On stdout, a file, the values as tagged JSON.
"""

import _ast
import _json
import marshal
import os
import resource
import sys
from _blake2 import blake2b
from collections.abc import Iterator

BINDING = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef, _ast.ExceptHandler)

PLAIN = (list, tuple, set, frozenset, bytes, bytearray)


def _walk(node: object) -> Iterator[_ast.AST]:
    if isinstance(node, _ast.AST):
        yield node
    for part in (
        node
        if isinstance(node, list)
        else [getattr(node, f, None) for f in getattr(node, "_fields", ())]
    ):
        yield from _walk(part)


def _names(tree: _ast.AST) -> dict[str, str]:
    """Every name that the program binds, and what stands for it: its number, or what it was imported from."""
    names: dict[str, str] = {}
    for node in _walk(tree):
        if isinstance(node, _ast.alias):
            names.setdefault(node.asname or node.name, node.name)
        elif isinstance(node, BINDING) or (
            isinstance(node, _ast.Name) and isinstance(node.ctx, _ast.Store)
        ):
            names.setdefault(
                getattr(node, "id", None) or getattr(node, "name", None) or "", f"v{len(names)}"
            )
        elif isinstance(node, _ast.arg):
            names.setdefault(node.arg, f"v{len(names)}")
    return names


def _text(node: object, names: dict[str, str]) -> str:
    """A syntax tree as text, without what makes no program new."""
    if isinstance(node, list):
        idle = [
            isinstance(n, _ast.Pass)
            or (isinstance(n, _ast.Expr) and isinstance(n.value, _ast.Constant))
            for n in node
        ]
        return (
            "["
            + ",".join(_text(n, names) for n, skip in zip(node, idle, strict=True) if not skip)
            + "]"
        )
    if not isinstance(node, _ast.AST):
        return repr(node)
    out = type(node).__name__
    for field in node._fields:
        value = getattr(node, field, None)
        if field in ("name", "arg", "id"):
            value = names.get(value or "", value)
        elif field == "names" and isinstance(node, _ast.Global | _ast.Nonlocal):
            value = [names.get(name, name) for name in node.names]
        if field not in ("annotation", "returns", "asname", "type_comment", "kind"):
            out += f" {field}=({_text(value, names)})"
    return out


def canonical(program: str) -> str:
    """A digest of the syntax tree that renaming, comments, docstrings, annotations, `pass` and import aliases leave as it is."""
    tree = compile(program, "<program>", "exec", _ast.PyCF_ONLY_AST)
    return blake2b(
        _text(tree, _names(tree)).encode("utf-8", "surrogatepass"), digest_size=32
    ).hexdigest()


def tagged(value: object) -> str:
    """Plain data as JSON, containers as [kind, items]. TypeError for anything that is not plain."""
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
    """Hard limits; and where the sandbox was made by root, another user: the kernel does not count root's processes."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def main() -> None:
    request = marshal.load(sys.stdin.buffer)
    values_out, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    confine(request["uid"], request["limits"])
    os.write(2, b"ready\n")
    program, space = request["program"], {"__name__": "program"}
    os.write(2, canonical(program).encode() + b"\n")
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    exec(compile(program, "<program>", "exec"), space)
    exec(compile(request["setup"], "<setup>", "exec"), space)
    values = [tagged(eval(expression, space)) for expression in request["expressions"]]
    reply = memoryview(f"[{', '.join(values)}]".encode())
    while reply:
        reply = reply[os.write(values_out, reply) :]
    os._exit(0)


if __name__ == "__main__":
    main()
